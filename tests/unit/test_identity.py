"""The text is that of Hugging Face's `generate(do_sample=False)`, for each family of models, engine and shape of draft.

A new family is one line of FAMILIES; the table of docs/models.md is checked against what ran.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from specsplit.decoding.growth import DraftSettings
from specsplit.decoding.loop import Model, speculate
from specsplit.decoding.tree import TreeShape
from specsplit.engines.cuda_graphs import GraphLM
from specsplit.engines.numba import FusedLM, unsuitable
from specsplit.engines.transformers import CausalLM
from specsplit.errors import UserError
from specsplit.models.fingerprint import check_architecture, read_config, weight_files
from specsplit.models.loaded import stored_tensors

from tiny_models import COMMON, SMALL, random_model

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
PROMPT = [5, 9, 33, 71, 12, 40, 8, 90, 15, 22]  # longer than the sliding windows
LENGTH = 24
SHAPES = ("chain", "3x2", "dynamic-8x3")
MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
WIDE = {**COMMON, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# Family: what is special about it, and its configuration beside the usual sizes.
FAMILIES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "Llama 2": (
        "all heads have keys of their own",
        transformers.LlamaConfig,
        dict(**{**SMALL, "num_key_value_heads": 4}),
    ),
    "Llama 3": ("scaled rotary", transformers.LlamaConfig, dict(**SMALL, rope_parameters=LLAMA3)),
    "Llama 3, tied": (
        "tied head",
        transformers.LlamaConfig,
        dict(**SMALL, rope_parameters=LLAMA3, tie_word_embeddings=True),
    ),
    "Qwen2, Qwen2.5": ("biases in attention", transformers.Qwen2Config, dict(**SMALL)),
    "Qwen2.5, tied": ("tied head", transformers.Qwen2Config, dict(**SMALL, tie_word_embeddings=True)),
    "Qwen3": ("norms of queries and keys", transformers.Qwen3Config, dict(**SMALL)),
    "Qwen3, windows": (
        "some layers with a window",
        transformers.Qwen3Config,
        dict(**SMALL, **MIXED, use_sliding_window=True),
    ),
    "Mistral": ("sliding window", transformers.MistralConfig, dict(**SMALL, sliding_window=8)),
    "Gemma 2": ("soft caps, windows", transformers.Gemma2Config, dict(**SMALL, **MIXED, query_pre_attn_scalar=8)),
    "Gemma 3": (
        "two rotaries, windows",
        transformers.Gemma3TextConfig,
        dict(**SMALL, **MIXED, query_pre_attn_scalar=8),
    ),
    "Phi-3, Phi-4": ("joined projections", transformers.Phi3Config, dict(**SMALL)),
    "Phi-4-mini": (
        "partial rotary, tied head",
        transformers.Phi3Config,
        dict(**SMALL, rope_parameters=PARTIAL, tie_word_embeddings=True),
    ),
    "OLMo 2": ("norms behind the blocks", transformers.Olmo2Config, dict(**SMALL)),
    "SmolLM2": ("tied head", transformers.LlamaConfig, dict(**SMALL, tie_word_embeddings=True)),
    "SmolLM3": ("layers without rotary", transformers.SmolLM3Config, dict(**SMALL, no_rope_layers=[1, 1, 0])),
    "Granite": (
        "multipliers",
        transformers.GraniteConfig,
        dict(**SMALL, embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.2),
    ),
    "GPT-NeoX": ("partial rotary, parallel blocks", transformers.GPTNeoXConfig, dict(**WIDE, intermediate_size=48)),
    "GPT-2": (
        "learned positions",
        transformers.GPT2Config,
        dict(**COMMON, n_embd=32, n_layer=3, n_head=4, n_positions=256),
    ),
    "StableLM": (
        "partial rotary, biased norms",
        transformers.StableLmConfig,
        dict(**WIDE, intermediate_size=48, num_key_value_heads=2),
    ),
    "Falcon": ("one head of keys", transformers.FalconConfig, dict(**WIDE, multi_query=True, alibi=False)),
    "Mixtral": (
        "mixture of experts",
        transformers.MixtralConfig,
        dict(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    ),
    "Qwen3-MoE": ("mixture of experts", transformers.Qwen3MoeConfig, dict(**SMALL, **EXPERTS)),
}


@cache
def embedding_scale(family: str) -> float:
    """With large embeddings, and a tied head above all, a model would choose one token again and again."""
    return next(scale for scale in (1.0, 0.3, 0.1, 0.03, 0.01) if len(set(reference(scaled(family, scale), []))) > 3)


def scaled(family: str, scale: float) -> Any:
    _, kind, settings = FAMILIES[family]
    model = random_model(kind(**settings))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
    return model


def made(family: str) -> Any:
    """A model of the family with random weights."""
    return scaled(family, embedding_scale(family))


def noisy(model: Any) -> Any:
    """The model with every weight changed a little: a draft that is right some of the time."""
    errors = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=errors) * parameter.std() * 0.05)
    return model


def reference(model: Any, eos: list[int]) -> list[int]:
    """Hugging Face's greedy text."""
    model.generation_config.eos_token_id = eos or None
    with torch.inference_mode():
        ids = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=LENGTH, pad_token_id=0)
    return ids[0, len(PROMPT) :].tolist()


