"""Flags that worker, start-worker and bench share."""

from __future__ import annotations

import argparse

from specsplit import logs
from specsplit.errors import UserError
from specsplit.io import read_json_object
from specsplit.settings.worker import DraftWorkerConfig, WorkerSettings


def add_gpus_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpus",
        type=int,
        choices=(0, 1, 2),
        default=0,
        help="GPUs for both workers that are started, from CUDA_VISIBLE_DEVICES: 1 is shared, of 2 each has its own "
        "(default: 0, leave the variable as it is)",
    )


def add_log_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-format",
        choices=logs.FORMATS,
        help=f"of the worker's log: text, or an object of JSON a line (default: {logs.VARIABLE}, or text)",
    )


def with_layers(config: WorkerSettings) -> WorkerSettings:
    """The settings with the layers that skip_layers_file names in skip_layers."""
    if not isinstance(config, DraftWorkerConfig) or config.skip_layers_file is None:
        return config
    path = config.skip_layers_file
    if config.skip_layers:
        raise UserError("--skip-layers and --skip-layers-file: give one of them")
    layers = read_json_object(path).get("layers")
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise UserError(f"{path}: holds no `layers`, a list of whole numbers; `specsplit pick-layers` writes it")
    return config.model_copy(update={"skip_layers": layers, "skip_layers_file": None})
