"""The tensors of a head that drafts from the target's hidden states, of either published layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from specsplit.errors import UserError
from specsplit.models.file_names import GGUF_FILE
from specsplit.models.fingerprint import read_tensors, weight_files
from specsplit.models.gguf_file import read_gguf
from specsplit.models.head_config import HeadConfig

UNUSED = ("verifier_norm.weight", "verifier_lm_head.weight", "t2d")  # t2d says again what d2t says
EMBEDDING = "embed_tokens.weight"


def head_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors by their names, without those that nothing is computed from.

    Those of safetensors are mapped and not read yet. Raises UserError for a file that is damaged or cut off.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        tensors |= read_tensors(path)
    return {n: tensor for n, tensor in tensors.items() if n not in UNUSED and not n.endswith("rotary_emb.inv_freq")}


def head_tokens(config: HeadConfig, tensors: Mapping[str, torch.Tensor], folder: Path) -> list[int]:
    """The target's token of every row of the output head. `d2t` says by how much it is more than the row's number.

    Raises UserError when it does not fit, and when the vocabulary is reduced without it.
    """
    rows, size = config.vocab_size, config.layer.vocab_size
    if "d2t" not in tensors:
        if rows != size:
            raise UserError(
                f"{folder}: d2t is missing, although draft_vocab_size {rows} is less than {size}, vocab_size"
            )
        return list(range(rows))
    d2t = tensors["d2t"]
    if d2t.shape != (rows,) or d2t.is_floating_point():
        found = f"{list(d2t.shape)} of {str(d2t.dtype).removeprefix('torch.')}"
        raise UserError(f"{folder}: d2t is {found}; wanted {rows} whole numbers, as draft_vocab_size says")
    tokens: list[int] = (d2t.long() + torch.arange(rows)).tolist()
    if outside := [token for token in tokens if not 0 <= token < size]:
        raise UserError(f"{folder}: d2t names token {outside[0]}; the target has 0 to {size - 1}")
    if len(set(tokens)) != rows:
        raise UserError(f"{folder}: d2t names a token twice; every row of the output head has its own")
    return tokens


def check_tensors(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], folder: Path, optional: set[str]
) -> None:
    """Raise UserError unless there are the expected tensors, in their shapes, and no others; by the first name."""
    if missing := sorted(set(expected) - set(tensors) - optional):
        raise UserError(
            f"{folder}: {missing[0]} is missing: not a head of a layout that is known (EAGLE-3, speculators)"
        )
    if strange := sorted(set(tensors) - set(expected)):
        raise UserError(f"{folder}: {strange[0]} has no place in a head of EAGLE-3 with this config.json")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            wanted = list(expected[name].shape)
            raise UserError(f"{folder}: {name} has shape {list(tensor.shape)}; config.json says {wanted}")


def target_embedding(target: Path | None, config: HeadConfig, folder: Path) -> torch.Tensor:
    """The input embedding of the target, which a head without one reads: [vocab_size, hidden_size].

    target: a folder with its weights. folder: of the head. Raises UserError when it is not given, or does not fit.
    """
    if target is None:
        raise UserError(
            f"{folder}: a head without {EMBEDDING} reads the embedding of its target: name the target's folder as "
            "target_tokenizer (--target-tokenizer FOLDER)"
        )
    found = _stored_embedding(target)
    wanted = (config.layer.vocab_size, config.layer.hidden_size)
    if found.shape != wanted:
        raise UserError(
            f"{folder} is a head of another target than {target}: that one's embedding has shape "
            f"{list(found.shape)} (tokens, hidden size), and the head reads {list(wanted)}"
        )
    return found


def _stored_embedding(target: Path) -> torch.Tensor:
    from safetensors import SafetensorError, safe_open

    for path in weight_files(target):
        if path.name == GGUF_FILE:
            file = read_gguf(path)
            return torch.from_numpy(np.array(file.stored(file.tensors["token_embd.weight"]).floats()))
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if name.endswith((EMBEDDING, "wte.weight")):
                        return tensors.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{path}: not a readable safetensors file: {error}; fetch it again") from None
    raise UserError(f"{target}: no input embedding ({EMBEDDING}) in the weights of the target")
