"""What a head makes of the target's hidden states before it reads them, by itself: for a target worker that sends them
projected."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import torch

from specsplit.engines.head_module import HeadModule
from specsplit.errors import UserError
from specsplit.models.head_config import is_head
from specsplit.models.head_files import read_head

PARTS = ("fc", "fc_norm", "input_norm")
OTHERS = ("embed_tokens", "midlayer", "layers", "norm", "lm_head", "d2t", "t2d")


class Projection:
    """`fc` and its norms of the head in a folder, float32. layers: of the target, whose inputs are joined; None = those
    of EAGLE. projection_sha256: of the weights. Raises UserError when the folder holds no head."""

    def __init__(self, folder: Path) -> None:
        if not is_head(folder):
            raise UserError(f"{folder}: not a head that reads hidden states, so it has no fc")
        config, stored, _ = read_head(folder)
        tensors = {n: stored[n].float().contiguous() for n in sorted(stored) if n.partition(".")[0] in PARTS}
        digest = sha256()
        for name, tensor in tensors.items():
            digest.update(f"{name} {list(tensor.shape)} ".encode() + tensor.numpy().astype("<f4", copy=False).tobytes())
        self.layers, self.projection_sha256 = config.layers, digest.hexdigest()
        with torch.device("meta"):
            self._module = HeadModule(config)
        for name in OTHERS:
            delattr(self._module, name)
        self._module.load_state_dict(tensors, strict=False, assign=True)

    @torch.inference_mode()
    def project(self, raw: torch.Tensor) -> torch.Tensor:
        """The target's hidden states [n, layers * hidden_size] -> [n, state_size], float32."""
        return self._module.to(raw.device).project(raw.float())
