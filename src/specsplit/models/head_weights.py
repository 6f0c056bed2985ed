"""The weight files of heads: safetensors, or, as the original checkpoints are, pytorch_model.bin, which a reader
of tensors alone reads, without running code."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from specsplit.errors import UserError, told


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
