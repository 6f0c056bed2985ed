"""The contract of engines: a pass happens for all of its sessions or for none, wherever it fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from specsplit.decoding.sampling import GREEDY
from specsplit.decoding.tree import TokenTree
from specsplit.engines import numba, synthetic, transformers
from specsplit.engines.cuda_graphs import GraphLM
from specsplit.engines.gpu import GpuLM
from specsplit.engines.hidden_states import HiddenStatesHead
from specsplit.engines.ngram import NGramLM
from specsplit.engines.numba import FusedLM
from specsplit.engines.numba_head import FusedHead
from specsplit.engines.passes import EMPTY, Pass, Propose
from specsplit.engines.suffix import SuffixLM
from specsplit.engines.synthetic import SyntheticLM
from specsplit.engines.transformers import CausalLM
from tiny_heads import make_tiny_head

from tiny_models import VOCAB, make_tiny_model

CAPACITY = 48
# Each engine, and what it calls in the middle of a pass: (owner, name of the function). The next engine is one line.
ENGINES: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "transformers": (lambda: CausalLM(make_tiny_model("llama")), CausalLM, "_forward"),
    "graphs": (lambda: GraphLM(make_tiny_model("llama")), GraphLM, "_forward"),
    "gpu": (lambda: GpuLM(CausalLM(make_tiny_model("llama"))), GpuLM, "_run"),
    "fused": (lambda: FusedLM(CausalLM(make_tiny_model("llama")), 1), FusedLM, "_run"),
    "fused, chain": (lambda: FusedLM(CausalLM(make_tiny_model("llama")), 1), FusedLM, "_best"),
    "head": (lambda: HiddenStatesHead(make_tiny_head(make_tiny_model("llama"))), HiddenStatesHead, "_forward"),
    "fused head": (
        lambda: FusedHead(HiddenStatesHead(make_tiny_head(make_tiny_model("llama"))), 1),
        FusedHead,
        "_run",
    ),
    "synthetic": (lambda: SyntheticLM(vocab_size=256), SyntheticLM, "_logits"),
    "ngram": (lambda: NGramLM(256), NGramLM, "_fill"),
    "suffix": (lambda: SuffixLM(256), SuffixLM, "_found"),
    "suffix, model": (lambda: SuffixLM(256, model=CausalLM(make_tiny_model("llama"))), CausalLM, "_forward"),
}


def batch(model: Any, engine: str) -> list[Pass]:
    """Three sessions: a new one with a prompt of several chunks, one with a draft, one that decodes."""
    then = Propose(GREEDY, VOCAB, steps=3) if engine == "fused, chain" else None
    tokens = [[5 + i for i in range(28)], [9], [12]]
    trees = [EMPTY, TokenTree.chain([33, 71]), EMPTY]
    passes = [Pass(model.new_cache(CAPACITY), *each, then=then) for each in zip(tokens, trees, strict=True)]
    if size := getattr(model, "state_size", 0):
        passes = [replace(p, states=torch.ones(len(p.tokens), size)) for p in passes]
    for p in passes[1:]:
        more = {"states": torch.ones(4, size)} if size else {}
        model.step(p.cache, [7, 8, 9, 7], **more)
    return passes


def same(found: Any, expected: Any) -> bool:
    return torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "PREFILL_CHUNK", 8)
    monkeypatch.setattr(numba, "CHUNK", 8)


@pytest.mark.parametrize("place", [1, 2, 3, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_pass_that_fails_anywhere_has_happened_for_nobody(
    engine: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, owner, name = ENGINES[engine]
    model = make()
    expected = model.step_many(batch(model, engine))
    passes = batch(model, engine)
    held = [p.cache.length for p in passes]
    work, calls = getattr(owner, name), 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == place:
            raise MemoryError
        return work(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing)
        if engine == "synthetic" and place == 4:  # its three sessions are done: the wait that stands for the work fails
            patched.setattr(synthetic, "_wait_until", lambda deadline: failing())
        with pytest.raises(MemoryError):
            model.step_many(passes)
    assert [p.cache.length for p in passes] == held
    assert all(map(same, model.step_many(passes), expected))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_session_that_does_not_fit_stops_the_pass_of_all(engine: str) -> None:
    model = ENGINES[engine][0]()
    passes = [*batch(model, engine), Pass(model.new_cache(2), [5, 6, 7])]
    held = [p.cache.length for p in passes]
    with pytest.raises(ValueError, match="exceed the cache of 2"):
        model.step_many(passes)
    assert [p.cache.length for p in passes] == held
