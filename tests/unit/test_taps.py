"""The inputs of a target's layers, kept in its caches for a head that drafts from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.engines.numba import FusedLM
from specsplit.engines.passes import Pass
from specsplit.engines.synthetic import SyntheticLM
from specsplit.engines.transformers import CausalLM

from tiny_models import ARCHITECTURES, make_tiny_model

TOKENS = [5, 9, 33, 71, 12, 90, 44, 8, 101, 63, 27]
TREE = TokenTree([5, 6, 7, 8, 9], [ROOT, ROOT, 0, 1, 3], [-1.0] * 5)
ENGINES: dict[str, tuple[Callable[[str], Any], tuple[str, ...]]] = {
    "transformers": (lambda architecture: CausalLM(make_tiny_model(architecture)), ARCHITECTURES),
    "fused": (
        lambda architecture: FusedLM(CausalLM(make_tiny_model(architecture)), 2),
        ("llama", "qwen3-mixed"),
    ),
}
EACH = [(engine, architecture) for engine, (_, architectures) in ENGINES.items() for architecture in architectures]


@torch.inference_mode()
def plain(architecture: str, text: list[int], layers: tuple[int, ...]) -> torch.Tensor:
    states = make_tiny_model(architecture)(torch.tensor([text]), output_hidden_states=True).hidden_states
    return torch.cat([states[layer][0] for layer in layers], dim=-1)


@pytest.mark.parametrize(("engine", "architecture"), EACH)
def test_states_are_those_of_the_tokens_that_are_kept(engine: str, architecture: str) -> None:
    model = ENGINES[engine][0](architecture)
    layers = (2, 1, 0, 1)  # in any order, one of them twice
    cache, untapped = model.new_cache(64), model.new_cache(64)
    cache.tap(layers)
    assert cache.nbytes() >= cache.states.nbytes == model.cache_bytes(64, 4) - model.cache_bytes(64)
    first = model.step(cache, TOKENS[:7])
    assert torch.equal(first, model.step(untapped, TOKENS[:7]))  # the logits are as without
    model.step_many([Pass(cache, TOKENS[7:9], TREE), Pass(untapped, TOKENS[7:9], TREE)])
    cache.keep(9, [1, 3, 4])
    text = [*TOKENS[:9], 6, 8, 9]
    torch.testing.assert_close(cache.states[: len(text)], plain(architecture, text, layers), rtol=1e-4, atol=1e-4)
    cache.rollback(8)
    model.step(cache, [50, 60])
    text = [*TOKENS[:8], 50, 60]
    torch.testing.assert_close(cache.states[: len(text)], plain(architecture, text, layers), rtol=1e-4, atol=1e-4)
    cache.tap(layers)
    assert cache.length == len(text)
    cache.tap((0,))
    assert cache.length == 0


def test_states_have_the_same_bits_whatever_shares_the_pass() -> None:
    model = FusedLM(CausalLM(make_tiny_model("llama")), 2)

    def cached(*parts: list[int]) -> Any:
        cache = model.new_cache(128)
        cache.tap((0, 1, 2))
        for part in parts:
            model.step(cache, part)
        return cache

    alone = cached(*([token] for token in TOKENS)).states[: len(TOKENS)]
    assert torch.equal(cached(TOKENS).states[: len(TOKENS)], alone)
    passes = [Pass(cached(TOKENS[:count]), TOKENS[count : count + 2]) for count in (3, 6, 8)]
    model.step_many(passes)
    for each in passes:
        assert torch.equal(each.cache.states[: each.cache.length], alone[: each.cache.length])


def test_who_cannot_keep_states_says_so() -> None:
    assert not SyntheticLM(step_ms=0, token_ms=0, acceptance=1.0, seed=0, vocab_size=256).taps
