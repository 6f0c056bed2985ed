"""The inputs of a target's layers, kept in its caches for a head that drafts from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from specsplit.decoding.sampling import GREEDY
from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.engines import gpu_cache, state_slots
from specsplit.engines.cuda_graphs import GraphLM
from specsplit.engines.gpu import GpuLM
from specsplit.engines.numba import FusedLM
from specsplit.engines.passes import Pass, Walk
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
    "graphs": (lambda architecture: GraphLM(make_tiny_model(architecture)), ("gpt2", "qwen3-mixed")),
    "gpu": (lambda architecture: GpuLM(CausalLM(make_tiny_model(architecture))), ("llama", "qwen3-mixed")),
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
    counted = model.cache_bytes(64, 4) - model.cache_bytes(64)
    assert cache.nbytes() >= counted >= cache.states.nbytes  # rows of a pool are longer
    assert engine in ("gpu", "graphs") or counted == cache.states.nbytes
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


def test_launches_of_several_sessions_on_a_gpu_keep_the_states_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in parts, trees that are walked and moved on the device, rows that change hands, against CausalLM."""
    monkeypatch.setattr(gpu_cache, "BLOCK", 64)
    model, plain = GpuLM(CausalLM(make_tiny_model("llama")), sessions=4), CausalLM(make_tiny_model("llama"))
    model.prefill_tokens = 32
    layers = [(0, 2), (0, 2), (1,), ()]
    texts = [[3 + (i + 2) * k % 90 for k in range(length)] for i, length in enumerate((150, 20, 70, 40))]
    pairs = [(model.new_cache(200), plain.new_cache(200)) for _ in texts]
    for pair, taps, text in zip(pairs, layers, texts, strict=True):
        for cache, lm in zip(pair, (model, plain), strict=True):
            cache.tap(taps)
            lm.step(cache, text)

    def check() -> None:
        for (own, other), taps in zip(pairs, layers, strict=True):
            assert own.length == other.length
            if taps:
                torch.testing.assert_close(own.states[: own.length], other.states[: own.length], rtol=1e-4, atol=1e-4)

    check()
    for round_ in range(3):
        trees = []
        for _, other in pairs:
            written = [7]  # and what the model writes after it
            for _ in range(3):
                written.append(int(plain.step(other, written[-1:])[-1].argmax()))
            trees.append(TokenTree([120, 121, written[1], 122, written[2]], [ROOT, ROOT, ROOT, 2, 2], [-1.0] * 5))
        passes = [Pass(own, [7], tree, then=Walk(GREEDY)) for (own, _), tree in zip(pairs, trees, strict=True)]
        for (own, _), verdict in zip(pairs, model.step_many(passes), strict=True):
            assert verdict.path == [2, 4]  # which are moved
            own.keep(own.length - 2, verdict.path)
        check()
        for pair in pairs:
            for cache in pair:
                cache.rollback(cache.length - round_)
    row, pool = pairs[0][0].row, pairs[0][0].pool
    del passes, own, other, pairs[0]
    again = model.new_cache(200)
    assert (again.row, again.pool, again.states) == (row, pool, None)
    for taps in range(6):  # whatever clients ask for, few choices stay recorded
        again.tap((0,) * (taps % 3) + (taps % 2,))
        model.step(again, [5])
    assert len({shape.taps for shape in pool.programs} - {()}) == state_slots.TAPPED
    with pytest.raises(ValueError, match="5 layers are tapped"):
        again.tap((0,) * 5)


def test_who_cannot_keep_states_says_so() -> None:
    assert not SyntheticLM(step_ms=0, token_ms=0, acceptance=1.0, seed=0, vocab_size=256).taps
