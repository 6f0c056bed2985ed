"""specsplit context-curve"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit import tracing
from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.cli.sweep_flags import CLIENT_SETTINGS, add_prompt_flags, add_workers_dir_flag, parse_gamma
from specsplit.errors import UserError
from specsplit.settings.processes import OrchestratorConfig


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_prompt_flags(parser)
    parser.add_argument("--output", type=Path, required=True, help="CSV table, one row a gamma and length")
    parser.add_argument("--figure", type=Path, help="also draw it: a path ending in .png; the .svg is put beside it")
    parser.add_argument(
        "--length",
        dest="lengths",
        type=int,
        nargs="+",
        default=[64, 128, 256, 512, 1024, 2048, 4096],
        metavar="N",
        help="context tokens; those that the workers cannot hold are left out",
    )
    parser.add_argument("--gamma", type=parse_gamma, nargs="+", default=[0, 3], metavar="N", help="or auto")
    parser.add_argument("--output-tokens", type=int, default=32, metavar="N", help="tokens after each context")
    parser.add_argument("--texts", type=int, default=3, metavar="N", help="texts at each length")
    add_workers_dir_flag(parser)
    add_setting_flags(parser, OrchestratorConfig, only=[name for name in CLIENT_SETTINGS if name != "ignore_eos"])


def run(args: argparse.Namespace) -> None:
    import pandas as pd

    from specsplit.analysis.context_figure import draw_context_curve, summarize_contexts
    from specsplit.cli.plan import connected_configs, load_codec, read_prompts
    from specsplit.experiment.context_curve import ContextText, measure_contexts
    from specsplit.experiment.runner import encode_prompts
    from specsplit.io import write_csv

    for name, values, least in (
        ("length", args.lengths, 1),
        ("output-tokens", [args.output_tokens], 8),
        ("texts", [args.texts], 1),
    ):
        if min(values) < least:
            raise UserError(f"--{name} {min(values)}: wanted a whole number >= {least}")
    if args.figure is not None and args.figure.suffix != ".png":
        raise UserError(f"--figure {args.figure}: a path that ends in .png")
    settings = {"mode": "sync", "temperature": 0.0, "rtt_ms": 0.0, "jitter_ms": 0.0, "ignore_eos": True}
    tracing.wanted()
    config = load_settings(OrchestratorConfig, args, **settings, max_output_tokens=args.output_tokens)
    codec = load_codec(config)
    configs, limit = connected_configs(args, config, codec)
    lengths = [length for length in sorted(set(args.lengths)) if length + args.output_tokens <= limit]
    left_out = sorted(set(args.lengths) - set(lengths))
    if not lengths:
        raise UserError(
            f"--length {left_out[0]}: with {args.output_tokens} tokens more it exceeds the {limit} of a worker"
        )
    if left_out:
        print(f"left out, for the workers hold {limit} tokens: {', '.join(map(str, left_out))}", flush=True)
    requests = encode_prompts(read_prompts(args), codec, chat=config.use_chat_template, limit=limit)

    def show(row: ContextText) -> None:
        itl = "" if row.itl_ms is None else f", {row.itl_ms:.1f} ms a token"
        prefill = "" if row.ttft_ms is None else f"first token after {row.ttft_ms:.0f} ms"
        print(f"gamma {row.gamma}, {row.context_tokens} tokens of context: {prefill}{itl}", flush=True)

    rows = measure_contexts(requests, configs, lengths, texts=args.texts, on_row=show)
    table = summarize_contexts(pd.DataFrame(rows))
    write_csv(table, args.output)
    print(args.output)
    if args.figure is not None:
        for path in draw_context_curve(table, args.figure):
            print(path)
