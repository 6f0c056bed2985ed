"""The simulated model: a text that depends on every token before, acceptance as asked for, time as asked for."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.engines import synthetic
from specsplit.engines.synthetic import SyntheticLM
from specsplit.engines.token_cache import TokenCache

CAPACITY = 96
TARGET = SyntheticLM(seed=3)
DRAFT = SyntheticLM(seed=3, acceptance=0.7)


def greedy(model: SyntheticLM, prompt: list[int], count: int) -> list[int]:
    cache, text, fed = model.new_cache(len(prompt) + count), [], prompt
    for _ in range(count):
        fed = [int(model.step(cache, fed)[-1].argmax())]
        text += fed
    return text


def prefill(model: SyntheticLM, text: list[int]) -> torch.Tensor:
    """Logits after `text`, from a cache of its own."""
    return model.step(model.new_cache(len(text)), text)[0]


# ---- the text


def test_the_text_is_a_function_of_prompt_and_seed() -> None:
    text = greedy(TARGET, [1, 2, 3], 60)
    assert greedy(SyntheticLM(seed=3), [1, 2, 3], 60) == text
    assert greedy(SyntheticLM(seed=4), [1, 2, 3], 60) != text
    assert len(set(text)) > 20
    assert bytes(text).decode("ascii").isprintable()


@pytest.mark.parametrize("changed", range(12))
def test_every_token_before_decides_what_follows(changed: int) -> None:
    prompt = list(range(40, 52))
    other = [*prompt[:changed], 99, *prompt[changed + 1 :]]
    swapped = [*prompt[:changed], *prompt[changed:][::-1]]
    texts = {tuple(greedy(TARGET, p, 8)) for p in (prompt, other, prompt[1:], swapped)}
    assert len(texts) == (4 if changed < 11 else 3)  # the last slice reversed is the prompt itself


def test_logits_are_finite_and_near_certain_for_the_target() -> None:
    logits = prefill(TARGET, [5])
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert logits.softmax(-1).max() > 0.999
    assert len(logits.unique()) == TARGET.vocab_size


def test_a_larger_vocabulary_writes_the_same_text() -> None:
    assert greedy(SyntheticLM(seed=3, vocab_size=1000), [9], 30) == greedy(TARGET, [9], 30)
    assert prefill(SyntheticLM(vocab_size=1000), [999]).shape == (1000,)


# ---- caches and trees


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_sequence_of_passes_gives_the_logits_of_a_plain_prefill(data: st.DataObject) -> None:
    model = data.draw(st.sampled_from([TARGET, DRAFT]), label="model")
    cache, text = model.new_cache(CAPACITY), []
    tokens = st.lists(st.integers(0, 255), min_size=1, max_size=6)
    for _ in range(data.draw(st.integers(1, 6), label="rounds")):
        text = text[: data.draw(st.integers(0, len(text)), label="rollback")]
        cache.rollback(len(text))
        new = data.draw(tokens, label="tokens")
        tree = TokenTree()
        for i in range(data.draw(st.integers(0, 8), label="nodes")):
            tree.add(i, data.draw(st.integers(ROOT, i - 1), label="parent"), -1.0)
        rows, done = [], 0
        if data.draw(st.booleans(), label="at once"):
            rows, done = [model.step(cache, new, tree)], len(tree)
        else:
            rows = [model.step(cache, new)]
        while done < len(tree):
            upto = data.draw(st.integers(done + 1, len(tree)), label="upto")
            part = TokenTree(tree.token_ids[:upto], tree.parents[:upto], tree.log_probs[:upto])
            rows.append(model.step(cache, (), part, done))
            done = upto
        logits = torch.cat(rows)
        text = text + new
        assert logits.shape == (1 + len(tree), model.vocab_size)
        assert torch.equal(logits[0], prefill(model, text))
        paths = [path_to(tree, node) for node in range(len(tree))]
        for node, path in enumerate(paths):
            assert torch.equal(logits[1 + node], prefill(model, text + [tree.token_ids[i] for i in path]))
        path = data.draw(st.sampled_from([[], *paths]), label="kept")
        cache.keep(len(text), path)
        text = text + [tree.token_ids[i] for i in path]
        assert cache.length == len(text)


def path_to(tree: TokenTree, node: int) -> list[int]:
    path: list[int] = []
    while node != ROOT:
        path.insert(0, node)
        node = tree.parents[node]
    return path


def test_a_cache_that_kept_the_wrong_path_writes_another_text() -> None:
    tree = TokenTree([10, 20], [ROOT, ROOT], [-1.0, -1.0])
    caches = TARGET.new_cache(8), TARGET.new_cache(8)
    for cache, kept in zip(caches, (0, 1), strict=True):
        TARGET.step(cache, [1, 2], tree)
        cache.keep(2, [kept])
    right, wrong = (TARGET.step(cache, [30])[0] for cache in caches)
    assert torch.equal(right, prefill(TARGET, [1, 2, 10, 30]))
    assert not torch.equal(wrong, right)


def test_a_pass_that_is_refused_leaves_the_cache_as_it_was() -> None:
    cache = TARGET.new_cache(3)
    TARGET.step(cache, [1, 2])
    with pytest.raises(ValueError, match="exceed the cache of 3"):
        TARGET.step(cache, [3, 4])
    assert (cache.length, cache.capacity) == (2, 3)
    assert torch.equal(TARGET.step(cache, [3])[0], prefill(TARGET, [1, 2, 3]))


# ---- acceptance


def ranks_of_the_text(draft: SyntheticLM, target: SyntheticLM, prompt: list[int], count: int) -> list[int]:
    """Rank (1 = first) of the target's token among the draft's candidates, at each position of the target's text."""
    text = greedy(target, prompt, count)
    tree = TokenTree.chain(text[:-1])
    logits = draft.step(draft.new_cache(len(prompt) + count), prompt, tree)
    own = logits.gather(1, torch.tensor(text)[:, None])
    return (1 + (logits > own).sum(-1)).tolist()


