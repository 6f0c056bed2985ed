"""Passes on buffers of fixed shape, on the CPU: what a CUDA graph would replay."""

from __future__ import annotations

import gc

import pytest
import torch

from specsplit.decoding.tree import TokenTree
from specsplit.engines import loading
from specsplit.engines.cuda_graphs import SMALLEST_PASS, SMALLEST_VIEW, GraphLM
from specsplit.engines.numba import FusedLM
from specsplit.engines.transformers import CausalLM
from specsplit.errors import UserError
from specsplit.models.sources import resolve_model
from specsplit.settings.worker import TargetWorkerConfig

from tiny_models import make_tiny_model

PROMPT = [5, 9, 33, 71, 12, 90, 44, 8, 101, 63, 27]


def test_a_pass_is_recorded_once_for_every_number_of_tokens() -> None:
    model = GraphLM(make_tiny_model("llama"))
    cache = model.new_cache(64)
    model.step(cache, PROMPT)
    (program,) = cache.buffers.programs.values()
    for gamma in (1, 3, SMALLEST_PASS - 1):
        model.step(cache, [7], TokenTree.chain([8] * gamma))
    assert list(cache.buffers.programs.values()) == [program]
    model.step(cache, [7], TokenTree.chain([8] * SMALLEST_PASS))
    assert len(cache.buffers.programs) == 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_a_token_has_the_same_bits_alone_and_in_a_draft(architecture: str) -> None:
    model = GraphLM(make_tiny_model(architecture))
    alone, drafted = model.new_cache(64), model.new_cache(64)
    rows = torch.cat([model.step(alone, [token]) for token in PROMPT])
    assert torch.equal(model.step(drafted, PROMPT[:1], TokenTree.chain(PROMPT[1:])), rows)


def test_logits_outlive_the_next_pass() -> None:
    model = GraphLM(make_tiny_model("llama"))
    cache = model.new_cache(64)
    first = model.step(cache, PROMPT)
    kept = first.clone()
    model.step(cache, [7])
    assert torch.equal(first, kept)


def test_a_text_grows_beyond_what_attention_looked_at() -> None:
    hf = make_tiny_model("llama")
    model = GraphLM(hf)
    text = [3 + i % 90 for i in range(SMALLEST_VIEW + 4)]
    cache = model.new_cache(2 * SMALLEST_VIEW)
    model.step(cache, text[:-6])
    with torch.inference_mode():
        expected = hf(torch.tensor([text])).logits[0]
    for place in range(len(text) - 6, len(text)):
        torch.testing.assert_close(model.step(cache, [text[place]])[0], expected[place], rtol=1e-4, atol=1e-3)


def test_a_full_cache_is_padded_without_harm() -> None:
    """Capacity is a power of two and reached, so that all padding has no slot of its own."""
    hf = make_tiny_model("llama")
    model = GraphLM(hf)
    text = [3 + i % 90 for i in range(SMALLEST_VIEW)]
    cache = model.new_cache(SMALLEST_VIEW)
    model.step(cache, text[:-3])
    found = torch.cat([model.step(cache, [token]) for token in text[-3:]])
    with torch.inference_mode():
        expected = hf(torch.tensor([text])).logits[0, -3:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="exceed the cache"):
        model.step(cache, [7])


def test_buffers_go_from_one_session_to_the_next() -> None:
    model = GraphLM(make_tiny_model("llama"))
    expected = model.step(model.new_cache(64), PROMPT)
    gc.collect()
    first, second = model.new_cache(64), model.new_cache(64)
    model.step(first, [99] * 40)
    assert first.buffers is not second.buffers
    used = first.buffers
    del first
    gc.collect()
    third = model.new_cache(60)
    assert third.buffers is used
    assert torch.equal(model.step(third, PROMPT), expected)
    assert torch.equal(model.step(second, PROMPT), expected)


def test_sessions_take_turns() -> None:
    model = GraphLM(make_tiny_model("llama"))
    texts = [PROMPT, PROMPT[::-1]]
    alone = []
    for text in texts:
        cache = model.new_cache(64)
        alone.append(torch.cat([model.step(cache, [token]) for token in text]))
    caches = [model.new_cache(64) for _ in texts]
    rows: list[list[torch.Tensor]] = [[], []]
    for pair in zip(*texts, strict=True):
        for own, cache, token in zip(rows, caches, pair, strict=True):
            own.append(model.step(cache, [token]))
    for own, expected in zip(rows, alone, strict=True):
        assert torch.equal(torch.cat(own), expected)


# ---- the choice of the engine


def load(folder, engine: str) -> object:
    config = TargetWorkerConfig(model=folder, engine=engine, device="cpu", port=0)
    return loading.load_model(*resolve_model(folder), config)[0]


def test_the_engine_is_taken_when_asked_for(tiny_model_folder) -> None:
    folder = tiny_model_folder("gpt2")
    assert type(load(folder, "graphs")) is GraphLM
    assert type(load(folder, "auto")) is CausalLM
    assert type(load(tiny_model_folder("llama"), "auto")) is FusedLM  # there is no GPU in use


def cannot_be_recorded(*_: object, **__: object) -> None:
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_model_that_cannot_be_recorded(tiny_model_folder, monkeypatch, caplog) -> None:
    folder = tiny_model_folder("gpt2")
    monkeypatch.setattr(GraphLM, "_forward", cannot_be_recorded)
    with pytest.raises(UserError, match=r"engine graphs cannot run .*when stream is capturing.*Use engine auto"):
        load(folder, "graphs")
    model = CausalLM(make_tiny_model("gpt2"))
    assert loading._graphs(model, folder, "auto", 1) is model
    assert "passes of this model cannot be recorded" in caplog.text


@pytest.mark.parametrize("architecture", ["llama", "qwen3-mixed"])
def test_a_cache_is_counted_with_the_passes_that_are_recorded_on_it(architecture):
    model = GraphLM(make_tiny_model(architecture))
    for capacity in (200, 700):
        cache = model.new_cache(capacity)
        for start in range(0, capacity - 10, model.prefill_tokens):  # parts of a prompt, and single tokens
            held = min(start + model.prefill_tokens, capacity - 10)
            model.step(cache, [5] * (held - start))
            model.step(cache, [6])
            cache.rollback(held)
        programs = cache.buffers.programs.values()
        passes = sum(p._host_masks.nbytes + p._mask_bits.nbytes for p in programs)
        counted = model.cache_bytes(capacity)
        assert cache.nbytes() + passes <= counted <= 2 * (cache.nbytes() + passes)
