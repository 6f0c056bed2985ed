"""What `specsplit bench`, or a measurement beside a sweep, is about to run, checked before anything runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specsplit import tracing
from specsplit.cli.flags import load_settings
from specsplit.errors import UserError
from specsplit.experiment.dataset import read_prompt_file, select_prompts, tell
from specsplit.experiment.prompt import Prompt
from specsplit.experiment.sweep import SHARED_DEFAULTS, Point, sweep_points
from specsplit.settings.measure import BenchSettings, PromptSettings
from specsplit.settings.run import OrchestratorConfig, SweepSettings

if TYPE_CHECKING:
    from specsplit.experiment.records import Request
    from specsplit.models.tokenizer import TextCodec
    from specsplit.rpc.connection import Connection


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
    from specsplit.experiment.records import encode_prompts

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
    prompts, read = read_prompts(args.prompts, bench)
    encode_prompts(prompts, codec, chat=config.use_chat_template, limit=sys.maxsize)
    inputs = {"prompts": {**read, "count": len(prompts)}}
    return Plan(config, bench, points, configs, prompts, codec, inputs)


def load_codec(config: OrchestratorConfig) -> TextCodec:
    """The tokenizer of the settings; UserError when none is named."""
    from specsplit.models.sources import tokenizer_folder
    from specsplit.models.tokenizer import TextCodec

    if config.tokenizer is None:
        raise UserError("--tokenizer is missing: the folder of a prepared model, or any local tokenizer folder")
    return TextCodec.load(tokenizer_folder(config.tokenizer))


@dataclass(frozen=True)
class Connected:
    """What a measurement beside a sweep runs: texts, and workers that answered and fit together.

    labels: of the points, as in `run`. configs: with the addresses of their workers. workers: of each, by role, closed.
    limit: tokens of the longest text that all of them can hold. run: what the run file says of all this. decides: what
    of it decides the rows.
    """

    codec: TextCodec
    labels: list[str]
    configs: list[OrchestratorConfig]
    workers: list[dict[str, Connection]]
    limit: int
    prompts: list[Prompt]
    requests: list[Request]
    run: dict[str, Any]
    decides: dict[str, Any]


def connect(
    args: argparse.Namespace,
    settings: PromptSettings,
    configs: Sequence[OrchestratorConfig],
    *,
    room: int = 0,
    own: Iterable[str] = (),
    read: tuple[list[Prompt], dict[str, Any]] | None = None,
) -> Connected:
    """Connect to the workers of each of these settings, once, and encode the prompts.

    room: tokens that a text needs beside its prompt. own: settings that the measurement has of its own, whatever those
    of the sweep are. read: what was read already of the file of prompts. Raises UserError.
    """
    from specsplit.client.handshake import connected_pair, text_limit
    from specsplit.experiment.records import encode_prompts
    from specsplit.experiment.run import describe_workers, worker_identities
    from specsplit.provenance.closure import code_sha256
    from specsplit.provenance.run_file import describe_here

    tracing.wanted()  # tells at once what it lacks
    codec = load_codec(configs[0])
    labels, addressed, workers = [], [], []
    for config in configs:
        (point,) = sweep_points([config.gamma], [config.mode], [config.tree], drafts=[config.draft_name])
        labels.append(point.label)
        addressed.append(with_addresses(config, args.workers_dir, point))
        with connected_pair(addressed[-1], codec.sha256) as pair:
            workers.append(pair)
    limit, _ = text_limit(*(worker.description for pair in workers for worker in pair.values()))
    # A draft with less room ends its drafts, not the text.
    longest, raisable = text_limit(*(pair["target"].description for pair in workers))
    prompts, about = read or read_prompts(args.prompts, settings)
    chat = configs[0].use_chat_template
    requests = encode_prompts(prompts, codec, chat=chat, limit=longest - room, raisable=raisable)
    settings_of = [config.model_dump(mode="json", exclude=set(own)) for config in addressed]
    run = describe_here() | {
        "inputs": {"prompts": about},
        "tokenizer_sha256": codec.sha256,
        "orchestrator": settings_of[0],
        "ours": {
            label: {"orchestrator": settings_of[number], "workers": describe_workers(workers[number])}
            for number, label in enumerate(labels)
        },
    }
    identities = dict(zip(labels, map(worker_identities, workers), strict=True))
    decides = {"workers": identities, "machine": run["machine"], "code": code_sha256(args.command)}
    return Connected(codec, labels, addressed, workers, limit, prompts, requests, run, decides)


def at_gammas(config: OrchestratorConfig, gammas: Iterable[int | str]) -> list[OrchestratorConfig]:
    """The settings at each of these gammas, once, as a sweep orders them."""
    return [config.model_copy(update={"gamma": point.gamma}) for point in sweep_points(gammas)]


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


def read_prompts(path: Path, settings: PromptSettings) -> tuple[list[Prompt], dict[str, Any]]:
    """The prompts of a file that the settings take, and its path and hash; what was not taken is told on stderr.

    The hash is of what was read, for the pipe of a shell can be read once.
    """
    file = read_prompt_file(path, settings.on_bad_line, settings.columns, settings.turns)
    for line in file.skipped:
        print(f"{path}:{line.line}: skipped: {line.reason}", file=sys.stderr)
    for said in tell(path, [], file.facts):
        print(said, file=sys.stderr)
    return select_prompts(file.prompts, settings.limit), {"path": str(path), "sha256": file.source_sha256}
