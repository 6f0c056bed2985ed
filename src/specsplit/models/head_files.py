"""The tensors of a head that drafts from the target's hidden states, of either published layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from specsplit.errors import UserError
from specsplit.models.file_names import GGUF_FILE
from specsplit.models.fingerprint import read_tensors, weight_files
from specsplit.models.gguf_file import read_gguf
from specsplit.models.head_config import HeadConfig, read_head_config
from specsplit.models.loaded import without_biases

if TYPE_CHECKING:
    import torch

UNUSED = ("verifier_norm.weight", "verifier_lm_head.weight", "t2d")  # t2d says again what d2t says
EMBEDDING = "embed_tokens.weight"


def read_head(folder: Path) -> tuple[HeadConfig, dict[str, torch.Tensor], list[int]]:
    """Configuration, tensors and `head_tokens` of the head in a folder, which agree with each other.

    The tensors have the names of the original checkpoints, without those that nothing is computed from and `d2t`; those
    of safetensors are mapped and not read yet. Raises UserError for a file that is damaged or cut off, and for what is
    missing, too many or of another shape than the configuration says; nothing is made of its sizes before.
    """
    config = read_head_config(folder)
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        tensors |= read_tensors(path)
    tensors = {
        name.replace("layers.0.", "midlayer.", 1): tensor
        for name, tensor in tensors.items()
        if name not in UNUSED and not name.endswith("rotary_emb.inv_freq")
    }
    if not any(name.startswith("layers.") for name in tensors):
        config.layer.num_hidden_layers = 1  # of the original layout, which may say how many its target has
    d2t = tensors.pop("d2t", None)
    _check_tensors(config, tensors, folder)
    return config, tensors, head_tokens(config, d2t, folder)


def head_shapes(config: HeadConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a head (`engines.head_module.HeadModule`) by the names of the original checkpoints."""
    layer, states = config.layer, config.states * config.target_hidden_size
    hidden, inner = layer.hidden_size, layer.intermediate_size
    dim = getattr(layer, "head_dim", None) or hidden // layer.num_attention_heads
    queries, values = layer.num_attention_heads * dim, layer.num_key_value_heads * dim
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (layer.vocab_size, hidden),
        "fc.weight": (hidden, states),
        "norm.weight": (hidden,),
        "lm_head.weight": (config.vocab_size, hidden),
        "midlayer.hidden_norm.weight": (hidden,),
    }
    if config.norm_before_fc:
        shapes["input_norm.weight"] = (states,)
    if config.fc_norm:
        shapes |= {f"fc_norm.{i}.weight": (config.target_hidden_size,) for i in range(config.states)}
    for name in ("midlayer", *(f"layers.{number}" for number in range(1, layer.num_hidden_layers))):
        inputs = 2 * hidden if name == "midlayer" else hidden
        linears = {
            **{"self_attn.q_proj": (queries, inputs), "self_attn.o_proj": (hidden, queries)},
            **{"self_attn.k_proj": (values, inputs), "self_attn.v_proj": (values, inputs)},
            **{"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)},
        }
        vectors = {"input_layernorm.weight": hidden, "post_attention_layernorm.weight": hidden}
        if config.qk_norm:
            vectors |= {"self_attn.q_norm.weight": dim, "self_attn.k_norm.weight": dim}
        for linear, shape in linears.items():
            shapes[f"{name}.{linear}.weight"] = shape
            if layer.mlp_bias if linear.startswith("mlp") else layer.attention_bias:
                vectors[f"{linear}.bias"] = shape[0]
        shapes |= {f"{name}.{vector}": (size,) for vector, size in vectors.items()}
    return shapes


def head_tokens(config: HeadConfig, d2t: torch.Tensor | None, folder: Path) -> list[int]:
    """The target's token of every row of the output head. d2t: by how much it is more than the row's number.

    Raises UserError when it does not fit, and when the vocabulary is reduced without it.
    """
    import torch

    rows, size = config.vocab_size, config.layer.vocab_size
    if d2t is None:
        if rows != size:
            raise UserError(
                f"{folder}: d2t is missing, although draft_vocab_size {rows} is less than {size}, vocab_size"
            )
        return list(range(rows))
    if d2t.shape != (rows,) or d2t.is_floating_point():
        found = f"{list(d2t.shape)} of {str(d2t.dtype).removeprefix('torch.')}"
        raise UserError(f"{folder}: d2t is {found}; wanted {rows} whole numbers, as draft_vocab_size says")
    tokens: list[int] = (d2t.long() + torch.arange(rows)).tolist()
    if outside := [token for token in tokens if not 0 <= token < size]:
        raise UserError(f"{folder}: d2t names token {outside[0]}; the target has 0 to {size - 1}")
    if len(set(tokens)) != rows:
        raise UserError(f"{folder}: d2t names a token twice; every row of the output head has its own")
    return tokens


def _check_tensors(config: HeadConfig, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Raise UserError unless there are the tensors of the configuration, in their shapes, and no others; by the first
    name. The embedding may be the target's."""
    expected = head_shapes(config)
    if missing := sorted(set(expected) - set(tensors) - {EMBEDDING}):
        why = without_biases(config.layer, missing) or " not a head of a layout that is known (EAGLE-3, speculators)"
        raise UserError(f"{folder}: {missing[0]} is missing:{why}")
    if strange := sorted(set(tensors) - set(expected)):
        raise UserError(f"{folder}: {strange[0]} has no place in a head of EAGLE-3 with this config.json")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise UserError(f"{folder}: {name} has shape {list(tensor.shape)}; config.json says {list(expected[name])}")


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
    import torch
    from safetensors import SafetensorError, safe_open

    for path in weight_files(target):
        if path.name == GGUF_FILE:
            file = read_gguf(path)
            if (embedding := file.tensors.get("token_embd.weight")) is None:
                break
            return torch.from_numpy(np.array(file.stored(embedding).floats()))
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if name.endswith((EMBEDDING, "wte.weight")):
                        return tensors.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{path}: not a readable safetensors file: {error}; fetch it again") from None
    raise UserError(f"{target}: no input embedding ({EMBEDDING}) in the weights of the target")
