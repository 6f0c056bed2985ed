"""The draft of the target's own parts: made, judged while it learns, saved in a folder like that of any model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specsplit.distill.losses import Judged, Learner, autocast, to_draft_rows
from specsplit.distill.shards import Text, frequent_tokens, replace_tensors
from specsplit.engines.architectures import LLAMA_TYPE
from specsplit.engines.reduced_vocabulary import reduce_vocabulary
from specsplit.engines.transformers import DTYPES, CausalLM, drop_layers
from specsplit.errors import UserError
from specsplit.io import replace_file
from specsplit.models.file_names import MAP_FILES, TOKENIZER_EXTRAS, TOKENIZER_FILES, matches
from specsplit.settings.distill import TrainingSettings

WEIGHTS = "model.safetensors"


def pick_layers(settings: TrainingSettings, available: int) -> list[int]:
    """The target's layers that become the draft's, sorted: those that are named, or as many, the first and the last
    among them and the others evenly between; one alone is the first, which reads embeddings.

    Raises UserError when the target does not have them.
    """
    if settings.take_layers is not None:
        if beyond := [layer for layer in settings.take_layers if layer >= available]:
            raise UserError(f"take_layers: {beyond[0]} is not one of the target's layers, 0 to {available - 1}")
        return sorted(settings.take_layers)
    if settings.layers > available:
        raise UserError(f"layers {settings.layers}: the target has {available}")
    return [int(layer) for layer in np.linspace(0, available - 1, settings.layers).round()]


def pick_vocabulary(
    settings: TrainingSettings, texts: Sequence[Text], target: CausalLM, top_k: int
) -> list[int] | None:
    """The target's tokens that the draft knows, a row each, the most frequent first; None = all of them.

    Raises UserError when they are too few to learn from `top_k` likely ones, or to hold the tokens that end a text.
    """
    size, least = settings.vocab_size, top_k + len(target.eos_token_ids) + 1
    if size is None or size >= target.vocab_size:
        return None
    if size < least:
        raise UserError(f"vocab_size {size}: wanted at least {least}, for {top_k} likely tokens of a position")
    return frequent_tokens(texts, size, target.vocab_size, target.eos_token_ids)


def build_draft(target: CausalLM, layers: Sequence[int], tokens: Sequence[int] | None) -> Any:
    """Make the draft out of a loaded target, in place, in float32: these layers and, of its tokens, these.

    Raises UserError when the target is of no type that a draft can be made of in this way.
    """
    model = target.model
    if type(model).__name__ not in LLAMA_TYPE:
        raise UserError(
            f"a draft is made of the layers of its target, which is a {type(model).__name__}; wanted one of "
            f"{', '.join(LLAMA_TYPE)}"
        )
    if skipped := sorted(set(range(target.num_layers)) - set(layers)):
        drop_layers(model, skipped)
    if tokens is not None:
        reduce_vocabulary(model, tokens)
    return model.float()


@dataclass(frozen=True)
class Batch:
    """ids: [texts, length], padded at the right. places: of the flattened ids, those after which an answer's token
    comes. rows, log_probs: [places, k], the target's likeliest tokens there, as rows of the draft's head."""

    ids: torch.Tensor
    places: torch.Tensor
    rows: torch.Tensor
    log_probs: torch.Tensor


class DraftLearner(Learner):
    """A draft of the target's own layers: `model` (HF, float32, its vocabulary reduced to `tokens` or whole)."""

    def __init__(self, model: Any, tokens: Sequence[int] | None) -> None:
        super().__init__(dict(model.named_parameters()), tokens, model.config.get_text_config().vocab_size)
        self.model, self._tokens = model.eval(), tokens  # no dropout, whatever the target was trained with

    def collate(self, texts: Sequence[Text]) -> Batch:
        length = max(len(text.tokens) for text in texts)
        ids = torch.zeros(len(texts), length, dtype=torch.long)
        places = []
        for i, text in enumerate(texts):
            ids[i, : len(text.tokens)] = text.tokens
            places.append(torch.arange(text.answer - 1, len(text.tokens) - 1) + i * length)
        rows = to_draft_rows(torch.cat([text.top_ids for text in texts]).long(), self._row_of)
        log_probs = torch.cat([text.top_log_probs for text in texts]).float()
        parts = (ids, torch.cat(places), rows, log_probs)
        return Batch(*(part.to(self.device, non_blocking=True) for part in parts))

    def say(self, batch: Batch) -> list[Judged]:
        with autocast(self.device):
            hidden = self.model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
            logits = self.model.get_output_embeddings()(hidden.flatten(0, 1)[batch.places])
        return [(logits, batch.rows, batch.log_probs)]

    def save(self, dtype: str, target_folder: Path, folder: Path) -> None:
        """Write weights, configuration, map and the target's tokenizer files, the weights last.

        What is there of an earlier draft is replaced. The same model gives the same bytes.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, *MAP_FILES):
            (folder / name).unlink(missing_ok=True)
        copy_tokenizer(target_folder, folder)
        self.model.config.dtype = DTYPES[dtype]
        self.model.config.save_pretrained(folder)
        if self._tokens is not None:
            replace_file(folder / MAP_FILES[0], json.dumps(list(self._tokens)) + "\n")
        weights = {name: p.detach().to("cpu", DTYPES[dtype]).contiguous() for name, p in self.parameters.items()}
        replace_tensors(folder / WEIGHTS, weights, {"format": "pt"})


def make_draft(
    target: CausalLM,
    texts: Sequence[Text],
    manifest: Mapping[str, Any],
    settings: TrainingSettings,
    device: torch.device,
) -> tuple[DraftLearner, list[int], list[int] | None]:
    """The draft to be trained, made of the target, which is used up; its layers, and the tokens of its head."""
    layers = pick_layers(settings, target.num_layers)
    tokens = pick_vocabulary(settings, texts, target, manifest["settings"]["top_k"])
    return DraftLearner(build_draft(target, layers, tokens).to(device), tokens), layers, tokens


def copy_tokenizer(target_folder: Path, folder: Path) -> None:
    """The target's tokenizer files, and its settings of generation."""
    for path in sorted(target_folder.iterdir()):
        if matches(path.name, (*TOKENIZER_FILES, *TOKENIZER_EXTRAS, "generation_config.json")):
            shutil.copyfile(path, folder / path.name)
