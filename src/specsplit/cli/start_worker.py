"""specsplit start-worker"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from specsplit.cli.flags import load_settings, setting_arguments
from specsplit.cli.worker_flags import ROLES, add_gpus_flag, add_start_flags, read_layers_file
from specsplit.errors import UserError
from specsplit.settings.processes import AccessSettings, OrchestratorConfig

if TYPE_CHECKING:
    from specsplit.launch.endpoint import Endpoint


def add_flags(parser: argparse.ArgumentParser) -> None:
    roles = parser.add_subparsers(dest="role", required=True, metavar="ROLE")
    for role in ROLES:
        own = roles.add_parser(role, help=f"the {role} worker")
        own.add_argument("--endpoint-file", type=Path, required=True, help="where to write address and identity")
        own.add_argument("--worker-log", type=Path, required=True, help="file for what the worker prints")
        own.add_argument(
            "--pool", type=Path, help="folder of workers to share: use one started with the same flags if it runs"
        )
        add_gpus_flag(own)
        add_start_flags(own, role)


def run(args: argparse.Namespace) -> None:
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
    add_start_flags(parser, role)
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
    read_layers_file(args)
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
