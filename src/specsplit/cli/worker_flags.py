"""What commands that start workers share: flags, and workers of one command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from specsplit import logs
from specsplit.errors import UserError
from specsplit.io import read_json_object
from specsplit.settings.run import OrchestratorConfig
from specsplit.settings.worker import ROLES, DraftWorkerConfig, WorkerSettings

if TYPE_CHECKING:
    from specsplit.launch.endpoint import Endpoint


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


@contextmanager
def workers_for(
    models: Mapping[str, Path], config: OrchestratorConfig, *, max_sessions: int | None = None, again: bool = False
) -> Iterator[OrchestratorConfig]:
    """The settings with the addresses of workers: those started on these models, by role, which are stopped at the
    end, or without models those that the settings name. again: those that die are started again, at their address."""
    from specsplit.engines.loading import check_model
    from specsplit.launch.endpoint import resolve_address
    from specsplit.launch.environment import threads_beside_another
    from specsplit.launch.start import own_workers, start_worker

    ports: dict[str, str] = {}

    def start(role: str, file: Path) -> Endpoint:
        print(f"starting the {role} worker ...", file=sys.stderr)
        arguments = ["--model", str(models[role]), "--port", ports.get(role, "0")]
        if role == "draft" and models["target"] != models["draft"]:
            arguments += ["--target-tokenizer", str(models["target"])]
        if config.gamma != 0 and config.mode != "sync":  # both compute at once
            arguments += ["--threads", str(threads_beside_another())]
        if max_sessions is not None:
            arguments += ["--max-sessions", str(max_sessions)]
        found = start_worker(role, arguments, endpoint_file=file, timeout_s=300.0)
        ports[role] = found.address.rpartition(":")[2]
        return found

    for role, model in models.items():  # before the first of them is started
        check_model(ROLES[role].load({"model": model}))
    with own_workers({role: partial(start, role) for role in models}, again=again) as started:
        addresses = {role: endpoint.address for role, endpoint in started.items()}
        if not models:
            addresses = {role: getattr(config, f"{role}_address") for role in ("draft", "target")}
        resolved = {f"{role}_address": resolve_address(address) for role, address in addresses.items()}
        yield config.model_copy(update=resolved)
