"""specsplit bench | merge | analyze | profile"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from specsplit.cli.flags import add_interval_flags, add_setting_flags, interval_settings
from specsplit.cli.workers import ROLES, add_gpus_flag, own_worker
from specsplit.decoding.tree import TreeShape
from specsplit.errors import UserError
from specsplit.experiment.peers import Peer
from specsplit.experiment.sweep import AUTO, MODES, SHARED_DEFAULTS
from specsplit.settings.processes import MAX_GAMMA, AccessSettings, OrchestratorConfig

BENCH_SETTINGS = (
    "draft_address",
    "target_address",
    "tokenizer",
    "draft_name",
    *SHARED_DEFAULTS,
    "max_output_tokens",
    "max_rounds",
    "use_chat_template",
    "ignore_eos",
    *AccessSettings.model_fields,
    "tls_name",
    "connect_timeout_s",
    "rpc_timeout_s",
    "recovery_timeout_s",
    "on_draft_failure",
    "seed",
)
DEFAULT_GAMMAS = (1, 3, 5, 8, 12)


def add_commands(subparsers: Any) -> None:
    bench = subparsers.add_parser("bench", help="run prompts against two workers at every point of a sweep")
    bench.add_argument("--prompts", type=Path, required=True, help="JSONL file of prompts")
    bench.add_argument("--results-dir", type=Path, required=True, help="runs go to DIR/runs/POINT, tables to DIR")
    bench.add_argument(
        "--gamma",
        type=parse_gamma,
        nargs="+",
        default=list(DEFAULT_GAMMAS),
        metavar="N",
        help="draft lengths, or auto; gamma 0, the target alone, is always run as well (default: 1 3 5 8 12)",
    )
    # The other axes. Not given, each is what the environment or the default of the setting says.
    bench.add_argument("--mode", dest="modes", choices=MODES, nargs="+", help="pipeline modes")
    bench.add_argument(
        "--tree", dest="trees", type=_tree, nargs="+", help="shapes of the draft: chain, 3x2, dynamic-16x4"
    )
    bench.add_argument("--temperature", dest="temperatures", type=float, nargs="+", metavar="T", help="0 = greedy")
    bench.add_argument(
        "--rtt-ms", dest="rtts_ms", type=float, nargs="+", metavar="MS", help="simulated round-trip times to the target"
    )
    bench.add_argument("--limit", type=int, help="take a stratified slice of this many prompts (default: all)")
    bench.add_argument("--on-bad-line", choices=("stop", "skip"), default="stop", help="what a bad prompt line does")
    bench.add_argument("--warmup", type=int, default=1, metavar="N", help="requests run before the clock starts")
    bench.add_argument("--fresh", action="store_true", help="measure anew what an unfinished run has measured")
    bench.add_argument("--repeats", type=int, default=1, metavar="N", help="times that every request is measured")
    bench.add_argument(
        "--only",
        action="store_true",
        help="run just the points named and write no tables of all of them (the workflow does)",
    )
    race = bench.add_argument_group("race (with --baseline: peers_requests.csv and peers.csv instead of runs)")
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
    bench.add_argument(
        "--terminal-fd", type=int, metavar="N", help="show a bar on the terminal behind this descriptor as well"
    )
    for role in ROLES:
        bench.add_argument(
            f"--start-{role}",
            metavar="FLAGS",
            help=f"start a {role} worker with these flags of start-worker for this call alone, and stop it again",
        )
    add_gpus_flag(bench)
    add_setting_flags(bench, OrchestratorConfig, only=BENCH_SETTINGS)
    bench.set_defaults(run=run_bench)

    merge = subparsers.add_parser("merge", help="put run folders together into requests.csv and per_round.csv")
    merge.add_argument("--results-dir", type=Path, required=True)
    merge.add_argument("run_dirs", type=Path, nargs="*", help="run folders (default: DIR/runs/*)")
    merge.set_defaults(run=run_merge)

    analyze = subparsers.add_parser("analyze", help="summary.csv and figures from requests.csv and per_round.csv")
    analyze.add_argument("--results-dir", type=Path, required=True)
    add_interval_flags(analyze)
    analyze.add_argument("--no-figures", action="store_true", help="write the summary alone")
    analyze.set_defaults(run=run_analyze)

    profile = subparsers.add_parser("profile", help="where a round's time goes, from requests.csv and per_round.csv")
    profile.add_argument("--results-dir", type=Path, required=True, help="for profile.csv and figures/profile.png")
    profile.set_defaults(run=run_profile)


def run_bench(args: argparse.Namespace) -> None:
    from specsplit.launch.environment import ensure_deterministic_environment

    ensure_deterministic_environment()
    from specsplit.cli.plan import plan_bench
    from specsplit.client.handshake import connected_pair
    from specsplit.experiment.progress import Progress
    from specsplit.experiment.runner import encode_prompts, run_requests
    from specsplit.launch.endpoint import resolve_address, worker_origin
    from specsplit.launch.start import own_workers

    plan = plan_bench(args)
    if args.baselines:
        from specsplit.cli.peers import run_race

        run_race(args, plan)
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
        run_merge(args)
        print(f"next: specsplit analyze --results-dir {args.results_dir}")


def run_merge(args: argparse.Namespace) -> None:
    from specsplit.analysis.tables import merge_runs, write_csv

    run_dirs = args.run_dirs or sorted((args.results_dir / "runs").glob("*"))
    if not run_dirs:
        raise UserError(f"{args.results_dir / 'runs'} has no run folders; make them with `specsplit bench`")
    requests, rounds = merge_runs(run_dirs)
    for name, frame in (("requests.csv", requests), ("per_round.csv", rounds)):
        write_csv(frame, args.results_dir / name)
        print(f"{args.results_dir / name}: {len(frame)} rows")


def run_analyze(args: argparse.Namespace) -> None:
    from specsplit.analysis.findings import faults_sentence, find_best, lossless_sentence, summary_table, text_table
    from specsplit.analysis.tables import read_tables, summarize, write_csv

    settings = interval_settings(args)
    requests, rounds = read_tables(args.results_dir)
    summary = summarize(requests, rounds, **settings)
    write_csv(summary, args.results_dir / "summary.csv")
    if not args.no_figures:
        from specsplit.analysis.figures import draw_figures

        for path in draw_figures(requests, rounds, args.results_dir / "figures", **settings):
            print(path)
    print(args.results_dir / "summary.csv")
    count = requests["request_id"].nunique()
    prompts = "1 prompt" if count == 1 else f"{count} prompts"
    print(f"\n{prompts}; [{100 * args.confidence:g} % interval]; γ = 0 is the target alone\n")
    print(text_table(*summary_table(summary)))
    print()
    for finding in find_best(requests, rounds, summary, **settings):
        print(f"{finding.where or 'Best'}:", *finding.sentences())
    print("Lossless:", lossless_sentence(summary))
    if faults := faults_sentence(summary):
        print("Faults:", faults)


def run_profile(args: argparse.Namespace) -> None:
    from specsplit.analysis.profile import PARTS, draw_profile, profile
    from specsplit.analysis.tables import finished, read_tables, write_csv
    from specsplit.settings.axes import CONFIGURATION

    table = profile(finished(*read_tables(args.results_dir))[1])
    for path in draw_profile(table, args.results_dir / "figures" / "profile.png"):
        print(path)
    write_csv(table, args.results_dir / "profile.csv")
    print(args.results_dir / "profile.csv")
    varied = [name for name in CONFIGURATION if name == "gamma" or table[name].nunique() > 1]
    shown = table.loc[table["phase"] == "decode", [*varied, "rounds", "round_ms", *PARTS, "ms_per_token"]]
    print("Means of a round, without the first of each text:")
    print(shown.to_string(index=False, float_format="{:.2f}".format))


def _peer(text: str) -> Peer:
    try:
        return Peer.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_gamma(text: str) -> int | str:
    """A draft length of the command line: a number or auto."""
    if text == AUTO:
        return text
    if not text.isdigit() or int(text) > MAX_GAMMA:
        raise argparse.ArgumentTypeError(f"{text!r} is not a draft length from 0 to {MAX_GAMMA}, nor auto")
    return int(text)


def _tree(text: str) -> str:
    try:
        return str(TreeShape.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
