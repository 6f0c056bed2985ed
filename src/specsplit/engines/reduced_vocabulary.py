"""Models with a reduced vocabulary: an output head, and optionally an input embedding, with fewer rows.

`draft_to_target` of a model folder (vocabulary.read_reduced_map) names the token of every row of the output head. The
input embedding has a row for every token, as in FR-Spec and EAGLE-3, or the same rows as the head. Then a token without
a row is read as the last one, which makes a small draft of a large vocabulary small in memory and on disk.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from specsplit.errors import UserError
from specsplit.models.fingerprint import weight_files


class ReducedEmbedding(nn.Module):
    """An input embedding with a row for each of `tokens`; the others are read as the last of these.

    weight: [len(tokens), hidden]. vocab_size: token ids that can be read are below it.
    """

    rows: torch.Tensor

    def __init__(self, weight: torch.Tensor, tokens: Sequence[int], vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        rows = torch.full((vocab_size,), len(tokens) - 1)
        rows[list(tokens)] = torch.arange(len(tokens))
        self.register_buffer("rows", rows, persistent=False)  # the map is beside the weights

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(self.rows[ids], self.weight)


def reduce_loaded(model: Any, folder: Path, tokens: Sequence[int], mismatched: Collection[str]) -> None:
    """Give a loaded model an output head with a row for each of `tokens` alone, in place.

    mismatched: tensors in the files of `folder` that have another shape than the model. The head may be one, when it is
    reduced there already (else its rows are taken from the full one, which may be tied), and the input embedding, when
    it is stored with the same rows.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {module: f"{path}.weight" for path, module in model.named_modules() if module in (head, embedding)}
    if strange := sorted(set(mismatched) - set(names.values())):
        raise UserError(f"{folder}: {strange[0]} has another shape than config.json says")
    vocab_size, tied = len(embedding.weight), model.config.get_text_config().tie_word_embeddings
    if max(tokens) >= vocab_size:
        raise UserError(f"{folder}: draft_to_target names token {max(tokens)}; the model has {vocab_size}")

    def stored(module: Any) -> torch.Tensor:
        rows = _stored_tensor(folder, names[module]).to(head.weight.dtype)
        if rows.shape != (len(tokens), head.weight.shape[1]):
            name = names[module]
            raise UserError(f"{folder}: {name} has {len(rows)} rows, but draft_to_target {len(tokens)} entries")
        return rows

    reduced_input = names[embedding] in mismatched
    if reduced_input:
        model.set_input_embeddings(ReducedEmbedding(stored(embedding), tokens, vocab_size))
    if names[head] in mismatched and not (tied and reduced_input):
        rows = stored(head)
    elif reduced_input and tied:
        rows = model.get_input_embeddings().weight
    else:
        rows = head.weight[list(tokens)]
    _set_head(model, rows, tokens)


def reduce_vocabulary(model: Any, tokens: Sequence[int]) -> None:
    """Give a full model an input embedding and an output head with a row for each of `tokens`, in place.

    All other tokens are read as the last one, whose embedding starts as their mean. Tied weights stay tied.
    """
    config = model.config.get_text_config()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    full = embedding.weight.detach()
    others = torch.ones(len(full), dtype=torch.bool)
    others[list(tokens[:-1])] = False
    weight = full[list(tokens)].clone()
    weight[-1] = full[others].mean(0)
    rows = head.weight.detach()[list(tokens)]
    model.set_input_embeddings(ReducedEmbedding(weight, tokens, len(full)))
    _set_head(model, model.get_input_embeddings().weight if config.tie_word_embeddings else rows, tokens)


def _set_head(model: Any, rows: torch.Tensor, tokens: Sequence[int]) -> None:
    """An output head with these rows; a parameter is shared, a plain tensor copied."""
    old = model.get_output_embeddings()
    head = nn.Linear(rows.shape[1], len(rows), bias=old.bias is not None, dtype=rows.dtype, device=rows.device)
    with torch.no_grad():
        if isinstance(rows, nn.Parameter):
            head.weight = rows
        else:
            head.weight.copy_(rows)
        if old.bias is not None:
            head.bias.copy_(old.bias[list(tokens)])
    model.set_output_embeddings(head)


def _stored_tensor(folder: Path, name: str) -> torch.Tensor:
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 (not a dict)
                return tensors.get_tensor(name)
    raise UserError(f"{folder}: no weights called {name}")
