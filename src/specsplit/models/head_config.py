"""The configuration of a head that drafts from the target's hidden states (EAGLE-3, Li et al. 2025).

Two layouts are published: that of the original EAGLE-3 checkpoints (SafeAILab/EAGLE), a Llama configuration with
`draft_vocab_size`, and that of `speculators`, which vLLM loads. Nothing here loads weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specsplit.errors import UserError, told
from specsplit.io import read_json_object

LAYERS_KEY = "eagle_aux_hidden_state_layer_ids"
ARCHITECTURE = "LlamaForCausalLMEagle3"
HEAD_MAPS = ("d2t", "t2d")  # tensors that say which tokens the rows of the output head stand for
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "qk_norm")
LAYER_TYPES = ("llama", "qwen3")  # of `speculators`, which trains no others


@dataclass(frozen=True)
class HeadConfig:
    """layer: the LlamaConfig of the head's layers, of which there is mostly one; its vocab_size is the target's.

    vocab_size: rows of the output head. target_hidden_size: numbers of one of the target's hidden states.
    layers: of the target, whose inputs are read; None = `default_layers` of the target.
    norm_before_residual: whether the residual stream begins with the state after its norm.
    norm_before_fc, fc_norm: whether the target's states are normalised before they are projected, together or each.
    norm_output: whether the next token's state is the output after the final norm.
    qk_norm: whether queries and keys are normalised head by head, as in Qwen3.
    """

    layer: Any
    vocab_size: int
    target_hidden_size: int
    layers: tuple[int, ...] | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    qk_norm: bool = False

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
    names = stored.get("architectures")
    return (
        "draft_vocab_size" in stored
        or "speculators_model_type" in stored
        or any("eagle" in str(name).lower() for name in (names if isinstance(names, list) else ()))
    )


def read_head_config(folder: Path) -> HeadConfig:
    """The configuration of the head in a folder. Raises UserError for one that cannot be run, by its key."""
    from transformers import AutoConfig, LlamaConfig

    path = folder / "config.json"
    stored = read_json_object(path)
    nested = stored.get("transformer_layer_config")
    kind = stored.get("speculators_model_type", "eagle3")
    if kind != "eagle3":
        raise UserError(f"{path}: speculators_model_type {kind!r} cannot be run; wanted eagle3")
    speculators = "speculators_model_type" in stored
    # Readers differ in what a head is that does not say.
    for key in ("transformer_layer_config", "norm_before_residual") if speculators else ():
        if stored.get(key) is None:
            raise UserError(f"{path}: {key} is missing")
    own = nested if isinstance(nested, dict) else {"num_hidden_layers": 1, **stored}
    eagle = stored.get("eagle_config")  # of checkpoints that TensorRT-LLM and SGLang read
    given = {**(eagle if isinstance(eagle, dict) else {}), **stored}
    # The original layout has layers of Llama's type, whatever the type, which may be that of its target.
    type_ = own.get("model_type", "qwen3") if speculators else "llama"
    refusals = {
        "model_type": type_ not in LAYER_TYPES,
        "layer_types": "sliding_attention" in (own.get("layer_types") or ()),
        "partial_rotary_factor": own.get("partial_rotary_factor", 1) != 1,
        "use_aux_hidden_state": given.get("use_aux_hidden_state", True) is not True,
        "quantization_config": bool(stored.get("quantization_config")),
        "logit_scale": given.get("logit_scale", 1.0) != 1.0,
    }
    for key, refused in refusals.items():
        if refused:
            value = own.get(key, given.get(key))
            raise UserError(f"{path}: {key} {value!r}: a head is of Llama-type layers that attend to all, unquantised")
    try:
        # What `speculators` leaves out is as its type has it by default.
        whole = AutoConfig.for_model(type_, **{k: v for k, v in own.items() if k != "model_type"}).to_dict()
        layer = LlamaConfig(**{**whole, "model_type": "llama"})
        names = [str(name) for name in stored.get("architectures") or () if "eagle" in str(name).lower()]
        layer.architectures = names or [ARCHITECTURE]  # many say LlamaForCausalLM
        layers = given.get(LAYERS_KEY) or None
        if layers and not stored.get(LAYERS_KEY) and layers[0] == 1:
            layers = [number + 1 for number in layers]  # SGLang and SpecForge count outputs where they begin with 1
        config = HeadConfig(
            layer,
            given.get("draft_vocab_size") or layer.vocab_size,
            given.get("target_hidden_size") or layer.hidden_size,
            None if layers is None else tuple(layers),
            **{flag: bool(given.get(flag, flag == "qk_norm" and type_ == "qwen3")) for flag in FLAGS},
        )
    except Exception as error:  # transformers raises any class of error for an unusual file
        raise UserError(f"{path}: not the configuration of a head: {told(error)}") from error
    if any(type(layer) is not int or layer < 0 for layer in config.layers or ()):
        raise UserError(f"{path}: {LAYERS_KEY} {layers!r}: wanted a list of layers, counted from 0")
    sizes = {
        "draft_vocab_size": config.vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "num_hidden_layers": layer.num_hidden_layers,
    }
    for key, size in sizes.items():
        if type(size) is not int or size < 1:
            raise UserError(f"{path}: {key} {size!r}: wanted a whole number above 0")
    if config.vocab_size > layer.vocab_size:
        raise UserError(f"{path}: draft_vocab_size {config.vocab_size} is more than vocab_size {layer.vocab_size}")
    if config.norm_before_fc and config.fc_norm:
        raise UserError(f"{path}: norm_before_fc and fc_norm exclude each other")
    return config


def config_json(config: HeadConfig) -> dict[str, Any]:
    """config.json of a head in the original layout, with what that one leaves to the reader written out."""
    stored: dict[str, Any] = config.layer.to_diff_dict()
    rope = config.layer.rope_parameters
    stored |= {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "rope_theta": rope["rope_theta"],  # where readers of the original layout look for it
        "num_hidden_layers": config.layer.num_hidden_layers,
        "vocab_size": config.layer.vocab_size,
        "draft_vocab_size": config.vocab_size,
        "target_hidden_size": config.target_hidden_size,
        **{flag: getattr(config, flag) for flag in FLAGS},
    }
    if config.layers is not None:
        stored[LAYERS_KEY] = list(config.layers)
    return stored
