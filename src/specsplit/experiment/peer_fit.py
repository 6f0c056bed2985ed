"""Which peers can decode with the models of the workers, and why the others cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specsplit.errors import UserError
from specsplit.experiment import llama_cpp
from specsplit.experiment.peer_race import Ours
from specsplit.experiment.peers import LLAMA_CPP, Peer
from specsplit.models.fingerprint import gguf_weights
from specsplit.models.head_config import is_head
from specsplit.models.vocabulary import read_reduced_map
from specsplit.models.weightless import is_weightless


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
        for connection in (contender.target if role == "target" else contender.draft for contender in ours):
            if connection is None:
                continue
            served, own = connection.description.weights_sha256, model.manifest["fingerprint"]["weights_sha256"]
            if served != own:
                raise UserError(
                    f"the {role} worker at {connection.address} serves other weights ({served[:12]}) than "
                    f"--{role}-model has ({own[:12]}): a race is between the same models"
                )
    wanting = next((peer.kind for peer in peers if peer.wants_draft), None)
    if wanting and not any(contender.draft for contender in ours):
        raise UserError(f"--baseline {wanting}: give a gamma above 0 as well, for the draft of the workers is raced")


def why_left_out(peer: Peer, ours: Sequence[Ours], given: Mapping[str, GivenModel | None]) -> str | None:
    """Why a peer cannot decode with these models, which `check_models` has seen, in words; None when it can."""
    target, draft = given["target"], given["draft"] if peer.wants_draft else None
    assert target is not None
    if peer.engine == LLAMA_CPP:
        if not llama_cpp.installed():
            return "the package xllamacpp is not installed: pip install 'specsplit[peers]'"
        if (device := ours[0].target.description.device) != "cpu":
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
        skipped = next((o.draft.description.skip_layers for o in ours if o.draft is not None), ())
        if skipped:
            return "it cannot leave out layers of the draft"
    return None
