"""specsplit capacity"""

from __future__ import annotations

import argparse
from functools import partial
from importlib import import_module
from pathlib import Path

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.cli.measuring import NOT_GREEDY, add_prompts_flag, add_workers_dir_flag, greedy, leave
from specsplit.errors import RunError, counted
from specsplit.settings.measure import CapacitySettings
from specsplit.settings.run import OrchestratorConfig


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_prompts_flag(parser)
    parser.add_argument("--results-dir", type=Path, required=True, help="for capacity.csv and its figure")
    add_workers_dir_flag(parser)
    parser.add_argument("--only", action="store_true", help="write capacity_requests.csv alone")
    add_setting_flags(parser, CapacitySettings, OrchestratorConfig, without=(*NOT_GREEDY, "max_rounds"))


def run(args: argparse.Namespace) -> None:
    from specsplit.cli.plan import at_gammas, connect
    from specsplit.experiment.capacity import Load, measure_capacity
    from specsplit.experiment.columns import FAILED
    from specsplit.models.tokenizer import stops_at

    settings = load_settings(CapacitySettings, args)
    config = greedy(args, mode=settings.mode, gamma=settings.gamma[0])
    found = connect(args, settings, at_gammas(config, settings.gamma))
    table, differing = args.results_dir / "capacity_requests.csv", 0
    stops = partial(stops_at, found.codec, config.stop)
    for rows in measure_capacity(found.requests, found.configs, stops, settings, table, decides=found.decides):
        itls = sorted(row.itl_ms for row in rows if row.itl_ms is not None)
        median = f", median ITL {itls[len(itls) // 2]:.1f} ms" if itls else ""
        wrong = sum(row.matches_single is False for row in rows)
        differing += wrong
        failed = sum(row.status == FAILED for row in rows)
        print(
            f"gamma {rows[0].gamma}, {Load(rows[0].arrivals, rows[0].clients, rows[0].rate)}: "
            f"{counted(len(rows), 'request')}{median}{f', {failed} FAILED' if failed else ''}"
            f"{f', {wrong} TEXTS DIFFER from the single run' if wrong else ''}",
            flush=True,
        )

    leave(table, found.run)
    if not args.only:
        write_capacity = import_module("specsplit.analysis.capacity_table").write_capacity
        print(*write_capacity(args.results_dir, settings.tpot_limit_ms, settings.ttft_limit_ms), sep="\n")
        if differing:
            raise RunError(f"{counted(differing, 'text differs', 'texts differ')} from those of a single client")
