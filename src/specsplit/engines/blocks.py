"""Linear layers and embeddings whose weights stay in the blocks of a GGUF file, turned to float32 at every use.

That is slow in PyTorch and only for comparison with the fused engine, which takes these modules apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from specsplit.engines.weight_forms import FORMS, NUMBERS


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix as stored. form: a GGUF type, e.g. Q4_1; data: uint8 [rows, bytes of a row]."""

    form: str
    data: np.ndarray

    @property
    def numbers(self) -> int:
        form = FORMS[NUMBERS[self.form]]
        return self.data.size // form.bytes * form.unit

    def floats(self, rows: Any = slice(None)) -> np.ndarray:
        """Rows of the matrix, float32."""
        from gguf import GGMLQuantizationType, dequantize

        found: np.ndarray = dequantize(np.ascontiguousarray(self.data[rows]), GGMLQuantizationType[self.form])
        return found


class BlockLinear(nn.Module):
    """y = x Wᵀ + b with W in blocks."""

    def __init__(self, blocks: Blocks, in_features: int, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.blocks = blocks
        self.in_features, self.out_features = in_features, len(blocks.data)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, torch.from_numpy(self.blocks.floats()), self.bias)


class BlockEmbedding(nn.Module):
    """An input embedding in blocks."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.blocks.floats(ids.reshape(-1).numpy())
        return torch.from_numpy(rows).view(*ids.shape, -1)


def numbers_in_blocks(model: nn.Module) -> int:
    """Numbers in the blocks of a model; those of an output head that is tied to the embedding count once."""
    blocks = {m.blocks for m in model.modules() if isinstance(m, BlockLinear | BlockEmbedding)}
    return sum(each.numbers for each in blocks)
