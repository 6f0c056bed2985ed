"""specsplit bench --baseline"""

from __future__ import annotations

import argparse
from importlib import import_module

from specsplit.cli.plan import Plan, connect
from specsplit.errors import RunError, counted
from specsplit.experiment.peer_race import Ours, PeerRecord
from specsplit.experiment.peer_run import check_race, run_race
from specsplit.provenance.closure import code_sha256


def race(args: argparse.Namespace, plan: Plan) -> None:
    """Race the points of the plan against the peers; peers_requests.csv and peers_run.json, and unless --only the
    summary and the figure."""
    peers = check_race({point.label: config for point, config in plan.configs.items()}, plan.bench.baseline or ())
    done = differing = 0

    def show(row: PeerRecord, total: int) -> None:
        nonlocal done, differing
        done += 1
        differing += row.contender in found.labels and not row.identical
        tpot = "" if row.tpot_ms is None else f", TPOT {row.tpot_ms:.1f} ms"
        same = "" if row.identical else f", differs from token {row.first_divergence}"
        tell(f"[{done}/{total}] {row.contender} {row.request_id}: {counted(row.generated_tokens, 'token')}{tpot}{same}")

    def tell(line: str) -> None:
        print(line, flush=True)

    configs = [plan.configs[point] for point in plan.points]
    found = connect(args, plan.bench, configs, read=(plan.prompts, plan.inputs["prompts"]))
    table = run_race(
        list(map(Ours, found.labels, found.configs, found.workers)),
        peers,
        {"target": args.target_model, "draft": args.draft_model},
        found.requests,
        plan.bench,
        args.results_dir,
        found.run,
        found.decides | {"code": code_sha256("race")},
        on_start=tell,
        on_row=show,
    )
    print(table)
    if not args.only:
        print(*import_module("specsplit.analysis.peers_table").write_peers(args.results_dir), sep="\n")
        if differing:
            raise RunError(f"{counted(differing, 'text of ours differs', 'texts of ours differ')} from the target's")
