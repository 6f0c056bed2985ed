"""The memory of earlier texts against a plain search, within its bounds; the draft that learns from it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specsplit.decoding.growth import DraftSettings
from specsplit.decoding.loop import speculate
from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.engines.suffix import MOST_BEHIND, SuffixLM
from specsplit.engines.synthetic import SyntheticLM
from specsplit.engines.text_memory import MOST_LOOKED_AT, NOWHERE, TextMemory

few_tokens = st.integers(0, 2)
appended = st.lists(st.tuples(st.integers(0, 3), few_tokens), max_size=MOST_LOOKED_AT)  # text, token


def plain_search(
    texts: dict[int, list[tuple[int, int]]], space: int, text: list[int], shortest: int, longest: int, oldest: int
) -> tuple[int, list[int]]:
    """As TextMemory.followers. texts: (place, token) of each; an odd number is of space 1, an even one of space 0."""
    held = {n: [(place, token) for place, token in each if place >= oldest] for n, each in texts.items()}
    for length in range(min(longest, len(text)), shortest - 1, -1):
        found = [
            (each[i + length - 1][0], each[i + length][1])
            for n, each in held.items()
            if n % 2 == space
            for i in range(len(each) - length)
            if [token for _, token in each[i : i + length]] == text[-length:]
        ]
        if found:
            return length, [token for _, token in sorted(found, reverse=True)]
    return 0, []


@settings(max_examples=300, deadline=None)
@given(appended, st.integers(1, 3), st.integers(0, 4), st.integers(8, 80), st.lists(few_tokens, max_size=9), st.data())
def test_the_memory_finds_what_a_plain_search_finds(written, shortest, more, capacity, text, data) -> None:
    longest = shortest + more
    memory = TextMemory(capacity, shortest=shortest, longest=longest)
    texts: dict[int, list[tuple[int, int]]] = {}
    for number, token in written:
        before = texts[number][-1][0] if number in texts else NOWHERE
        texts.setdefault(number, []).append((memory.append(number % 2, token, before), token))
    space, oldest = data.draw(st.integers(0, 1)), max(0, len(written) - capacity)
    expected = plain_search(texts, space, text, shortest, longest, oldest)
    assert memory.followers(space, text) == expected


def test_the_memory_is_bounded() -> None:
    memory, place = TextMemory(100, shortest=2, longest=8), NOWHERE
    for i in range(1000):
        place = memory.append(0, i % 37, place)
    assert len(memory) == 100
    assert len(memory._newest) <= 100
    assert memory.followers(0, [5, 6]) == (2, [7, 7])


def text_of(draft: SuffixLM, prompt: list[int], gamma: int = 4) -> tuple[list[int], int]:
    rounds = list(speculate(TARGET, draft, prompt, DraftSettings(gamma), max_new_tokens=60))
    return [token for r in rounds for token in r.tokens], len(rounds)


TARGET = SyntheticLM(seed=1)


def test_a_text_that_was_written_before_comes_in_few_rounds() -> None:
    draft = SuffixLM(256)
    text, rounds = text_of(draft, [1, 2, 3])
    again, fewer = text_of(draft, [1, 2, 3])
    assert again == text
    assert rounds == 60
    assert fewer < 20
    assert text_of(SuffixLM(256), [1, 2, 3])[1] == 60  # what was learnt is the worker's


def test_it_is_told_where_candidates_come_from_and_learns_the_answer_alone() -> None:
    draft = SuffixLM(256, max_match=2)
    first = draft.new_cache(40)
    first.learn_in("a", 6)
    draft.step(first, [9, 8, 7, 9, 8, 5])
    assert (first.source_after(6), len(draft.memory)) == ("none", 2)
    draft.step(first, [6, 4], TokenTree.chain([6]))  # the node is a draft: nothing is learnt of it
    assert len(draft.memory) == 4
    cases = {"a": ([1, 8, 5], "global"), "b": ([1, 8, 5], "none"), "c": ([9, 8, 5, 9, 8], "session")}
    for memory, (prompt, source) in cases.items():
        cache = draft.new_cache(40)
        cache.learn_in(memory, len(prompt))
        logits = draft.step(cache, prompt)
        assert cache.source_after(len(prompt)) == source, memory
        assert bool(logits.isfinite().any()) == (source != "none")


def test_the_model_is_asked_where_nothing_is_found_and_reads_what_it_missed() -> None:
    model = SyntheticLM(seed=1)
    draft = SuffixLM(256, model=model)
    cache, alone = draft.new_cache(80), model.new_cache(80)
    text = [1, 2, 3, 1, 2]  # 3 comes next
    assert int(draft.step(cache, text).argmax()) == 3
    assert (cache.source_after(5), cache.model.length) == ("session", 0)
    tree = TokenTree([3, 7, 1], [ROOT, ROOT, 0], [-1.0] * 3)
    rows = draft.step(cache, (), tree)
    assert [cache.source_after(5 + i) for i in (1, 2, 3)] == ["session", "model", "session"]
    assert torch.equal(rows[1], model.step(alone, text, TokenTree([7], [ROOT], [-1.0]))[1])
    cache.keep(5, [1])
    assert cache.length == cache.model.length == 6
    draft.step(cache, [3] * MOST_BEHIND)
    assert cache.model.length <= 6
    draft.step(cache, [3])
    assert cache.model.length == cache.length
