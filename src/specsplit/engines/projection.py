"""The `fc` of a draft that reads hidden states, by itself: what a target worker needs to send them projected."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import torch

from specsplit.engines.reduced_vocabulary import stored_tensor
from specsplit.errors import UserError
from specsplit.models.head_config import is_head, read_head_config


class Projection:
    """weight: [width, layers * hidden_size], float32. layers: of the target, whose inputs are joined; None = those of
    EAGLE."""

    def __init__(self, weight: torch.Tensor, layers: tuple[int, ...] | None) -> None:
        self.layers = layers
        self._weight = weight.detach().float().contiguous().cpu()
        self.projection_sha256 = sha256(self._weight.numpy().astype("<f4", copy=False).tobytes()).hexdigest()

    @classmethod
    def load(cls, folder: Path) -> Projection:
        """The `fc` of the draft in a folder. Raises UserError when that has none."""
        if not is_head(folder):
            raise UserError(f"{folder}: not a draft that reads hidden states, so it has no fc")
        return cls(stored_tensor(folder, "fc.weight"), read_head_config(folder).layers)

    @torch.inference_mode()
    def project(self, raw: torch.Tensor) -> torch.Tensor:
        """The target's hidden states [n, layers * hidden_size] -> [n, width], float32."""
        self._weight = self._weight.to(raw.device)
        return raw.float() @ self._weight.T
