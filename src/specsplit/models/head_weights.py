"""The weight files of heads: safetensors, or, as the original checkpoints are, pytorch_model.bin, which a reader
of tensors alone reads, without running code."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import torch

from specsplit.errors import UserError, told
from specsplit.models.head_config import HEAD_MAPS


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name; those of safetensors are mapped and not read yet. Raises UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: the weights cannot be read: {told(error)}; fetch the head again") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise UserError(f"{path}: wanted tensors by name")
    return found


def count_numbers(path: Path) -> Counter[str]:
    """Numbers in the tensors of pytorch_model.bin, by their type as safetensors call it."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    counts: Counter[str] = Counter()
    for name, tensor in read_tensors(path).items():
        if name not in HEAD_MAPS:
            counts[names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))] += tensor.numel()
    return counts
