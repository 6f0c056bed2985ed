"""Which models the engines with layers of their own can run: Llama and those built like it."""

from __future__ import annotations

from typing import Any

LLAMA_TYPE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROTARY = ("default", "linear", "llama3", "yarn")  # position embeddings that do not depend on the length of the text


def not_llama_type(hf: Any) -> str | None:
    """Why a model is not of Llama's type; None when it is."""
    config = hf.config.get_text_config()
    if type(hf).__name__ not in LLAMA_TYPE:
        return f"{type(hf).__name__} is none of {', '.join(LLAMA_TYPE)}"
    return not_llama_layer(hf.model.layers[0], config)


def not_llama_layer(layer: Any, config: Any) -> str | None:
    """Why a decoder layer is not of Llama's type; None when it is."""
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotary not in ROTARY:
        return f"its position embedding is {rotary}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    attention, mlp = layer.self_attn, layer.mlp
    if any(m.bias is not None for m in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        return "it has biases outside the inputs of attention"
    return None
