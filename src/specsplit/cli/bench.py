"""specsplit bench"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specsplit.cli.flags import add_setting_flags, settings_part
from specsplit.cli.measuring import add_prompts_flag, add_terminal_flag, add_workers_dir_flag
from specsplit.cli.worker_flags import add_gpus_flag
from specsplit.errors import UserError
from specsplit.settings.measure import BenchSettings
from specsplit.settings.run import OrchestratorConfig, SweepSettings
from specsplit.settings.worker import ROLES, LaunchSettings

if TYPE_CHECKING:
    from specsplit.experiment.baselines import Beside
    from specsplit.launch.endpoint import Endpoint
    from specsplit.rpc.connection import Connection
    from specsplit.rpc.v1.specsplit_pb2 import DescribeReply


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_prompts_flag(parser)
    parser.add_argument("--results-dir", type=Path, required=True, help="runs go to DIR/runs/POINT, tables to DIR")
    parser.add_argument("--fresh", action="store_true", help="measure anew what an unfinished run has measured")
    parser.add_argument(
        "--only",
        action="store_true",
        help="run just the points named and write no tables of all of them (the workflow does)",
    )
    models = parser.add_argument_group("models (for the pair in one process, --setups colocated, and for --baseline)")
    models.add_argument("--target-model", type=Path, metavar="FOLDER", help="what the target worker serves")
    models.add_argument("--draft-model", type=Path, metavar="FOLDER", help="what the draft worker serves")
    add_workers_dir_flag(parser)
    add_terminal_flag(parser)
    add_gpus_flag(parser)
    add_setting_flags(parser, SweepSettings, BenchSettings, OrchestratorConfig)


def run(args: argparse.Namespace) -> None:
    from specsplit.launch.environment import ensure_deterministic_environment

    ensure_deterministic_environment()
    from specsplit.cli.plan import plan_bench
    from specsplit.client.handshake import connected_pair, text_limit
    from specsplit.experiment.progress import Progress
    from specsplit.experiment.records import encode_prompts
    from specsplit.experiment.run import Run
    from specsplit.experiment.runner import run_requests
    from specsplit.launch.endpoint import resolve_address, worker_origin
    from specsplit.launch.start import own_workers

    plan = plan_bench(args)
    if plan.bench.baseline:
        import_module("specsplit.cli.race").race(args, plan)
        return
    points, config = plan.points, plan.config
    run_dirs = {point: args.results_dir / "runs" / point.label for point in points}
    drafting = [point for point in points if point.gamma != 0]
    roles = [role for role in ROLES if role == "target" or drafting]
    starts = {role: _own_worker(role, args, config, points[0].label) for role in roles if plan.bench.start_workers}
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
        workers = stack.enter_context(connected_pair(first, plan.codec.sha256))
        limit, raisable = text_limit(workers["target"].description)
        chat = config.use_chat_template
        requests = encode_prompts(plan.prompts, plan.codec, chat=chat, limit=limit, raisable=raisable, later_turns=True)
        shared = Run(
            requests,
            workers,
            plan.codec,
            config,
            warmup=plan.bench.warmup,
            repeats=plan.bench.repeats,
            inputs=plan.inputs,
            origins=origins,
            beside=_beside(args, plan.bench.setups, workers, stack),
        )
        with Progress(len(points) * len(requests) * plan.bench.repeats, args.terminal_fd) as progress:
            for point in points:
                needed = workers if point in drafting else {"target": workers["target"]}
                run = replace(shared, workers=needed, config=plan.configs[point].model_copy(update=resolved))
                run_requests(run, run_dirs[point], resume=not args.fresh, on_kept=progress.kept, on_done=progress.done)
    if not args.only:
        merging = import_module("specsplit.analysis.merging")  # no part of what decides a run
        print(*merging.write_merged(args.results_dir, list(run_dirs.values())), sep="\n")
        print(f"next: specsplit analyze --results-dir {args.results_dir}")


def _beside(
    args: argparse.Namespace, setups: Sequence[str], workers: Mapping[str, Connection], stack: ExitStack
) -> Beside:
    """What every run measures beside its own configuration; what cannot be is told on standard output."""
    from specsplit.api.pair import in_process_pair
    from specsplit.experiment.baselines import Beside

    if "colocated" not in setups:
        return Beside(setups)
    settings = {role: _model_settings(args, role, worker.description) for role, worker in workers.items()}
    reason, pair = "", None
    for role, worker in workers.items():
        if (host := worker.description.runtime.get("host")) != socket.gethostname():
            reason = f"the {role} worker is on another machine, {host}"
        elif "model" not in settings[role]:
            reason = f"the folder of the {role} worker's model is not known; say --{role}-model"
    if not reason:
        configs = {role: ROLES[role].load(file=values) for role, values in settings.items()}
        try:
            pair = in_process_pair(configs, {role: worker.description for role, worker in workers.items()})
        except (UserError, MemoryError, RuntimeError) as error:  # PyTorch's want of memory is a RuntimeError
            reason = f"the models cannot be loaded once more: {' '.join(str(error).split())}"
    if pair is not None:
        return Beside(setups, stack.enter_context(pair))
    print(f"colocated is not measured: {reason}", flush=True)
    return Beside([setup for setup in setups if setup != "colocated"], left_out={"colocated": reason})


def _model_settings(args: argparse.Namespace, role: str, worker: DescribeReply) -> dict[str, Any]:
    """How the model of a worker is loaded: as --settings says of that worker, or as it says itself."""
    values = {key: value for key, value in settings_part(args, role).items() if key in ROLES[role].model_fields}
    if values:
        return {**values, "dtype": worker.dtype}  # for a draft's auto, the one that it has there
    if (folder := getattr(args, f"{role}_model")) is None:
        return {}
    values = {"model": folder, **{key: getattr(worker, key) for key in ("dtype", "device", "threads", "max_context")}}
    if role == "target":
        values["ignore_model_settings"] = True  # as its worker did, which serves it
        if worker.states_given.projection_sha256:
            values["hidden_states_draft"] = args.draft_model
    if role == "draft":
        values |= {"skip_layers": list(worker.skip_layers), "target_tokenizer": args.target_model}
    return values


def _own_worker(
    role: str, args: argparse.Namespace, client: OrchestratorConfig, label: str
) -> Callable[[Path], Endpoint]:
    """What starts the worker that the files of --settings describe, with its log beside that of others."""
    from specsplit.cli.start_worker import start

    part = settings_part(args, role)
    own = {key: value for key, value in part.items() if key in LaunchSettings.model_fields}
    launch = LaunchSettings.load(file=own)
    config = ROLES[role].load({"port": 0}, {key: value for key, value in part.items() if key not in own})
    log = args.results_dir / "logs" / "workers" / f"{label}_{role}.log"
    return lambda file: start(role, config, launch, client, endpoint_file=file, worker_log=log, gpus=args.gpus)
