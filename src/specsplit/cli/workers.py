"""specsplit worker | start-worker | stop-worker"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specsplit import logs
from specsplit.cli.flags import add_setting_flags, load_settings, setting_arguments
from specsplit.errors import UserError
from specsplit.io import read_json_object
from specsplit.launch.lease import end_with_lease
from specsplit.settings.processes import (
    AccessSettings,
    DraftWorkerConfig,
    OrchestratorConfig,
    TargetWorkerConfig,
    WorkerSettings,
)

if TYPE_CHECKING:
    from specsplit.launch.endpoint import Endpoint

ROLES: dict[str, type[WorkerSettings]] = {"draft": DraftWorkerConfig, "target": TargetWorkerConfig}


def add_commands(subparsers: Any) -> None:
    worker = subparsers.add_parser("worker", help="serve a draft or target model over gRPC until SIGTERM")
    roles = worker.add_subparsers(dest="role", required=True, metavar="ROLE")
    for role, settings in ROLES.items():
        parser = roles.add_parser(role, help=f"serve the {role} model")
        parser.add_argument(
            "--endpoint-file", type=Path, help="written when the worker serves; deleting it stops the worker"
        )
        parser.add_argument(
            "--users-file", type=Path, help="lists endpoint files; the worker stops when none of them exists"
        )
        _add_layers_file(parser, role)
        _add_log_format(parser)
        add_setting_flags(parser, settings)
        parser.set_defaults(run=run_worker)

    start = subparsers.add_parser("start-worker", help="start a worker in the background, or attach to a running one")
    roles = start.add_subparsers(dest="role", required=True, metavar="ROLE")
    for role in ROLES:
        parser = roles.add_parser(role, help=f"the {role} worker")
        parser.add_argument("--endpoint-file", type=Path, required=True, help="where to write address and identity")
        parser.add_argument("--worker-log", type=Path, required=True, help="file for what the worker prints")
        parser.add_argument(
            "--pool", type=Path, help="folder of workers to share: use one started with the same flags if it runs"
        )
        add_gpus_flag(parser)
        _add_start_flags(parser, role)
        parser.set_defaults(run=run_start_worker)

    stop = subparsers.add_parser("stop-worker", help="stop a worker that start-worker started")
    stop.add_argument("endpoint_file", type=Path, help="its endpoint file")
    stop.set_defaults(run=run_stop_worker)


def run_worker(args: argparse.Namespace) -> None:
    from specsplit.launch.environment import ensure_deterministic_environment

    ensure_deterministic_environment()
    # Loading takes a minute at times: nobody waits for it any more when the holder of the lease is gone.
    serves = end_with_lease()
    _read_layers_file(args)
    config = load_settings(ROLES[args.role], args)
    from transformers.utils import logging as transformers_logging

    from specsplit.worker.server import serve

    transformers_logging.disable_progress_bar()
    if logs.is_json():
        transformers_logging.disable_default_handler()
        transformers_logging.enable_propagation()
    serve(config, endpoint_file=args.endpoint_file, users_file=args.users_file, on_loaded=serves)


def run_start_worker(args: argparse.Namespace) -> None:
    endpoint = _start(args.role, args, args.endpoint_file, args.worker_log, gpus=args.gpus, pool=args.pool)
    if endpoint.attached:
        print(f"attached to the {args.role} worker at {endpoint.address}")
    else:
        print(f"{args.role} worker, process {endpoint.pid}, serves at {endpoint.address}")


def own_worker(role: str, flags: str, *, gpus: int = 0) -> Callable[[Path], Endpoint]:
    """What starts a worker for `own_workers` from the flags of start-worker in one string.

    Raises UserError, before anything is started, for flags that are none of a worker.
    """
    parser = argparse.ArgumentParser(prog=f"--start-{role}", add_help=False, exit_on_error=False)
    parser.add_argument("--worker-log", type=Path, default=None)
    _add_start_flags(parser, role)
    try:
        args, unknown = parser.parse_known_args(shlex.split(flags))
    except (argparse.ArgumentError, ValueError) as error:
        raise UserError(f"--start-{role}: {error}; it takes the flags of `specsplit start-worker {role}`") from None
    if unknown:
        raise UserError(f"--start-{role}: {unknown[0]} is no flag of `specsplit start-worker {role}`")
    return lambda file: _start(role, args, file, args.worker_log or file.with_suffix(".log"), gpus=gpus)


def _start(
    role: str, args: argparse.Namespace, endpoint_file: Path, worker_log: Path, *, gpus: int, pool: Path | None = None
) -> Endpoint:
    """Start the worker that the flags describe, or attach to the one that they name."""
    from specsplit.launch.environment import own_gpu
    from specsplit.launch.start import attach_worker, share_worker, start_worker
    from specsplit.rpc.credentials import Access

    settings = ROLES[role]
    _read_layers_file(args)
    config = load_settings(settings, args)
    if config.model is None:
        raise UserError("--model is missing: the folder of a prepared model, or any local Hugging Face model")
    if args.attach:
        return attach_worker(
            role,
            args.attach,
            endpoint_file=endpoint_file,
            model=config.model,
            dtype=config.dtype,
            skip_layers=getattr(config, "skip_layers", []),
            access=Access.of(OrchestratorConfig.load({key: getattr(args, key) for key in AccessSettings.model_fields})),
        )
    # A fixed port may be taken; the endpoint file says which one it got.
    config = load_settings(settings, args, port=args.port or 0)
    log_format = ["--log-format", args.log_format] if args.log_format else []
    launch = partial(share_worker, pool=pool) if pool else start_worker
    return launch(
        role,
        [*setting_arguments(config, list(settings.model_fields)), *log_format],
        endpoint_file=endpoint_file,
        log_file=worker_log,
        timeout_s=args.startup_timeout_s,
        cuda_devices=own_gpu(role, gpus, os.environ.get("CUDA_VISIBLE_DEVICES")),
    )


def add_gpus_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpus",
        type=int,
        choices=(0, 1, 2),
        default=0,
        help="GPUs for both workers that are started, from CUDA_VISIBLE_DEVICES: 1 is shared, of 2 each has its own "
        "(default: 0, leave the variable as it is)",
    )


def _add_start_flags(parser: argparse.ArgumentParser, role: str) -> None:
    parser.add_argument("--startup-timeout-s", type=float, default=300.0, help="seconds to wait until it serves")
    parser.add_argument(
        "--attach",
        metavar="ADDRESS",
        help="use this running worker instead, host:port or an address file; it is checked and never stopped",
    )
    _add_layers_file(parser, role)
    _add_log_format(parser)
    add_setting_flags(parser, ROLES[role])


def _add_log_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-format",
        choices=logs.FORMATS,
        help=f"of the worker's log: text, or an object of JSON a line (default: {logs.VARIABLE}, or text)",
    )


def _add_layers_file(parser: argparse.ArgumentParser, role: str) -> None:
    if role == "draft":
        parser.add_argument(
            "--skip-layers-file",
            type=Path,
            metavar="FILE",
            help="instead of --skip-layers: what `specsplit pick-layers` wrote",
        )


def _read_layers_file(args: argparse.Namespace) -> None:
    """Put the layers that --skip-layers-file names where --skip-layers would."""
    path: Path | None = getattr(args, "skip_layers_file", None)
    if path is None:
        return
    if args.skip_layers is not None:
        raise UserError("--skip-layers and --skip-layers-file: give one of them")
    layers = read_json_object(path).get("layers")
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise UserError(f"{path}: holds no `layers`, a list of whole numbers; `specsplit pick-layers` writes it")
    args.skip_layers = layers


def run_stop_worker(args: argparse.Namespace) -> None:
    from specsplit.launch.start import stop_worker

    endpoint = stop_worker(args.endpoint_file)
    if endpoint is None:
        print(f"{args.endpoint_file} is not there: nothing to stop")
    elif endpoint.attached:
        print(f"{args.endpoint_file} deleted; the worker at {endpoint.address} runs on, for it was attached to")
    elif endpoint.shared:
        print(f"{args.endpoint_file} deleted; the worker at {endpoint.address} stops when nobody uses it any more")
    else:
        print(f"stopped process {endpoint.pid}")
