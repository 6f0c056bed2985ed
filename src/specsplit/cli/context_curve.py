"""specsplit context-curve"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit import tracing
from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.cli.sweep_flags import add_figure_flag, add_prompts_flag, add_workers_dir_flag
from specsplit.errors import UserError
from specsplit.settings.measure import ContextSettings
from specsplit.settings.run import NO_NETWORK, OrchestratorConfig


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_prompts_flag(parser)
    parser.add_argument("--output", type=Path, required=True, help="CSV table, one row a gamma and length")
    add_figure_flag(parser)
    add_workers_dir_flag(parser)
    # Greedy texts of a fixed length in mode sync, without a simulated network.
    without = (
        *("mode", "temperature", *NO_NETWORK, "top_k", "top_p", "sampling", "draft_acceptance"),
        *("max_output_tokens", "max_rounds", "ignore_eos", "stop", "stop_token_ids"),
    )
    add_setting_flags(parser, ContextSettings, OrchestratorConfig, without=without)


def run(args: argparse.Namespace) -> None:
    import pandas as pd

    from specsplit.analysis.context_figure import draw_context_curve, summarize_contexts
    from specsplit.cli.plan import connected_configs, describe_texts, load_codec, read_prompts
    from specsplit.experiment.context_curve import ContextText, measure_contexts
    from specsplit.experiment.runner import encode_prompts
    from specsplit.io import write_csv
    from specsplit.provenance.facts import beside_run
    from specsplit.provenance.run_file import describe_here, write_run

    settings = load_settings(ContextSettings, args)
    fixed = {"mode": "sync", "temperature": 0.0, **NO_NETWORK, "ignore_eos": True}
    tracing.wanted()
    config = load_settings(
        OrchestratorConfig, args, **fixed, gamma=settings.gamma[0], max_output_tokens=settings.output_tokens
    )
    codec = load_codec(config)
    configs, (limit, raisable), workers = connected_configs(args, settings.gamma, config, codec)
    lengths = [length for length in sorted(set(settings.length)) if length + settings.output_tokens <= limit]
    left_out = sorted(set(settings.length) - set(lengths))
    if not lengths:
        raise UserError(
            f"--length {left_out[0]}: with {settings.output_tokens} tokens more it exceeds the {limit} of a worker"
        )
    if left_out:
        print(f"left out, for the workers hold {limit} tokens: {', '.join(map(str, left_out))}", flush=True)
    prompts = read_prompts(args.prompts, settings)
    requests = encode_prompts(prompts, codec, chat=config.use_chat_template, limit=limit, raisable=raisable)

    def show(row: ContextText) -> None:
        itl = "" if row.itl_ms is None else f", {row.itl_ms:.1f} ms a token"
        prefill = "" if row.ttft_ms is None else f"first token after {row.ttft_ms:.0f} ms"
        print(f"gamma {row.gamma}, {row.context_tokens} tokens of context: {prefill}{itl}", flush=True)

    run = describe_here() | describe_texts(args.prompts, codec, config, workers)
    for own in ("max_output_tokens", "ignore_eos"):  # of these texts, whatever those of the sweep are
        del run["orchestrator"][own]
    rows = measure_contexts(requests, configs, lengths, texts=settings.texts, on_row=show)
    table = summarize_contexts(pd.DataFrame(rows))
    write_csv(table, args.output)
    write_run(beside_run(args.output), run, [args.output])
    print(args.output)
    if args.figure is not None:
        for path in draw_context_curve(table, args.figure):
            print(path)
