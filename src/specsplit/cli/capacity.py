"""specsplit capacity | context-curve: two workers under many clients, and under long contexts"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from specsplit import tracing
from specsplit.cli.bench import BENCH_SETTINGS, parse_gamma
from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.errors import UserError
from specsplit.experiment.sweep import MODES
from specsplit.settings.processes import OrchestratorConfig

# Greedy, as far as the workers let it: what a client may still say.
NOT_OURS = {"top_k", "top_p", "sampling", "jitter_ms", "max_output_tokens", "max_rounds"}
CLIENT_SETTINGS = ["tree", *(name for name in BENCH_SETTINGS if name not in NOT_OURS)]
WORKERS_DIR_HELP = "endpoint files DIR/POINT/ROLE.json, for points with workers of their own, not the two addresses"


def add_commands(subparsers: Any) -> None:
    capacity = subparsers.add_parser("capacity", help="tokens/s, latency and goodput with many clients at once")
    _add_prompts(capacity)
    capacity.add_argument("--results-dir", type=Path, required=True, help="for capacity.csv and its figure")
    capacity.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N", help="at once")
    capacity.add_argument("--gamma", type=parse_gamma, nargs="+", default=[0, 3], metavar="N", help="or auto")
    capacity.add_argument("--mode", dest="pipeline_mode", choices=MODES, default="sync", help="pipeline mode")
    capacity.add_argument("--requests", type=int, default=32, metavar="N", help="at each number of clients")
    capacity.add_argument("--tpot-limit-ms", type=float, metavar="MS", help="for the goodput; default: 2x one client's")
    capacity.add_argument("--warmup", type=int, default=1, metavar="N", help="short requests of each client before")
    capacity.add_argument("--workers-dir", type=Path, metavar="DIR", help=WORKERS_DIR_HELP)
    capacity.add_argument("--only", action="store_true", help="write capacity_requests.csv alone")
    add_setting_flags(capacity, OrchestratorConfig, only=[*CLIENT_SETTINGS, "max_output_tokens"])
    capacity.set_defaults(run=run_capacity)

    curve = subparsers.add_parser("context-curve", help="what a token costs against the length of its context")
    _add_prompts(curve)
    curve.add_argument("--output", type=Path, required=True, help="CSV table, one row a gamma and length")
    curve.add_argument("--figure", type=Path, help="also draw it: a path ending in .png; the .svg is put beside it")
    curve.add_argument(
        "--length",
        dest="lengths",
        type=int,
        nargs="+",
        default=[64, 128, 256, 512, 1024, 2048, 4096],
        metavar="N",
        help="context tokens; those that the workers cannot hold are left out",
    )
    curve.add_argument("--gamma", type=parse_gamma, nargs="+", default=[0, 3], metavar="N", help="or auto")
    curve.add_argument("--output-tokens", type=int, default=32, metavar="N", help="tokens after each context")
    curve.add_argument("--texts", type=int, default=3, metavar="N", help="texts at each length")
    curve.add_argument("--workers-dir", type=Path, metavar="DIR", help=WORKERS_DIR_HELP)
    add_setting_flags(curve, OrchestratorConfig, only=[name for name in CLIENT_SETTINGS if name != "ignore_eos"])
    curve.set_defaults(run=run_context_curve)


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL file of prompts")
    parser.add_argument("--limit", type=int, help="take a stratified slice of this many prompts (default: all)")
    parser.add_argument("--on-bad-line", choices=("stop", "skip"), default="stop", help="what a bad prompt line does")


def run_capacity(args: argparse.Namespace) -> None:
    from specsplit.cli.plan import connected_configs, load_codec, read_prompts
    from specsplit.experiment.capacity import CapacityRecord, measure_capacity
    from specsplit.experiment.columns import FAILED
    from specsplit.experiment.runner import encode_prompts

    for name, least in (("requests", 1), ("warmup", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: wanted a whole number >= {least}")
    if bad := [number for number in args.clients if number < 1]:
        raise UserError(f"--clients {bad[0]}: a number of clients, 1 or more")
    if args.tpot_limit_ms is not None and not args.tpot_limit_ms > 0:
        raise UserError(f"--tpot-limit-ms {args.tpot_limit_ms}: a time above 0 ms")
    settings = {"mode": args.pipeline_mode, "temperature": 0.0, "rtt_ms": 0.0, "jitter_ms": 0.0}
    config = load_settings(OrchestratorConfig, args, **settings)
    tracing.wanted()  # tells at once what it lacks
    codec = load_codec(config)
    configs, limit = connected_configs(args, config, codec)
    requests = encode_prompts(read_prompts(args), codec, chat=config.use_chat_template, limit=limit)

    def show(rows: list[CapacityRecord]) -> None:
        wall_s = max(row.started_ms + row.total_latency_ms for row in rows) / 1e3
        tokens = sum(row.generated_tokens for row in rows)
        tpots = sorted(row.tpot_ms for row in rows if row.tpot_ms is not None)
        median = f", median TPOT {tpots[len(tpots) // 2]:.1f} ms" if tpots else ""
        wrong = sum(row.matches_single is False for row in rows)
        failed = sum(row.status == FAILED for row in rows)
        print(
            f"gamma {rows[0].gamma}, {rows[0].clients} clients: {len(rows)} requests, {tokens / wall_s:.1f} tokens/s"
            f"{median}{f', {failed} FAILED' if failed else ''}"
            f"{f', {wrong} TEXTS DIFFER from the single run' if wrong else ''}",
            flush=True,
        )

    table = args.results_dir / "capacity_requests.csv"
    clients = sorted({1, *args.clients})
    measure_capacity(requests, configs, clients, table, count=args.requests, warmup=args.warmup, on_level=show)
    print(table)
    if not args.only:
        from specsplit.analysis.capacity_table import write_capacity

        for path in write_capacity(args.results_dir, args.tpot_limit_ms):
            print(path)


def run_context_curve(args: argparse.Namespace) -> None:
    import pandas as pd

    from specsplit.analysis.context_figure import draw_context_curve, summarize_contexts
    from specsplit.analysis.tables import write_csv
    from specsplit.cli.plan import connected_configs, load_codec, read_prompts
    from specsplit.experiment.context_curve import ContextText, measure_contexts
    from specsplit.experiment.runner import encode_prompts

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
