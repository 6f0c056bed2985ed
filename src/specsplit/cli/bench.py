"""specsplit bench"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

from specsplit.cli.flags import add_setting_flags
from specsplit.cli.sweep_flags import SWEEP_SETTINGS, parse_gamma
from specsplit.cli.worker_flags import ROLES, add_gpus_flag
from specsplit.decoding.tree import TreeShape
from specsplit.experiment.peers import Peer
from specsplit.experiment.sweep import MODES
from specsplit.settings.processes import OrchestratorConfig

DEFAULT_GAMMAS = (1, 3, 5, 8, 12)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL file of prompts")
    parser.add_argument("--results-dir", type=Path, required=True, help="runs go to DIR/runs/POINT, tables to DIR")
    parser.add_argument(
        "--gamma",
        type=parse_gamma,
        nargs="+",
        default=list(DEFAULT_GAMMAS),
        metavar="N",
        help="draft lengths, or auto; gamma 0, the target alone, is always run as well (default: 1 3 5 8 12)",
    )
    # The other axes. Not given, each is what the environment or the default of the setting says.
    parser.add_argument("--mode", dest="modes", choices=MODES, nargs="+", help="pipeline modes")
    parser.add_argument(
        "--tree", dest="trees", type=_tree, nargs="+", help="shapes of the draft: chain, 3x2, dynamic-16x4"
    )
    parser.add_argument("--temperature", dest="temperatures", type=float, nargs="+", metavar="T", help="0 = greedy")
    parser.add_argument(
        "--rtt-ms", dest="rtts_ms", type=float, nargs="+", metavar="MS", help="simulated round-trip times to the target"
    )
    parser.add_argument("--limit", type=int, help="take a stratified slice of this many prompts (default: all)")
    parser.add_argument("--on-bad-line", choices=("stop", "skip"), default="stop", help="what a bad prompt line does")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="requests run before the clock starts")
    parser.add_argument("--fresh", action="store_true", help="measure anew what an unfinished run has measured")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="times that every request is measured")
    parser.add_argument(
        "--only",
        action="store_true",
        help="run just the points named and write no tables of all of them (the workflow does)",
    )
    race = parser.add_argument_group("race (with --baseline: peers_requests.csv and peers.csv instead of runs)")
    race.add_argument(
        "--baseline",
        dest="baselines",
        type=_peer,
        nargs="+",
        metavar="PEER",
        help="race each point, request by request in turn, against Hugging Face's generate, assisted (or assisted-N: "
        "drafts of N tokens) and prompt-lookup",
    )
    race.add_argument("--target-model", type=Path, metavar="FOLDER", help="what the target worker serves")
    race.add_argument("--draft-model", type=Path, metavar="FOLDER", help="what the draft worker serves (assisted)")
    race.add_argument(
        "--workers-dir",
        type=Path,
        metavar="DIR",
        help="endpoint files DIR/POINT/ROLE.json, for points with workers of their own, instead of the two addresses",
    )
    parser.add_argument(
        "--terminal-fd", type=int, metavar="N", help="show a bar on the terminal behind this descriptor as well"
    )
    for role in ROLES:
        parser.add_argument(
            f"--start-{role}",
            metavar="FLAGS",
            help=f"start a {role} worker with these flags of start-worker for this call alone, and stop it again",
        )
    add_gpus_flag(parser)
    add_setting_flags(parser, OrchestratorConfig, only=SWEEP_SETTINGS)


def run(args: argparse.Namespace) -> None:
    from specsplit.launch.environment import ensure_deterministic_environment

    ensure_deterministic_environment()
    from specsplit.cli.plan import plan_bench
    from specsplit.cli.start_worker import own_worker
    from specsplit.client.handshake import connected_pair
    from specsplit.experiment.progress import Progress
    from specsplit.experiment.runner import encode_prompts, run_requests
    from specsplit.launch.endpoint import resolve_address, worker_origin
    from specsplit.launch.start import own_workers

    plan = plan_bench(args)
    if args.baselines:
        import_module("specsplit.cli.race").run_race(args, plan)
        return
    points, config = plan.points, plan.config
    run_dirs = {point: args.results_dir / "runs" / point.label for point in points}
    drafting = [point for point in points if point.gamma != 0]
    roles = [role for role in ROLES if role == "target" or drafting]
    starts = {
        role: own_worker(role, getattr(args, f"start_{role}"), gpus=args.gpus)
        for role in roles
        if getattr(args, f"start_{role}")
    }
    with ExitStack() as stack:
        started = stack.enter_context(own_workers(starts)) if starts else {}
        resolved, origins = {}, {}
        for role in roles:
            address = getattr(config, f"{role}_address")
            own = started.get(role)
            resolved[f"{role}_address"] = own.address if own else resolve_address(address)
            origins[role] = own.origin() if own else worker_origin(address)
        # A point that drafts, if there is one, decides whether a draft worker is needed.
        first = plan.configs[(drafting or points)[0]].model_copy(update=resolved)
        draft, target = stack.enter_context(connected_pair(first, plan.codec.sha256))
        limit = target.description.max_context
        requests = encode_prompts(plan.prompts, plan.codec, chat=config.use_chat_template, limit=limit)
        with Progress(len(points) * len(requests) * args.repeats, args.terminal_fd) as progress:
            for point in points:
                run_requests(
                    requests,
                    draft if point in drafting else None,
                    target,
                    plan.codec,
                    plan.configs[point].model_copy(update=resolved),
                    run_dirs[point],
                    warmup=args.warmup,
                    repeats=args.repeats,
                    inputs=plan.inputs,
                    origins=origins,
                    resume=not args.fresh,
                    on_kept=progress.kept,
                    on_done=progress.done,
                )
    if not args.only:
        args.run_dirs = list(run_dirs.values())
        import_module("specsplit.cli.merge").run(args)
        print(f"next: specsplit analyze --results-dir {args.results_dir}")


def _peer(text: str) -> Peer:
    try:
        return Peer.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _tree(text: str) -> str:
    try:
        return str(TreeShape.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
