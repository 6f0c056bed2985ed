"""Prompt lookup decoding: draft what followed the last tokens where they occurred before (Saxena 2023).

It costs no pass of a model and no message, and is right wherever a text repeats itself or its prompt: summaries,
translations with the original at hand, code edits. `prompt_lookup_num_tokens` in transformers, `ngram` in vLLM.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from specsplit.decoding.tree import TokenTree

COMPARED = 8  # last tokens that are compared: the occurrence that agrees in most of them counts
RECENT = 64  # occurrences that are compared, the latest ones
LOOKUP = "lookup"  # the source of such a draft, in tables
# At first, by bit length of how many tokens agree: the rate at which the next one is right, as if that had been seen so
# many times. The shipped prompts have about these.
PRIOR, PRIOR_WEIGHT = {1: 0.2, 2: 0.55, 3: 0.7, 4: 0.9}, 3.0
FADE = 0.998  # weight of what was seen before a round


@dataclass(frozen=True)
class Match:
    """An earlier occurrence of the end of a text. end: the place behind it; tokens: that agree, of COMPARED."""

    end: int
    tokens: int


class Lookup:
    """Where the last tokens of one growing text occurred in it before. least: tokens that have to match, at least 1."""

    def __init__(self, least: int) -> None:
        self._least = least
        self._ends: dict[tuple[int, ...], list[int]] = {}  # so many tokens -> the places behind their occurrences
        self._read = least - 1  # ends that were noted

    def find(self, text: Sequence[int]) -> Match | None:
        """The earlier occurrence that agrees with the end of the text in most tokens, the latest of equals; None where
        the end is new. Each text has to continue the one before."""
        for end in range(self._read + 1, len(text)):
            self._ends.setdefault(tuple(text[end - self._least : end]), []).append(end)
        self._read = max(self._read, len(text) - 1)
        ends = self._ends.get(tuple(text[-self._least :]), [])[-RECENT:]
        most = max(COMPARED, self._least)
        last = text[-most:]

        def agreeing(end: int) -> int:
            before = text[max(0, end - most) : end]
            same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(last), reversed(before), strict=False))
            return sum(1 for _ in same)

        matches = (Match(end, agreeing(end)) for end in reversed(ends))
        return max(matches, key=lambda match: match.tokens, default=None)


def draft_from(
    match: Match | None, text: Sequence[int], gamma: int, stop_token_ids: Collection[int], *, certain: bool
) -> TokenTree:
    """A chain of at most `gamma` tokens that followed the match in the text, none after a stop token.

    certain: with rejection sampling, the distribution that each token was drawn from, which it has to itself.
    """
    continuation = text[match.end : match.end + gamma] if match else ()
    before_stop = sum(1 for _ in takewhile(lambda token: token not in stop_token_ids, continuation))
    tree = TokenTree.chain(continuation[: before_stop + 1])
    if tree.token_ids:
        tree.source = LOOKUP
    if certain:
        tree.distributions = {node: ([token], [1.0]) for node, token in zip(tree.parents, tree.token_ids, strict=True)}
    return tree


class MatchRates:
    """How often a token that follows a match is right: more often where more tokens agreed, so each bit length of their
    number has a rate of its own."""

    def __init__(self, rows: Iterable[tuple[int, float, float]] = ()) -> None:
        """rows: what iterating over another one gave."""
        self._counts = {kind: (tried, right) for kind, tried, right in rows}

    def __iter__(self) -> Iterator[list[float]]:
        return iter([[kind, *counts] for kind, counts in self._counts.items()])

    def observe(self, agreed: int, drafted: int, accepted: int) -> None:
        """Learn from a round. agreed: tokens of the match; 0: the draft was of no match, or there was none."""
        self._counts = {kind: (FADE * tried, FADE * right) for kind, (tried, right) in self._counts.items()}
        if agreed:
            kind = agreed.bit_length()
            tried, right = self._counts.get(kind, (0.0, 0.0))
            self._counts[kind] = tried + min(accepted + 1, drafted), right + accepted

    def rate(self, agreed: int) -> float:
        """How often the first token after a match of so many tokens is right, and each after a right one."""
        kind = agreed.bit_length()
        tried, right = self._counts.get(kind, (0.0, 0.0))
        return (right + PRIOR[min(kind, max(PRIOR))] * PRIOR_WEIGHT) / (tried + PRIOR_WEIGHT)

    def gamma(self, agreed: int, round_ms: Sequence[float]) -> int:
        """How many tokens to draft: each has to save more than it takes, at the price of a token without a draft.

        round_ms: what rounds take that verify a draft of 0, 1, 2, ... tokens.
        """
        rate, reached, saved = self.rate(agreed), 1.0, [0.0]
        for before, ms in pairwise(round_ms):
            reached *= rate
            saved.append(saved[-1] + reached * round_ms[0] - (ms - before))
        return saved.index(max(saved))
