"""specsplit worker"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit import logs
from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.cli.worker_flags import add_log_format, with_layers
from specsplit.launch.lease import end_with_lease
from specsplit.settings.worker import ROLES


def add_flags(parser: argparse.ArgumentParser) -> None:
    roles = parser.add_subparsers(dest="role", required=True, metavar="ROLE")
    for role, settings in ROLES.items():
        own = roles.add_parser(role, help=f"serve the {role} model")
        own.add_argument(
            "--endpoint-file", type=Path, help="written when the worker serves; deleting it stops the worker"
        )
        own.add_argument(
            "--users-file", type=Path, help="lists endpoint files; the worker stops when none of them exists"
        )
        add_log_format(own)
        add_setting_flags(own, settings, part=role)


def run(args: argparse.Namespace) -> None:
    from specsplit.launch.environment import ensure_deterministic_environment

    ensure_deterministic_environment()
    # Loading may take a minute: end it when the holder of the lease is gone.
    serves = end_with_lease()
    config = with_layers(load_settings(ROLES[args.role], args))
    from transformers.utils import logging as transformers_logging

    from specsplit.worker.server import serve

    transformers_logging.disable_progress_bar()
    if logs.is_json():
        transformers_logging.disable_default_handler()
        transformers_logging.enable_propagation()
    serve(config, endpoint_file=args.endpoint_file, users_file=args.users_file, on_loaded=serves)
