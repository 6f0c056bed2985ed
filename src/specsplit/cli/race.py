"""specsplit bench --baseline"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from importlib import import_module

from specsplit.cli.plan import Plan, with_addresses
from specsplit.client.handshake import connected_pair
from specsplit.errors import RunError, counted
from specsplit.experiment.peer_race import Ours, PeerRecord
from specsplit.experiment.peer_run import check_race, run_race
from specsplit.experiment.sweep import Point


def race(args: argparse.Namespace, plan: Plan) -> None:
    """Race the points of the plan against the peers; peers_requests.csv and peers_run.json, and unless --only the
    summary and the figure."""
    peers = check_race({point.label: config for point, config in plan.configs.items()}, plan.bench.baseline or ())
    done = differing = 0
    labels = {point.label for point in plan.points}

    def show(row: PeerRecord, total: int) -> None:
        nonlocal done, differing
        done += 1
        differing += row.contender in labels and not row.identical
        tpot = "" if row.tpot_ms is None else f", TPOT {row.tpot_ms:.1f} ms"
        same = "" if row.identical else f", differs from token {row.first_divergence}"
        tell(f"[{done}/{total}] {row.contender} {row.request_id}: {counted(row.generated_tokens, 'token')}{tpot}{same}")

    def tell(line: str) -> None:
        print(line, flush=True)

    with ExitStack() as stack:
        ours = [_connect(args, plan, point, stack) for point in plan.points]
        table = run_race(
            ours,
            peers,
            {"target": args.target_model, "draft": args.draft_model},
            plan.prompts,
            plan.codec,
            plan.bench,
            args.results_dir,
            inputs=plan.inputs,
            on_start=tell,
            on_row=show,
        )
    print(table)
    if not args.only:
        print(*import_module("specsplit.analysis.peers_table").write_peers(args.results_dir), sep="\n")
        if differing:
            raise RunError(f"{counted(differing, 'text of ours differs', 'texts of ours differ')} from the target's")


def _connect(args: argparse.Namespace, plan: Plan, point: Point, stack: ExitStack) -> Ours:
    config = with_addresses(plan.configs[point], args.workers_dir, point)
    return Ours(point.label, config, stack.enter_context(connected_pair(config, plan.codec.sha256)))
