"""Loading a model whose weights are in a GGUF file: as float32 or in other types, or in the blocks of the file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from specsplit.engines.blocks import BlockEmbedding, BlockLinear, Blocks
from specsplit.engines.weight_forms import BLOCK_FORMS
from specsplit.errors import UserError
from specsplit.models.file_names import GGUF_FILE
from specsplit.models.gguf_file import Stored, check_model, model_tensors, read_gguf

log = logging.getLogger(__name__)


def load_floats(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model in a folder, its weights turned to float32 and rounded to `dtype`, as one of transformers."""
    from transformers import GenerationConfig

    empty, stored = _read(folder)
    state = {name: torch.from_numpy(np.array(tensor.floats())).to(dtype) for name, tensor in stored.items()}
    model = type(empty).from_pretrained(None, config=empty.config, state_dict=state, dtype=dtype)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def load_blocks(folder: Path) -> Any:
    """The model in a folder with its matrices in the blocks of the file, for the fused engine to take apart.

    Matrices of types that it has no function for are float32, and the log says which. Such a model runs in transformers
    as well, slowly.
    """
    from transformers import GenerationConfig

    model, stored = _read(folder)
    config = model.config
    wide = sorted({s.type for s in stored.values() if len(s.shape) > 1 and s.type not in BLOCK_FORMS} - {"F32"})
    if wide:
        log.info("%s: matrices of type %s are turned to float32", folder / GGUF_FILE, ", ".join(wide))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = config.tie_word_embeddings
    for name, module in list(model.named_modules()):
        parent, _, attribute = name.rpartition(".")
        if module is head and tied:
            continue
        if isinstance(module, nn.Linear | nn.Embedding):
            setattr(model.get_submodule(parent), attribute, _module(module, name, stored))
        else:
            for own in dict(module.named_parameters(recurse=False)):
                vector = stored[f"{name}.{own}"].floats()
                setattr(module, own, nn.Parameter(torch.from_numpy(vector.copy()), requires_grad=False))
    if tied:
        embedding = model.get_input_embeddings()
        if isinstance(embedding, BlockEmbedding):
            model.lm_head = BlockLinear(embedding.blocks, config.hidden_size)
        else:
            model.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
            model.lm_head.weight = embedding.weight
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config)  # its tables were not computed on the device without memory
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _read(folder: Path) -> tuple[Any, dict[str, Stored]]:
    """The model without memory for its weights, and these."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # transformers raises any class of error for an unusual file
        raise UserError(f"{folder} does not hold a model that can be loaded: {error}") from error
    file = read_gguf(folder / GGUF_FILE)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_model(file, shapes, tied=config.tie_word_embeddings)
    return model, model_tensors(file, config.num_attention_heads, config.num_key_value_heads)


def _module(module: Any, name: str, stored: dict[str, Stored]) -> nn.Module:
    """The module with weights from the file, in blocks where the fused engine has a function for them."""
    weight = stored[f"{name}.weight"]
    bias = None
    if getattr(module, "bias", None) is not None:
        bias = torch.from_numpy(stored[f"{name}.bias"].floats().copy())
    if weight.type in BLOCK_FORMS:
        blocks = Blocks(weight.type, weight.data)
        return (
            BlockEmbedding(blocks) if isinstance(module, nn.Embedding) else BlockLinear(blocks, weight.shape[1], bias)
        )
    floats = nn.Parameter(torch.from_numpy(np.array(weight.floats())), requires_grad=False)
    if isinstance(module, nn.Embedding):
        return nn.Embedding.from_pretrained(floats)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = floats
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
