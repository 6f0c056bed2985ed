"""Prompt lookup: what followed the last tokens where they occurred before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from specsplit.decoding.lookup import LONGER, LOOKUP, Lookup


def found_by_search(text: list[int], least: int, gamma: int) -> list[int]:
    """What followed the latest earlier occurrence of the end of the text, of as many tokens as there is one of."""
    for size in range(min(least + LONGER, len(text) - 1), least - 1, -1):
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == text[-size:]:
                return text[start + size : start + size + gamma]
    return []


@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    cuts=st.sets(st.integers(1, 59)),
    least=st.integers(1, 4),
    gamma=st.integers(0, 5),
)
def test_it_finds_what_a_search_finds(text: list[int], cuts: set[int], least: int, gamma: int) -> None:
    lookup = Lookup(least)
    for end in sorted({*(cut for cut in cuts if cut < len(text)), len(text)}):
        tree = lookup.draft(text[:end], gamma, (), certain=False)
        assert tree.token_ids == found_by_search(text[:end], least, gamma)
        assert tree.is_chain
        assert not tree.distributions
        assert tree.source == (LOOKUP if tree.token_ids else "")


def test_nothing_is_drafted_after_a_stop_token() -> None:
    assert Lookup(2).draft([1, 2, 3, 9, 4, 1, 2], 5, {9}, certain=False).token_ids == [3, 9]


def test_with_rejection_sampling_each_token_has_its_distribution_to_itself() -> None:
    tree = Lookup(1).draft([1, 2, 3, 1], 2, (), certain=True)
    assert tree.distributions == {-1: ([2], [1.0]), 0: ([3], [1.0])}
    tree.validate(vocab_size=4)
    tree.check_drawn()
