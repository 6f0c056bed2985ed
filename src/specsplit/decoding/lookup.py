"""Prompt lookup decoding: draft what followed the last tokens where they occurred before (Saxena 2023).

It costs no pass of a model and no message, and is right wherever a text repeats itself or its prompt: summaries,
translations with the original at hand, code edits. `prompt_lookup_num_tokens` in transformers, `ngram` in vLLM.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import takewhile

from specsplit.decoding.tree import TokenTree

LONGER = 3  # more tokens that are compared: of several occurrences the one that agrees in most of them counts
RECENT = 64  # occurrences that are compared, the latest ones
LOOKUP = "lookup"  # the source of such a draft, in tables


class Lookup:
    """Where the last tokens of one growing text occurred in it before. least: tokens that have to match, at least 1."""

    def __init__(self, least: int) -> None:
        self._least = least
        self._ends: dict[tuple[int, ...], list[int]] = {}  # so many tokens -> the places behind their occurrences
        self._read = least - 1  # ends that were noted

    def draft(self, text: Sequence[int], gamma: int, stop_token_ids: Collection[int], *, certain: bool) -> TokenTree:
        """A chain of at most `gamma` tokens that may continue `text`, none after a stop token; empty where the end of
        the text is new. Each text has to continue the one before.

        certain: with rejection sampling, the distribution that each token was drawn from, which it has to itself.
        """
        for end in range(self._read + 1, len(text)):
            self._ends.setdefault(tuple(text[end - self._least : end]), []).append(end)
        self._read = max(self._read, len(text) - 1)
        start = self._longest_match(text)
        continuation = text[start : start + max(gamma, 0)]
        before_stop = sum(1 for _ in takewhile(lambda token: token not in stop_token_ids, continuation))
        tree = TokenTree.chain(continuation[: before_stop + 1])
        if tree.token_ids:
            tree.source = LOOKUP
        if certain:
            tree.distributions = {
                node: ([token], [1.0]) for node, token in zip(tree.parents, tree.token_ids, strict=True)
            }
        return tree

    def _longest_match(self, text: Sequence[int]) -> int:
        """The place behind the earlier occurrence that agrees with the end of the text in most tokens, the latest of
        equals; the length of the text when there is none."""
        ends = self._ends.get(tuple(text[-self._least :]), [])[-RECENT:]

        def longer(end: int) -> int:
            most = min(LONGER, end - self._least)
            own = text[len(text) - self._least - most : len(text) - self._least]
            before = text[end - self._least - most : end - self._least]
            same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(own), reversed(before), strict=True))
            return sum(1 for _ in same)

        return max(reversed(ends), key=longer, default=len(text))
