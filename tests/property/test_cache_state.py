"""Whatever passes, rollbacks and kept paths came before: the cache is that of a fresh prefill of the same tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.engines.cuda_graphs import GraphLM
from specsplit.engines.transformers import CausalLM

from tiny_models import ARCHITECTURES, VOCAB, make_tiny_model

CAPACITY = 96
LOADED = {architecture: CausalLM(make_tiny_model(architecture)) for architecture in ARCHITECTURES} | {
    f"{architecture}, graphs": GraphLM(make_tiny_model(architecture)) for architecture in ("gpt2", "qwen3-mixed")
}
tokens = st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=6)


@torch.inference_mode()
def plain_logits(model: CausalLM, text: list[int]) -> torch.Tensor:
    """Logits of the token after `text`, from transformers alone: no cache, no mask of ours."""
    return model.model(torch.tensor([text]), use_cache=False).logits[0, -1]


def assert_same_logits(found: torch.Tensor, model: CausalLM, text: list[int]) -> None:
    torch.testing.assert_close(found, plain_logits(model, text), rtol=1e-4, atol=1e-3)


def assert_same_cache(model: CausalLM, cache, held: list[int]) -> None:
    assert cache.length == len(held)
    if not held:
        return
    expected = model.new_cache(CAPACITY)
    model.step(expected, held)
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        for name in ("keys", "values"):
            a, b = (getattr(layer, name)[:, :, : len(held)] for layer in (ours, theirs))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    if cache.states is not None:
        with torch.inference_mode():
            states = model.model(torch.tensor([held]), output_hidden_states=True, use_cache=False).hidden_states
        tapped = torch.cat([states[layer][0] for layer in cache.taps], dim=-1)
        torch.testing.assert_close(cache.states[: len(held)], tapped, rtol=1e-4, atol=1e-4)


def fail_in_layer(model: CausalLM, number: int, cache, new: list[int]) -> None:
    """A pass that breaks when it reaches this layer; the ones before it have written their keys by then."""

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    decoder = model.model.transformer.h if hasattr(model.model, "transformer") else model.model.model.layers
    hook = decoder[number].register_forward_pre_hook(broken)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            model.step(cache, new)
    finally:
        hook.remove()


def random_tree(data, max_nodes: int = 8) -> TokenTree:
    tree = TokenTree()
    for i in range(data.draw(st.integers(0, max_nodes), label="nodes")):
        # Its own token for every node, so that siblings differ.
        tree.add(3 + i, data.draw(st.integers(ROOT, i - 1), label="parent"), -1.0)
    return tree


@pytest.mark.parametrize("architecture", LOADED)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_sequence_of_operations(architecture, data):
    model = LOADED[architecture]
    cache, held = model.new_cache(CAPACITY), []
    if model.taps:
        cache.tap((0, model.num_layers - 1))
    for _ in range(data.draw(st.integers(1, 5), label="operations")):
        kind = data.draw(st.sampled_from(["step", "tree", "levels", "rollback", "failure"]), label="operation")
        if kind == "rollback":
            held = held[: data.draw(st.integers(0, len(held)), label="length")]
            cache.rollback(len(held))
            continue
        new = data.draw(tokens, label="tokens")
        if cache.length + len(new) + 8 > CAPACITY:
            break
        if kind == "failure":
            fail_in_layer(model, data.draw(st.integers(0, model.num_layers - 1), label="layer"), cache, new)
            assert_same_cache(model, cache, held)
            continue
        if kind == "step":
            logits = model.step(cache, new)
            held = held + new
            assert_same_logits(logits[0], model, held)
            continue
        tree = random_tree(data)
        if kind == "tree":
            logits = model.step(cache, new, tree)
        else:  # the draft worker's way: the context first, then the nodes a few at a time
            rows = [model.step(cache, new)]
            done = 0
            while done < len(tree):
                upto = data.draw(st.integers(done + 1, len(tree)), label="upto")
                prefix = TokenTree(tree.token_ids[:upto], tree.parents[:upto], tree.log_probs[:upto])
                rows.append(model.step(cache, (), prefix, done))
                done = upto
            logits = torch.cat(rows)
        held = held + new
        assert logits.shape == (1 + len(tree), model.vocab_size)
        node = data.draw(st.integers(ROOT, len(tree) - 1), label="kept")
        path: list[int] = []
        while node != ROOT:
            path.insert(0, node)
            node = tree.parents[node]
        spelled = [tree.token_ids[i] for i in path]
        row = logits[1 + path[-1]] if path else logits[0]
        assert_same_logits(row, model, held + spelled)
        cache.keep(len(held), path)
        held = held + spelled
        assert_same_cache(model, cache, held)
    assert_same_cache(model, cache, held)
