"""A race from the models of the workers to its rows and its record: which peers can decode with them, and in what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specsplit.errors import UserError, counted
from specsplit.experiment import llama_cpp
from specsplit.experiment.hugging_face import HuggingFace
from specsplit.experiment.llama_cpp import LlamaCpp
from specsplit.experiment.peer_race import SETTLE_S, Ours, PeerRecord, race
from specsplit.experiment.peers import LLAMA_CPP, Peer, PeerModel, PeerProcess
from specsplit.experiment.records import Request, deciding
from specsplit.models.fingerprint import gguf_weights
from specsplit.models.head_config import is_head
from specsplit.models.sources import resolve_model
from specsplit.models.vocabulary import read_reduced_map
from specsplit.models.weightless import is_weightless
from specsplit.provenance.capture import utc_now
from specsplit.provenance.facts import beside_run
from specsplit.provenance.run_file import write_run
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
    requests: Sequence[Request],
    settings: BenchSettings,
    results_dir: Path,
    run: Mapping[str, Any],
    decides: Mapping[str, Any],
    *,
    on_start: Callable[[str], None] = lambda line: None,
    on_row: Callable[[PeerRecord, int], None] = lambda row, total: None,
) -> Path:
    """Race ours against the peers: `peers_requests.csv`, which it returns the path of, and `peers_run.json`.

    folders: of the models that the workers serve, by role. run: what the record says of ours; decides: what of that
    decides the rows. on_start: gets what is about to be loaded, and which peer is left out; on_row: every row, and how
    many there will be. Raises UserError when the models are not those of the workers.
    """
    given = {role: None if folder is None else GivenModel(*resolve_model(folder)) for role, folder in folders.items()}
    check_models(peers, ours, given)
    left_out = {peer: reason for peer in peers if (reason := why_left_out(peer, ours, given)) is not None}
    limit = min(contender.target.max_context for contender in ours)
    threads = ours[0].target.threads
    with ExitStack() as stack:
        running: dict[Peer, PeerProcess] = {}
        models = {role: _as_served(role, model, ours) for role, model in given.items()}
        target, drafting = models["target"], any(p.kind == "assisted" for p in peers if p not in left_out)
        assert target is not None
        on_start(f"loading the models of the peers, {counted(threads, 'thread')} ...")
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
        run = {
            "schema_version": 1,
            **run,
            "warmup_requests": settings.warmup,
            "repeats": settings.repeats,
            "settle_s": SETTLE_S,
            "hugging_face": {
                "peers": [peer.label for peer, process in running.items() if process is hugging_face],
                **hugging_face.description,
            },
            "llama_cpp": {p.label: running[p].description for p in running if running[p] is not hugging_face},
            "left_out": {peer.label: {"engine": peer.engine, "reason": reason} for peer, reason in left_out.items()},
        }
        total = settings.repeats * len(requests) * (len(ours) + len(running))
        table = results_dir / "peers_requests.csv"
        own = ("hugging_face", "llama_cpp", "tokenizer_sha256", "environment", "software")
        decides = {
            **decides,
            **{key: run[key] for key in own},
            "settings": {contender.label: deciding(contender.config) for contender in ours},
        }
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
    worker = next((contender.workers[role] for contender in ours if role in contender.workers), None)
    if model is None or worker is None or model.weightless:
        return None
    served = worker.description
    return PeerModel(model.folder, served.dtype, served.device, tuple(served.skip_layers))


@dataclass(frozen=True)
class GivenModel:
    """A model that peers are to run: where its weights are, and its manifest."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def weightless(self) -> bool:
        return is_weightless(self.manifest["source"])


def check_models(peers: Sequence[Peer], ours: Sequence[Ours], given: Mapping[str, GivenModel | None]) -> None:
    """Refuse a race without the models that the workers serve.

    given: of the folders given for the roles draft and target; None when none was given.
    """
    for role in ("target", "draft"):
        if role == "draft" and not any(peer.wants_draft for peer in peers):
            continue
        model = given[role]
        if model is None:
            raise UserError(f"--{role}-model is missing: the folder of the {role} model, which the peers are to run")
        if role == "target" and model.weightless:
            raise UserError(
                f"{model.name}, the target, has no weights that a peer could run: name a target with weights"
            )
        for connection in (contender.workers[role] for contender in ours if role in contender.workers):
            served, own = connection.description.weights_sha256, model.manifest["fingerprint"]["weights_sha256"]
            if served != own:
                raise UserError(
                    f"the {role} worker at {connection.address} serves other weights ({served[:12]}) than "
                    f"--{role}-model has ({own[:12]}): a race is between the same models"
                )
    wanting = next((peer.kind for peer in peers if peer.wants_draft), None)
    if wanting and not any("draft" in contender.workers for contender in ours):
        raise UserError(f"--baseline {wanting}: give a gamma above 0 as well, for the draft of the workers is raced")


def why_left_out(peer: Peer, ours: Sequence[Ours], given: Mapping[str, GivenModel | None]) -> str | None:
    """Why a peer cannot decode with these models, which `check_models` has seen, in words; None when it can."""
    target, draft = given["target"], given["draft"] if peer.wants_draft else None
    assert target is not None
    if peer.engine == LLAMA_CPP:
        if not llama_cpp.installed():
            return "the package xllamacpp is not installed: pip install 'specsplit[peers]'"
        if (device := ours[0].target.device) != "cpu":
            return f"the workers compute on {device}, and llama.cpp is raced on the CPU alone"
        if gguf_weights(target.folder) is None:
            return f"it wants a GGUF file, and {target.name}, the target, is none"
    if draft is None:
        return None
    if draft.weightless:
        return f"{draft.name}, the draft, has no weights that it could run"
    if is_head(draft.folder):
        return f"{draft.name}, the draft, reads the target's hidden states, which it does not hand over"
    if read_reduced_map(draft.folder) is not None:
        return f"{draft.name}, the draft, has an output head for a part of the vocabulary, which it does not know"
    if draft.manifest["fingerprint"]["tokenizer_sha256"] != target.manifest["fingerprint"]["tokenizer_sha256"]:
        return f"{draft.name}, the draft, has another tokenizer than the target, and it is raced with one alone"
    if peer.engine == LLAMA_CPP:
        if gguf_weights(draft.folder) is None:
            return f"it wants a GGUF file, and {draft.name}, the draft, is none"
        if any(o.workers["draft"].description.skip_layers for o in ours if "draft" in o.workers):
            return "it cannot leave out layers of the draft"
    return None
