"""Flags that worker, start-worker and bench share."""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit import logs
from specsplit.cli.flags import add_setting_flags
from specsplit.errors import UserError
from specsplit.io import read_json_object
from specsplit.settings.processes import DraftWorkerConfig, TargetWorkerConfig, WorkerSettings

ROLES: dict[str, type[WorkerSettings]] = {"draft": DraftWorkerConfig, "target": TargetWorkerConfig}


def add_gpus_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpus",
        type=int,
        choices=(0, 1, 2),
        default=0,
        help="GPUs for both workers that are started, from CUDA_VISIBLE_DEVICES: 1 is shared, of 2 each has its own "
        "(default: 0, leave the variable as it is)",
    )


def add_start_flags(parser: argparse.ArgumentParser, role: str) -> None:
    parser.add_argument("--startup-timeout-s", type=float, default=300.0, help="seconds to wait until it serves")
    parser.add_argument(
        "--attach",
        metavar="ADDRESS",
        help="use this running worker instead, host:port or an address file; it is checked and never stopped",
    )
    add_layers_file(parser, role)
    add_log_format(parser)
    add_setting_flags(parser, ROLES[role])


def add_log_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-format",
        choices=logs.FORMATS,
        help=f"of the worker's log: text, or an object of JSON a line (default: {logs.VARIABLE}, or text)",
    )


def add_layers_file(parser: argparse.ArgumentParser, role: str) -> None:
    if role == "draft":
        parser.add_argument(
            "--skip-layers-file",
            type=Path,
            metavar="FILE",
            help="instead of --skip-layers: what `specsplit pick-layers` wrote",
        )


def read_layers_file(args: argparse.Namespace) -> None:
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
