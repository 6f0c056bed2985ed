"""specsplit start-worker"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from specsplit.cli.flags import add_setting_flags, load_settings, setting_arguments, settings_part
from specsplit.cli.worker_flags import add_gpus_flag, add_log_format, with_layers
from specsplit.errors import UserError
from specsplit.settings.access import AccessSettings
from specsplit.settings.run import OrchestratorConfig
from specsplit.settings.worker import ROLES, LaunchSettings, WorkerSettings

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
        add_log_format(own)
        add_setting_flags(own, ROLES[role], LaunchSettings, part=role)


def run(args: argparse.Namespace) -> None:
    config, launch = load_settings(ROLES[args.role], args), load_settings(LaunchSettings, args)
    # A fixed port may be taken; the endpoint file says which one it got.
    config = config.model_copy(update={"port": int(args.port or 0)})
    own_access = {field: getattr(args, field) for field in AccessSettings.model_fields}
    run_part = {key: value for key, value in settings_part(args, "run").items() if key in own_access}
    endpoint = start(
        args.role,
        config,
        launch,
        OrchestratorConfig.load(own_access, run_part) if launch.attach else None,
        endpoint_file=args.endpoint_file,
        worker_log=args.worker_log,
        gpus=args.gpus,
        pool=args.pool,
        log_format=args.log_format,
    )
    if endpoint.attached:
        print(f"attached to the {args.role} worker at {endpoint.address}")
    else:
        print(f"{args.role} worker, process {endpoint.pid}, serves at {endpoint.address}")


def start(
    role: str,
    config: WorkerSettings,
    launch: LaunchSettings,
    client: OrchestratorConfig | None,
    *,
    endpoint_file: Path,
    worker_log: Path,
    gpus: int,
    pool: Path | None = None,
    log_format: str | None = None,
) -> Endpoint:
    """Start the worker of these settings, or attach to the one that they name; client: how we show who we are then."""
    from specsplit.launch.environment import own_gpu
    from specsplit.launch.start import attach_worker, share_worker, start_worker
    from specsplit.rpc.credentials import Access

    config = with_layers(config)
    if config.model is None:
        raise UserError("--model is missing: the folder of a prepared model, or any local Hugging Face model")
    if launch.attach:
        access = Access.of(client or OrchestratorConfig.load())
        return attach_worker(role, launch.attach, config, endpoint_file=endpoint_file, access=access)
    begin = partial(share_worker, pool=pool) if pool else start_worker
    flags = setting_arguments(config, list(type(config).model_fields))
    flags += ["--log-format", log_format] if log_format else []
    return begin(
        role,
        flags,
        endpoint_file=endpoint_file,
        log_file=worker_log,
        timeout_s=launch.startup_timeout_s,
        cuda_devices=own_gpu(role, gpus, os.environ.get("CUDA_VISIBLE_DEVICES")),
    )
