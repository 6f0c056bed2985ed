"""The configuration of a head that drafts from the target's hidden states (EAGLE-3, Li et al. 2025).

Two layouts are published: that of the original EAGLE-3 checkpoints (SafeAILab/EAGLE), a Llama configuration with
`draft_vocab_size`, and that of `speculators`, which vLLM loads. Nothing here loads weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specsplit.io import read_json_object

LAYERS_KEY = "eagle_aux_hidden_state_layer_ids"
ARCHITECTURE = "LlamaForCausalLMEagle3"


@dataclass(frozen=True)
class HeadConfig:
    """layer: the LlamaConfig of the head's one layer; its vocab_size is the target's.

    vocab_size: rows of the output head. target_hidden_size: numbers of one of the target's hidden states.
    layers: of the target, whose inputs are read; None = `default_layers` of the target.
    norm_before_residual: whether the residual stream begins with the state after its norm.
    """

    layer: Any
    vocab_size: int
    target_hidden_size: int
    layers: tuple[int, ...] | None = None
    norm_before_residual: bool = False

    @property
    def states(self) -> int:
        """Hidden states of the target that are joined into one."""
        return 3 if self.layers is None else len(self.layers)


def default_layers(num_layers: int) -> tuple[int, ...]:
    """The layers of a target of so many whose inputs a head reads when its configuration names none, as in EAGLE."""
    return (2, num_layers // 2, num_layers - 3)


def is_head(folder: Path) -> bool:
    """Whether a model folder holds a head rather than a model of its own."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    stored = read_json_object(path)
    return (
        "draft_vocab_size" in stored
        or stored.get("speculators_model_type") is not None
        or any("eagle" in str(name).lower() for name in stored.get("architectures") or ())
    )


def read_head_config(folder: Path) -> HeadConfig:
    """The configuration of the head in a folder. Raises UserError for one that cannot be run, by its key."""
    from transformers import LlamaConfig

    stored = read_json_object(folder / "config.json")
    layer = LlamaConfig(**stored)
    layers = stored.get(LAYERS_KEY)
    return HeadConfig(
        layer,
        stored.get("draft_vocab_size") or layer.vocab_size,
        stored.get("target_hidden_size") or layer.hidden_size,
        tuple(layers) if layers else None,
        bool(stored.get("norm_before_residual", False)),
    )


def config_json(config: HeadConfig) -> dict[str, Any]:
    """config.json of a head in the original layout, with what that one leaves to the reader written out."""
    stored: dict[str, Any] = config.layer.to_diff_dict()
    stored |= {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": config.layer.vocab_size,
        "draft_vocab_size": config.vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "norm_before_residual": config.norm_before_residual,
    }
    if config.layers is not None:
        stored[LAYERS_KEY] = list(config.layers)
    return stored
