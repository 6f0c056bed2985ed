"""A race from the models of the workers to its rows and its record: which peers, in which processes, on what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from specsplit.errors import UserError
from specsplit.experiment.dataset import Prompt
from specsplit.experiment.hugging_face import HuggingFace
from specsplit.experiment.llama_cpp import LlamaCpp
from specsplit.experiment.peer_fit import GivenModel, check_models, why_left_out
from specsplit.experiment.peer_race import SETTLE_S, Ours, PeerRecord, race
from specsplit.experiment.peers import LLAMA_CPP, Peer, PeerModel, PeerProcess
from specsplit.experiment.records import deciding
from specsplit.experiment.runner import encode_prompts, worker_identity
from specsplit.launch.endpoint import description_dict
from specsplit.models.fingerprint import gguf_weights
from specsplit.models.sources import resolve_model
from specsplit.models.tokenizer import TextCodec
from specsplit.provenance.capture import utc_now
from specsplit.provenance.closure import code_sha256
from specsplit.provenance.facts import beside_run
from specsplit.provenance.run_file import describe_here, write_run
from specsplit.settings.measure import BenchSettings
from specsplit.settings.run import NO_NETWORK


def check_race(ours: Mapping[str, Any], names: Sequence[str]) -> list[Peer]:
    """The peers of these names, if these points of ours (settings by label) can be raced against them."""
    for label, config in ours.items():
        if config.temperature or any(getattr(config, name) for name in NO_NETWORK):
            raise UserError(
                f"--baseline with {label}: a race is greedy and without a simulated network; the peers draw other "
                "random numbers and have no network"
            )
        if config.draft_acceptance is not None:
            raise UserError("--baseline with --draft-acceptance: the peers take the draft as it is")
        if config.stop:
            raise UserError("--baseline with --stop: the peers end a text at tokens alone; name them: --stop-token-ids")
        if config.max_rounds is not None:
            raise UserError("--baseline with --max-rounds: Hugging Face knows no such limit")
    peers = [Peer.parse(name) for name in names]
    if len({peer.label for peer in peers}) < len(peers):
        raise UserError("--baseline: a peer is there more than once; remove the repeats")
    return peers


def run_race(
    ours: Sequence[Ours],
    peers: Sequence[Peer],
    folders: Mapping[str, Path | None],
    prompts: Sequence[Prompt],
    codec: TextCodec,
    settings: BenchSettings,
    results_dir: Path,
    *,
    inputs: Mapping[str, Any],
    on_start: Callable[[str], None] = lambda line: None,
    on_row: Callable[[PeerRecord, int], None] = lambda row, total: None,
) -> Path:
    """Race ours against the peers: `peers_requests.csv`, which it returns the path of, and `peers_run.json`.

    folders: of the models that the workers serve, by role. inputs: what the record says of files read. on_start: gets
    what is about to be loaded, and which peer is left out; on_row: every row, and how many there will be.
    Raises UserError when the models are not those of the workers.
    """
    given = {role: None if folder is None else GivenModel(*resolve_model(folder)) for role, folder in folders.items()}
    check_models(peers, ours, given)
    left_out = {peer: reason for peer in peers if (reason := why_left_out(peer, ours, given)) is not None}
    limit = min(contender.target.description.max_context for contender in ours)
    requests = encode_prompts(prompts, codec, chat=ours[0].config.use_chat_template, limit=limit)
    threads = ours[0].target.description.threads
    with ExitStack() as stack:
        running: dict[Peer, PeerProcess] = {}
        models = {role: _as_served(role, model, ours) for role, model in given.items()}
        target, drafting = models["target"], any(p.kind == "assisted" for p in peers if p not in left_out)
        assert target is not None
        on_start(f"loading the models of the peers, {threads} threads ...")
        hugging_face = stack.enter_context(HuggingFace(target, models["draft"] if drafting else None, threads))
        for peer in peers:
            if peer not in left_out:
                try:
                    running[peer] = (
                        hugging_face
                        if peer.engine != LLAMA_CPP
                        else stack.enter_context(_llama_cpp(peer, given, threads, limit))
                    )
                except UserError as error:  # a wheel that does not fit the machine, a type of weights it does not read
                    left_out[peer] = str(error)
            if peer in left_out:
                on_start(f"{peer.label} is left out: {left_out[peer]}")
        run: dict[str, Any] = {
            "schema_version": 1,
            **describe_here(),
            "inputs": inputs,
            "warmup_requests": settings.warmup,
            "repeats": settings.repeats,
            "settle_s": SETTLE_S,
            "ours": {contender.label: _describe(contender) for contender in ours},
            "hugging_face": {
                "peers": [peer.label for peer, process in running.items() if process is hugging_face],
                **hugging_face.description,
            },
            "llama_cpp": {p.label: running[p].description for p in running if running[p] is not hugging_face},
            "left_out": {peer.label: {"engine": peer.engine, "reason": reason} for peer, reason in left_out.items()},
            "tokenizer_sha256": codec.sha256,
        }
        total = settings.repeats * len(requests) * (len(ours) + len(running))
        table = results_dir / "peers_requests.csv"
        own = ("hugging_face", "llama_cpp", "tokenizer_sha256", "environment", "machine", "software")
        decides = {key: run[key] for key in own} | {"code": code_sha256("race"), "ours": _deciding(ours)}
        run["attempts"] = race(
            requests,
            ours,
            running,
            hugging_face,
            table,
            warmup=settings.warmup,
            repeats=settings.repeats,
            decides=decides,
            on_row=lambda row: on_row(row, total),
        )
    write_run(beside_run(table), {**run, "finished": utc_now()}, [table])
    return table


def _llama_cpp(peer: Peer, given: Mapping[str, GivenModel | None], threads: int, context: int) -> LlamaCpp:
    files = [
        None if model is None else gguf_weights(model.folder)
        for model in (given["target"], given["draft"] if peer.wants_draft else None)
    ]
    assert files[0] is not None
    return LlamaCpp(peer, files[0], files[1], threads, context)


def _as_served(role: str, model: GivenModel | None, ours: Sequence[Ours]) -> PeerModel | None:
    """The model as the worker of this role runs it; None when there is none, or none with weights."""
    connections = (contender.target if role == "target" else contender.draft for contender in ours)
    worker = next((connection for connection in connections if connection is not None), None)
    if model is None or worker is None or model.weightless:
        return None
    served = worker.description
    return PeerModel(model.folder, served.dtype, served.device, tuple(served.skip_layers))


def _deciding(ours: Sequence[Ours]) -> dict[str, Any]:
    """What of our contenders decides their rows."""
    decides = {}
    for contender in ours:
        workers = {role: worker_identity(worker) for role, worker in _describe(contender)["workers"].items()}
        settings = deciding(contender.config)
        decides[contender.label] = {"settings": settings, "workers": workers}
    return decides


def _describe(contender: Ours) -> dict[str, Any]:
    workers = {c.role: c for c in (contender.draft, contender.target) if c is not None}
    return {
        "orchestrator": contender.config.model_dump(mode="json"),
        "workers": {role: {"address": c.address, **description_dict(c.description)} for role, c in workers.items()},
    }
