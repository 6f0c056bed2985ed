"""Prompt lookup decoding: draft what followed the last tokens where they occurred before (Saxena 2023).

It costs no pass of a model and no message, and is right wherever a text repeats itself or its prompt: summaries,
translations with the original at hand, code edits. `prompt_lookup_num_tokens` in transformers, `ngram` in vLLM.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import takewhile

from specsplit.decoding.tree import TokenTree

LONGER = 3  # tokens that a match may have beyond the least; the longest match counts
LOOKUP = "lookup"  # the source of such a draft, in tables


class Lookup:
    """Where the last tokens of one growing text occurred in it before. least: tokens that have to match, at least 1."""

    def __init__(self, least: int) -> None:
        self._sizes = range(least + LONGER, least - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}  # tokens -> the place behind their latest occurrence
        self._read = 0  # ends of occurrences that were noted

    def draft(self, text: Sequence[int], gamma: int, stop_token_ids: Collection[int], *, certain: bool) -> TokenTree:
        """A chain of at most `gamma` tokens that may continue `text`, none after a stop token; empty where the end of
        the text is new. Text after text has to be a continuation of the one before.

        certain: with rejection sampling, the distribution that each token was drawn from, which it has to itself.
        """
        for end in range(self._read + 1, len(text)):
            for size in self._sizes:
                if size <= end:
                    self._after[tuple(text[end - size : end])] = end
        self._read = max(self._read, len(text) - 1)
        found = (self._after.get(tuple(text[-size:])) for size in self._sizes if size < len(text))
        start = next((place for place in found if place is not None), len(text))
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
