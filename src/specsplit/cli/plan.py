"""What `specsplit bench` is about to run, checked before anything runs."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specsplit import tracing
from specsplit.cli.flags import load_settings
from specsplit.errors import UserError
from specsplit.experiment.dataset import read_prompt_file, select_prompts, tell
from specsplit.experiment.prompt import Prompt
from specsplit.experiment.sweep import SHARED_DEFAULTS, Point, sweep_points
from specsplit.io import sha256_file
from specsplit.settings.measure import BenchSettings, PromptSettings
from specsplit.settings.run import OrchestratorConfig, SweepSettings

if TYPE_CHECKING:
    from specsplit.models.tokenizer import TextCodec


@dataclass(frozen=True)
class Plan:
    """config: what all points share. inputs: what run.json says of files read."""

    config: OrchestratorConfig
    bench: BenchSettings
    points: list[Point]
    configs: dict[Point, OrchestratorConfig]
    prompts: list[Prompt]
    codec: TextCodec
    inputs: dict[str, Any]


def plan_bench(args: argparse.Namespace) -> Plan:
    """The points, settings and prompts that the flags of `bench` ask for. Raises UserError."""
    from specsplit.experiment.runner import encode_prompts

    sweep, bench = load_settings(SweepSettings, args), load_settings(BenchSettings, args)
    axes = {axis: values[0] for axis, values in sweep.model_dump(exclude_none=True).items()}
    config = load_settings(OrchestratorConfig, args, **axes)
    tracing.wanted()  # tells at once what it lacks
    codec = load_codec(config)
    points = sweep_points(
        sweep.gamma if args.only and not bench.baseline else [0, *sweep.gamma],
        sweep.mode or [config.mode],
        sweep.tree or [config.tree],
        sweep.temperature or [config.temperature],
        sweep.rtt_ms or [config.rtt_ms],
        [config.draft_name],
        sweep.bandwidth_mbit or [config.bandwidth_mbit],
    )
    shared = {key: getattr(config, key) for key in SHARED_DEFAULTS}
    # Every point is checked before the first one is run.
    configs = {point: load_settings(OrchestratorConfig, args, **point.settings(shared)) for point in points}
    prompts = read_prompts(args.prompts, bench)
    encode_prompts(prompts, codec, chat=config.use_chat_template, limit=sys.maxsize)
    inputs = {"prompts": {"path": str(args.prompts), "sha256": sha256_file(args.prompts), "count": len(prompts)}}
    return Plan(config, bench, points, configs, prompts, codec, inputs)


def load_codec(config: OrchestratorConfig) -> TextCodec:
    """The tokenizer of the settings; UserError when none is named."""
    from specsplit.models.sources import tokenizer_folder
    from specsplit.models.tokenizer import TextCodec

    if config.tokenizer is None:
        raise UserError("--tokenizer is missing: the folder of a prepared model, or any local tokenizer folder")
    return TextCodec.load(tokenizer_folder(config.tokenizer))


def connected_configs(
    args: argparse.Namespace, gammas: list[Any], config: OrchestratorConfig, codec: TextCodec
) -> tuple[list[OrchestratorConfig], tuple[int, bool], list[dict[str, Any]]]:
    """The settings at each gamma, with the addresses of workers that answered and fit together.

    Returns them with the longest text that all of these workers can hold (and whether a setting limits it), and with
    what the workers are.
    """
    from specsplit.client.handshake import connected_pair, text_limit
    from specsplit.experiment.runner import worker_identity
    from specsplit.launch.endpoint import description_dict

    configs, limits, identities = [], [], []
    for point in sweep_points(gammas, [config.mode], [config.tree], drafts=[config.draft_name]):
        own = with_addresses(config.model_copy(update={"gamma": point.gamma}), args.workers_dir, point)
        with connected_pair(own, codec.sha256) as workers:
            descriptions = [worker.description for worker in workers if worker is not None]
            limits.append(text_limit(*descriptions))
            identities += [worker_identity(description_dict(description)) for description in descriptions]
        configs.append(own)
    return configs, min(limits), identities


def describe_texts(
    prompts: Path, codec: TextCodec, config: OrchestratorConfig, workers: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the run file of a measurement beside a sweep says of its texts. workers: of `connected_configs`."""
    return {
        "inputs": {"prompts": {"path": str(prompts), "sha256": sha256_file(prompts)}},
        "tokenizer_sha256": codec.sha256,
        "orchestrator": config.model_dump(mode="json"),
        "ours": {str(number): {"workers": {worker["role"]: worker}} for number, worker in enumerate(workers)},
    }


def with_addresses(config: OrchestratorConfig, workers_dir: Path | None, point: Point) -> OrchestratorConfig:
    """The settings with the addresses in the endpoint files of a point, or with those that they have, resolved.

    Where nothing is drafted the address of the draft worker is left as it is.
    """
    from specsplit.launch.endpoint import resolve_address

    found = {}
    for role in ("target", "draft") if point.gamma != 0 else ("target",):
        file = None if workers_dir is None else workers_dir / point.label / f"{role}.json"
        found[f"{role}_address"] = resolve_address(str(file or getattr(config, f"{role}_address")))
    return config.model_copy(update=found)


def read_prompts(path: Path, settings: PromptSettings) -> list[Prompt]:
    """The prompts of a file that the settings take; what was not taken is told on standard error."""
    file = read_prompt_file(path, settings.on_bad_line, settings.columns, settings.turns)
    for line in file.skipped:
        print(f"{path}:{line.line}: skipped: {line.reason}", file=sys.stderr)
    for said in tell(path, [], file.facts):
        print(said, file=sys.stderr)
    return select_prompts(file.prompts, settings.limit)
