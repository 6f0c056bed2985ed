"""specsplit capacity"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from specsplit import tracing
from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.cli.sweep_flags import CLIENT_SETTINGS, add_prompt_flags, add_workers_dir_flag, parse_gamma
from specsplit.errors import UserError
from specsplit.experiment.sweep import MODES
from specsplit.settings.processes import OrchestratorConfig


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_prompt_flags(parser)
    parser.add_argument("--results-dir", type=Path, required=True, help="for capacity.csv and its figure")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N", help="at once")
    parser.add_argument("--gamma", type=parse_gamma, nargs="+", default=[0, 3], metavar="N", help="or auto")
    parser.add_argument("--mode", dest="pipeline_mode", choices=MODES, default="sync", help="pipeline mode")
    parser.add_argument("--requests", type=int, default=32, metavar="N", help="at each number of clients")
    parser.add_argument("--tpot-limit-ms", type=float, metavar="MS", help="for the goodput; default: 2x one client's")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="short requests of each client before")
    add_workers_dir_flag(parser)
    parser.add_argument("--only", action="store_true", help="write capacity_requests.csv alone")
    add_setting_flags(parser, OrchestratorConfig, only=[*CLIENT_SETTINGS, "max_output_tokens"])


def run(args: argparse.Namespace) -> None:
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
        write_capacity = import_module("specsplit.analysis.capacity_table").write_capacity
        for path in write_capacity(args.results_dir, args.tpot_limit_ms):
            print(path)
