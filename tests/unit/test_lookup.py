"""Prompt lookup: what followed the last tokens where they occurred before."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specsplit.decoding.lookup import COMPARED, LOOKUP, Lookup, MatchRates, draft_from


def found_by_search(text: list[int], least: int, gamma: int) -> tuple[int, list[int]]:
    """Tokens of the end of the text that occurred before, as many as there are, and what followed them at last."""
    for size in range(min(max(COMPARED, least), len(text) - 1), least - 1, -1):
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == text[-size:]:
                return size, text[start + size : start + size + gamma]
    return 0, []


@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    cuts=st.sets(st.integers(1, 59)),
    least=st.integers(1, 4),
    gamma=st.integers(0, 5),
)
def test_it_finds_what_a_search_finds(text: list[int], cuts: set[int], least: int, gamma: int) -> None:
    lookup = Lookup(least)
    for end in sorted({*(cut for cut in cuts if cut < len(text)), len(text)}):
        match = lookup.find(text[:end])
        tree = draft_from(match, text[:end], gamma, (), certain=False)
        assert (match.tokens if match else 0, tree.token_ids) == found_by_search(text[:end], least, gamma)
        assert tree.is_chain
        assert not tree.distributions
        assert tree.source == (LOOKUP if tree.token_ids else "")


def test_nothing_is_drafted_after_a_stop_token() -> None:
    text = [1, 2, 3, 9, 4, 1, 2]
    assert draft_from(Lookup(2).find(text), text, 5, {9}, certain=False).token_ids == [3, 9]


def test_with_rejection_sampling_each_token_has_its_distribution_to_itself() -> None:
    text = [1, 2, 3, 1]
    tree = draft_from(Lookup(1).find(text), text, 2, (), certain=True)
    assert tree.distributions == {-1: ([2], [1.0]), 0: ([3], [1.0])}
    tree.validate(vocab_size=4)
    tree.check_drawn()


@pytest.mark.parametrize(("rate", "gamma"), [(0.05, 0), (0.15, 1), (0.5, 3), (0.97, 12)])
def test_the_draft_from_a_match_is_as_long_as_it_pays(rate: float, gamma: int) -> None:
    """A token costs 1 ms beside others and 10 alone, so it has to be right in a tenth of the rounds."""
    chance, rates = random.Random(0), {agreed: MatchRates() for agreed in (1, 3, 8, 16)}
    for agreed, learnt in rates.items():
        for _ in range(400):
            accepted = 0
            while accepted < 3 and chance.random() < rate:
                accepted += 1
            learnt.observe(agreed, 3, accepted)
        assert abs(learnt.rate(agreed) - rate) < 0.12
        assert abs(learnt.gamma(agreed, [10.0 + drafted for drafted in range(13)]) - gamma) <= 1
        assert MatchRates(learnt).gamma(agreed, [10.0, 11.0]) == learnt.gamma(agreed, [10.0, 11.0])


def test_longer_matches_have_a_rate_of_their_own_and_what_is_long_past_fades() -> None:
    rates = MatchRates()
    first = rates.rate(2), rates.rate(8)
    assert first[0] < first[1]
    for _ in range(50):
        rates.observe(8, 4, 0)
    assert rates.rate(8) < 0.1
    assert rates.rate(2) == first[0]
    for _ in range(4000):
        rates.observe(0, 0, 0)
    assert abs(rates.rate(8) - first[1]) < 0.01