def text(target: Model, draft: Model | None, gamma: int, shape: str, eos: list[int]) -> list[int]:
    asked = DraftSettings(gamma, TreeShape.parse(shape), stop_token_ids=frozenset(eos))
    rounds = speculate(target, draft, PROMPT, asked, max_new_tokens=LENGTH)
    return [token for one in rounds for token in one.tokens]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_generate(family: str) -> None:
    model = made(family)
    free = reference(model, [])
    several = [2, free[15], free[19]]
    ended = reference(model, several)
    target, draft = CausalLM(model), CausalLM(noisy(made(family)))
    target.check_tree_attention()
    engines: dict[str, tuple[Model, Model]] = {"transformers": (target, draft)}
    engines["graphs"] = GraphLM(model), GraphLM(noisy(made(family)))  # the buffers that a GPU records graphs on
    if unsuitable(target) is None:
        engines["fused"] = FusedLM(CausalLM(made(family)), 1), FusedLM(CausalLM(noisy(made(family))), 1)

    for engine, (ours, drafts) in engines.items():
        assert text(ours, None, 0, "chain", []) == free, engine
        for shape in SHAPES:
            assert text(ours, drafts, 4, shape, []) == free, (engine, shape)
            assert text(ours, drafts, 4, shape, several) == ended, (engine, shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_tensors_are_those_of_their_configuration(family: str, tmp_path: Path) -> None:
    _, kind, settings = FAMILIES[family]
    model = random_model(kind(**settings))
    model.save_pretrained(tmp_path, max_shard_size="40KB")

    stored = stored_tensors(weight_files(tmp_path))
    parameters = sum(math.prod(each.shape) for each in stored.values())
    assert check_architecture(tmp_path, read_config(tmp_path), parameters, stored=stored) == type(model).__name__


def table() -> str:
    lines = ["| models | what is special | `transformers` | `graphs` | `fused` |", "|---|---|---|---|---|"]
    for family, (special, *_) in FAMILIES.items():
        fused = "no" if unsuitable(CausalLM(made(family))) else "yes"
        lines.append(f"| {family} | {special} | yes | yes | {fused} |")
    return "\n".join(lines)


def test_the_table_of_the_documentation() -> None:
    assert table() in PAGE.read_text(encoding="utf-8"), f"write this into {PAGE.name}:\n{table()}"


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (transformers.FalconConfig, {**WIDE, "multi_query": True, "alibi": True}),
        (transformers.MambaConfig, {**COMMON, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    ],
    ids=["ALiBi", "Mamba"],
)
def test_what_cannot_be_verified_in_trees_is_refused(kind: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="cannot verify trees of drafted tokens"):
        CausalLM(random_model(kind(**settings))).check_tree_attention()
