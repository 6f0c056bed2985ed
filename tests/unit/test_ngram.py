"""Prompt lookup: the longest suffix first, counts of what followed, the most recent first; in trees as well."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.engines.ngram import NGramLM

VOCAB = 64


def logits_after(text: list[int], **settings: int) -> torch.Tensor:
    model = NGramLM(VOCAB, **settings)
    return model.step(model.new_cache(len(text)), text)[0]


def candidates(logits: torch.Tensor) -> list[int]:
    """The tokens that can be drafted, the likeliest first."""
    order = logits.argsort(descending=True).tolist()
    return [token for token in order if logits[token] > -math.inf]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3, 4, 1, 2, 3], [4]),
        ([7, 8, 7], [8]),
        ([5, 5], [5]),  # occurrences may overlap the suffix
        ([5, 5, 5], [5]),
        ([1, 2, 9, 3, 2, 8, 1, 2], [9]),  # two tokens match once: what followed one token does not count
        ([1, 9, 1, 8, 1], [8, 9]),  # equally often: the most recent first
        ([1, 9, 1, 8, 1, 9, 1, 8, 1, 7, 1, 9, 2, 1], [9, 8, 7]),
        ([1, 2, 3], []),
        ([4], []),
    ],
)
def test_what_followed_the_last_tokens_before(text: list[int], expected: list[int]) -> None:
    assert candidates(logits_after(text, max_ngram=2)) == expected


def test_the_longest_suffix_decides_up_to_max_ngram() -> None:
    text = [1, 2, 3, 10, 9, 2, 3, 11, 9, 3, 12, 3, 12, 1, 2, 3]
    assert candidates(logits_after(text, max_ngram=3)) == [10]
    assert candidates(logits_after(text, max_ngram=2)) == [11, 10]
    assert candidates(logits_after(text, max_ngram=1)) == [12, 11, 10]
    assert candidates(logits_after(text, max_ngram=9)) == [10]


def test_a_match_shorter_than_min_ngram_does_not_count() -> None:
    text = [1, 2, 9, 3, 2]
    assert candidates(logits_after(text, min_ngram=1)) == [9]
    assert candidates(logits_after(text, min_ngram=2)) == []
    assert torch.equal(logits_after(text, min_ngram=2), torch.full((VOCAB,), -math.inf))


def test_probabilities_are_the_shares_of_the_counts() -> None:
    probabilities = logits_after([1, 9, 1, 9, 1, 8, 1, 9, 1], max_ngram=1).softmax(-1)
    assert probabilities[9].item() == pytest.approx(0.75, abs=0.01)
    assert probabilities[8].item() == pytest.approx(0.25, abs=0.01)
    assert probabilities.sum().item() == pytest.approx(1)


def test_a_range_that_is_none_is_refused() -> None:
    for bad in ({"max_ngram": 1, "min_ngram": 2}, {"min_ngram": 0}):
        with pytest.raises(ValueError, match="min_ngram"):
            NGramLM(VOCAB, **bad)


def plain_lookup(text: list[int], longest: int, shortest: int) -> list[int]:
    """The candidates in order, by the plainest search."""
    for n in range(longest, shortest - 1, -1):
        followers = [text[i + n] for i in range(len(text) - n) if text[i : i + n] == text[-n:]]
        if followers:
            last = {token: i for i, token in enumerate(followers)}
            return sorted(last, key=lambda token: (-Counter(followers)[token], -last[token]))
    return []


few_tokens = st.integers(0, 3)


@settings(max_examples=300, deadline=None)
@given(st.lists(few_tokens, min_size=1, max_size=60), st.integers(1, 4), st.integers(1, 4))
def test_as_a_plain_search_finds_it(text: list[int], shortest: int, more: int) -> None:
    longest = shortest + more - 1
    found = candidates(logits_after(text, max_ngram=longest, min_ngram=shortest))
    assert found == plain_lookup(text, longest, shortest)


def test_many_equal_counts_are_still_told_apart_in_float32() -> None:
    text = [0, *(t for _ in range(2) for i in range(1, 1001) for t in (i, 0))]
    model = NGramLM(5000, max_ngram=1)
    logits = model.step(model.new_cache(len(text)), text)[0]
    assert candidates(logits) == list(range(1000, 0, -1))


# ---- trees and caches


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_node_is_answered_as_the_text_that_its_path_spells(data: st.DataObject) -> None:
    model = NGramLM(VOCAB)
    cache, text = model.new_cache(96), []
    for _ in range(data.draw(st.integers(1, 4), label="rounds")):
        text = text[: data.draw(st.integers(0, len(text)), label="rollback")]
        cache.rollback(len(text))
        new = data.draw(st.lists(few_tokens, min_size=1, max_size=8), label="tokens")
        tree = TokenTree()
        for i in range(data.draw(st.integers(0, 6), label="nodes")):
            tree.add(data.draw(few_tokens), data.draw(st.integers(ROOT, i - 1), label="parent"), -1.0)
        first = data.draw(st.integers(0, len(tree)), label="nodes of the first pass")
        part = TokenTree(tree.token_ids[:first], tree.parents[:first], tree.log_probs[:first])
        rows = [model.step(cache, new, part)]
        if first < len(tree):
            rows.append(model.step(cache, (), tree, first))
        logits = torch.cat(rows)
        text = text + new
        paths: list[list[int]] = []
        for node, parent in enumerate(tree.parents):
            paths.append([*(paths[parent] if parent != ROOT else []), node])
        assert logits.shape == (1 + len(tree), VOCAB)
        for row, path in zip(logits, [[], *paths], strict=True):
            assert torch.equal(row, logits_after(text + [tree.token_ids[i] for i in path]))
        kept = data.draw(st.sampled_from([[], *paths]), label="kept")
        cache.keep(len(text), kept)
        text = text + [tree.token_ids[i] for i in kept]
        assert cache.slots[: cache.length].tolist() == text


def test_a_tree_can_stand_on_an_empty_context() -> None:
    model = NGramLM(VOCAB)
    logits = model.step(model.new_cache(8), (), TokenTree.chain([1, 2, 1]))
    assert [candidates(row) for row in logits] == [[], [], [2]]


def test_a_refused_pass_leaves_the_cache_as_it_was() -> None:
    model = NGramLM(VOCAB)
    cache = model.new_cache(3)
    model.step(cache, [1, 2])
    with pytest.raises(ValueError, match="exceed the cache of 3"):
        model.step(cache, [1, 2])
    assert candidates(model.step(cache, [1])[0]) == [2]
