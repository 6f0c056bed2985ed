"""The model behind four operations, for every architecture."""

from __future__ import annotations

import pytest
import torch
import transformers

from specsplit.decoding.tree import TokenTree
from specsplit.errors import UserError
from specsplit.models import causal_lm
from specsplit.models.causal_lm import CausalLM
from specsplit.models.kv_cache import KVCache

from conftest import ARCHITECTURES, COMMON, make_tiny_model

PROMPT = [5, 9, 33, 71, 12, 90, 44, 8, 101, 63, 27]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_transformers(architecture):
    model = make_tiny_model(architecture)
    ours = CausalLM(model)
    cache = ours.new_cache(64)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    for i, token in enumerate(PROMPT):
        torch.testing.assert_close(ours.step(cache, [token])[0], expected[i], rtol=1e-4, atol=1e-3)
    cache.rollback(0)
    torch.testing.assert_close(ours.step(cache, PROMPT)[0], expected[-1], rtol=1e-4, atol=1e-3)
    cache.rollback(3)
    chain = ours.step(cache, PROMPT[3:5], TokenTree.chain(PROMPT[5:]))
    torch.testing.assert_close(chain, expected[4:], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("length", [3, 4, 5, 8, 9])
def test_long_prompts_are_fed_in_chunks(monkeypatch, length):
    model = CausalLM(make_tiny_model("llama"))
    tokens = list(range(10, 10 + length))
    tree = TokenTree([3, 4, 5], [-1, -1, 0], [-1.0] * 3)
    expected = model.step(model.new_cache(64), tokens, tree)
    monkeypatch.setattr(causal_lm, "PREFILL_CHUNK", 4)
    cache = model.new_cache(64)
    torch.testing.assert_close(model.step(cache, tokens, tree), expected, rtol=1e-4, atol=1e-3)
    assert cache.length == length + 3


def test_the_cache_is_allocated_once_and_bounded():
    model = CausalLM(make_tiny_model("llama"))
    cache = model.new_cache(16)
    model.step(cache, [5, 6])
    before = [layer.keys.data_ptr() for layer in cache.layers]
    size = cache.nbytes()
    model.step(cache, [7, 8], TokenTree.chain([9, 10]))
    cache.keep(4, [0])
    assert [layer.keys.data_ptr() for layer in cache.layers] == before
    assert cache.nbytes() == size == 3 * 2 * 2 * 16 * 8 * 4  # layers, keys and values, heads, slots, dimension, bytes
    with pytest.raises(ValueError, match="exceed the cache of 16"):
        model.step(cache, list(range(12)))
    with pytest.raises(ValueError, match="at least one token"):
        model.step(cache, [])


@pytest.mark.parametrize("length", [-1, 3])
def test_rollback_only_to_what_is_held(length):
    cache = KVCache(1, 8)
    cache.advance(2)
    with pytest.raises(ValueError, match=f"roll back to {length}"):
        cache.rollback(length)


@pytest.mark.parametrize(("path", "message"), [([1, 1], "must increase"), ([2, 1], "must increase"), ([3], "beyond")])
def test_keep_checks_the_path(path, message):
    cache = KVCache(1, 8)
    cache.advance(4)
    with pytest.raises(ValueError, match=message):
        cache.keep(1, path)


def test_a_pass_that_fails_leaves_the_cache_as_it_was(monkeypatch):
    model = CausalLM(make_tiny_model("llama"))
    cache = model.new_cache(32)
    model.step(cache, PROMPT[:5])
    layer = model.model.model.layers[1]
    original = layer.forward

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(layer, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.step(cache, PROMPT[5:8])
    assert cache.length == 5
    monkeypatch.setattr(layer, "forward", original)
    expected = model.step(model.new_cache(32), PROMPT[:8])
    torch.testing.assert_close(model.step(cache, PROMPT[5:8]), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_skipped_layers(architecture, tmp_path):
    """The model without a layer is the model made of the others."""
    model = make_tiny_model(architecture)
    model.save_pretrained(tmp_path)
    skipped = CausalLM.load(tmp_path, device="cpu", skip_layers=[1])
    assert skipped.num_layers == 2
    full = CausalLM(model)
    layers = model.transformer.h if architecture == "gpt2" else model.model.layers
    layers[1].forward = lambda hidden, *args, **kwargs: hidden
    # The full model with its second layer passed over, without a cache.
    with torch.inference_mode():
        expected = full.model(torch.tensor([PROMPT]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(skipped.step(skipped.new_cache(32), PROMPT)[0], expected, rtol=1e-4, atol=1e-3)


def test_mistakes_are_named(tmp_path, tiny_model_folder):
    folder = tiny_model_folder("llama")
    with pytest.raises(UserError, match="dtype 'int3' is not one of"):
        CausalLM.load(folder, dtype="int3")
    with pytest.raises(UserError, match="device 'tpu' is not one of"):
        CausalLM.load(folder, device="tpu")
    with pytest.raises(UserError, match="cuda:99"):
        CausalLM.load(folder, device="cuda:99")
    with pytest.raises(UserError, match=r"skip_layers \[7\]: the model has layers 0 to 2"):
        CausalLM.load(folder, skip_layers=[7])
    with pytest.raises(UserError, match="one must remain"):
        CausalLM.load(folder, skip_layers=[0, 1, 2])
    with pytest.raises(UserError, match="does not hold a model"):
        CausalLM.load(tmp_path)


def test_models_that_cannot_roll_back_are_refused(tmp_path):
    config = transformers.MambaConfig(**COMMON, hidden_size=16, num_hidden_layers=1, state_size=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="Mamba"):
        CausalLM.load(tmp_path)


def test_half_precision_and_eos_ids(tiny_model_folder):
    model = CausalLM.load(tiny_model_folder("llama"), dtype="bfloat16", device="cpu")
    assert model.step(model.new_cache(8), [5, 6]).dtype == torch.bfloat16
    assert model.eos_token_ids == (2,)
