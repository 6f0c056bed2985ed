"""int8 weights of linear layers."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from specsplit.decoding.tree import TokenTree
from specsplit.engines import transformers as engine
from specsplit.engines.quantise import MANY_ROWS, Int8Linear, quantise_linears
from specsplit.engines.transformers import CausalLM
from specsplit.errors import UserError

from tiny_models import ARCHITECTURES, SMALL, make_tiny_model, random_model

PROMPT = [5, 9, 33, 71, 12, 90, 44, 8, 101, 63, 27]


@pytest.mark.parametrize("rows", [1, 2, 7, MANY_ROWS - 1, MANY_ROWS, 70])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 5), (48, 64), (80, 49)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_with_rounded_weights(rows, inputs, outputs, bias):
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    linear.weight.data[0] = 0.0  # an output that is always nothing has no scale
    rounded = Int8Linear(linear.weight, linear.bias)
    weight = rounded.weight.float() * rounded.scale.float()[:, None]
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    assert bool(((weight - linear.weight).abs() <= step * 0.51 + 1e-9).all())  # to the nearest of its 255 values
    hidden = torch.randn(1, rows, inputs).bfloat16()
    expected = hidden.float() @ weight.T + (linear.bias.bfloat16().float() if bias else 0)
    found = rounded(hidden)
    assert found.shape == (1, rows, outputs)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


def int8_model(architecture: str) -> CausalLM:
    model = make_tiny_model(architecture).bfloat16()
    assert quantise_linears(model)
    return CausalLM(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trees_and_the_cache_stay_right(architecture):
    """A tree after a cached prompt, a rollback and a compaction give what plain passes over the same text give."""
    model = int8_model(architecture)
    model.check_tree_attention()
    assert isinstance(model.model.get_output_embeddings(), Int8Linear)

    def plain(tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].float()

    def same(found: torch.Tensor, tokens: list[int]) -> bool:
        return bool(torch.cosine_similarity(found.float(), plain(tokens), dim=0) > 0.999)

    cache = model.new_cache(64)
    model.step(cache, PROMPT[:7])
    tree = TokenTree([5, 6, 7, 8, 9], [-1, -1, 0, 1, 3], [-1.0] * 5)
    found = model.step(cache, PROMPT[7:], tree)
    for row, path in enumerate([[], [5], [6], [5, 7], [6, 8], [6, 8, 9]]):
        assert same(found[row], PROMPT + path)
    assert not same(found[4], [*PROMPT, 5, 7])  # so that a wrong branch would be seen
    cache.keep(len(PROMPT), [1, 3])
    assert same(model.step(cache, [44])[-1], [*PROMPT, 6, 8, 44])
    cache.rollback(4)
    assert same(model.step(cache, PROMPT[4:])[-1], PROMPT)


def test_logits_do_not_depend_on_what_else_is_in_the_pass():
    model = int8_model("llama")
    alone = model.step(model.new_cache(32), PROMPT)[0]
    cache = model.new_cache(32)
    beside = model.step(cache, PROMPT, TokenTree([17, 18, 19], [-1, -1, -1], [-1.0] * 3))[0]
    torch.testing.assert_close(alone.float(), beside.float(), rtol=0.02, atol=0.02 * float(alone.abs().max()))


def test_a_tied_embedding_stays_as_it_is():
    model = random_model(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)).bfloat16()
    before = model.get_input_embeddings().weight.clone()
    quantise_linears(model)
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert model.get_output_embeddings().weight.dtype == torch.int8
    assert CausalLM(model).vocab_size == len(before)


def test_what_the_kernel_cannot_take_stays(tiny_model_folder):
    model = random_model(transformers.LlamaConfig(**{**SMALL, "intermediate_size": 24})).bfloat16()
    assert quantise_linears(model) == 3 * 6 + 1  # of 7 in a layer, down_proj has 24 inputs
    kinds = {type(layer.mlp.down_proj) for layer in model.model.layers}
    assert kinds == {nn.Linear}
    CausalLM(model).check_tree_attention()


def test_loading(tiny_model_folder, monkeypatch):
    folder = tiny_model_folder("llama")
    model = CausalLM.load(folder, dtype="int8", device="cpu", skip_layers=[1])
    assert model.dtype == torch.bfloat16
    assert model.num_layers == 2
    assert type(model.model.model.layers[1].mlp.up_proj) is Int8Linear
    exact = CausalLM.load(folder, device="cpu", skip_layers=[1])
    found, expected = (m.step(m.new_cache(16), PROMPT)[0].float() for m in (model, exact))
    assert torch.cosine_similarity(found, expected, dim=0) > 0.99
    monkeypatch.setattr(engine, "pick_device", lambda name: torch.device("cuda:0"))
    with pytest.raises(UserError, match="int8 is for the CPU, not for cuda:0"):
        CausalLM.load(folder, dtype="int8")


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="only bfloat16"):
        quantise_linears(make_tiny_model("llama"))
    with pytest.raises(UserError, match="int8 is for the CPU, not for meta"):
        quantise_linears(make_tiny_model("llama").bfloat16().to("meta"))