@pytest.mark.parametrize("alpha", [0.3, 0.8, 0.95])
def test_the_targets_token_has_a_geometric_rank(alpha: float) -> None:
    count = 5000
    ranks = ranks_of_the_text(SyntheticLM(seed=3, acceptance=alpha), TARGET, [1, 2, 3], count)
    left = count
    for rank in (1, 2, 3):  # of those that are not among the first, alpha again
        hits = ranks.count(rank)
        assert abs(hits - alpha * left) < 3.5 * math.sqrt(left * alpha * (1 - alpha)), rank
        left -= hits


def test_acceptance_does_not_come_in_streaks() -> None:
    right = [rank == 1 for rank in ranks_of_the_text(DRAFT, TARGET, [8], 5000)]
    after_hit = [b for a, b in pairwise(right) if a]
    after_miss = [b for a, b in pairwise(right) if not a]
    for group in (after_hit, after_miss):
        assert abs(sum(group) - 0.7 * len(group)) < 3.5 * math.sqrt(len(group) * 0.21)


def test_the_draft_gives_its_candidates_the_probability_that_they_are_right() -> None:
    expected = [0.7 * 0.3**r for r in range(6)]
    found = prefill(DRAFT, [4, 4, 4]).softmax(-1).sort(descending=True).values[:6]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_acceptance_one_is_the_target_itself() -> None:
    assert ranks_of_the_text(SyntheticLM(seed=3, acceptance=1.0), TARGET, [2], 500) == [1] * 500


def test_a_draft_of_another_seed_is_hardly_ever_right() -> None:
    ranks = ranks_of_the_text(SyntheticLM(seed=4, acceptance=0.9), TARGET, [2], 2000)
    assert ranks.count(1) < 60  # one printable byte in 95


# ---- time


@pytest.mark.parametrize(("fed", "expected_ms"), [(1, 5.5), (4, 7.0)])
def test_a_pass_lasts_as_long_as_asked_from_its_start(
    monkeypatch: pytest.MonkeyPatch, fed: int, expected_ms: float
) -> None:
    """On a clock of our own: computing takes 1 ms, and sleep wakes up late."""
    now, computed = [100.0], TokenCache.write

    def sleep(seconds: float) -> None:
        now[0] += seconds + 70e-6

    def write(self: TokenCache, values: list[int]) -> None:
        now[0] += 1e-3
        computed(self, values)

    def read() -> float:
        now[0] += 1e-6
        return now[0]

    monkeypatch.setattr(synthetic, "time", SimpleNamespace(perf_counter=read, sleep=sleep))
    monkeypatch.setattr(TokenCache, "write", write)
    model = SyntheticLM(step_ms=5, token_ms=0.5)
    model.step(model.new_cache(8), list(range(fed)))
    assert (now[0] - 100) * 1e3 == pytest.approx(expected_ms, abs=0.005)
