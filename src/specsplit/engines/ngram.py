"""A draft model without weights: what followed earlier occurrences of the last tokens, in the text itself.

Prompt lookup decoding (Saxena 2023; `prompt_lookup_num_tokens` in transformers, `ngram` in vLLM). It costs no pass of a
model and is right wherever a text repeats itself or its prompt: summaries, code edits, quotations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.engines.passes import EMPTY, Pass, all_or_none
from specsplit.engines.token_cache import TokenCache, WeightlessLM, tokens_of_pass

TOKEN = np.uint64((1 << 32) - 1)  # of a slot; what is above is a subclass's own
TIE = 0.01  # of one occurrence: what the most recent of several equally frequent tokens has more


class NGramLM(WeightlessLM):
    """The tokens that followed the longest suffix of the text, of max_ngram down to min_ngram tokens, earlier in it."""

    def __init__(self, vocab_size: int, *, max_ngram: int = 3, min_ngram: int = 1) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"min_ngram {min_ngram} and max_ngram {max_ngram} must be 1 <= min_ngram <= max_ngram")
        super().__init__(vocab_size)
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram

    def step_many(self, passes: Sequence[Pass]) -> list[torch.Tensor]:
        """As CausalLM.step_many."""
        with all_or_none(p.cache for p in passes):
            return [self.step(p.cache, p.tokens, p.tree, p.cached_nodes) for p in passes]

    def step(
        self, cache: TokenCache, tokens: Sequence[int], tree: TokenTree = EMPTY, cached_nodes: int = 0
    ) -> torch.Tensor:
        """One pass, as CausalLM.step: over `tokens`, then over the nodes of `tree` from `cached_nodes` on.

        Returns logits [rows, vocab_size], float32: one row for the last of `tokens` (if any), then one for every node
        fed. A row is the logarithm of counts: -inf for a token that never followed, all -inf when nothing matches.
        """
        new_tokens = tokens_of_pass(cache, tokens, tree, cached_nodes)
        logits = torch.full((bool(tokens) + len(tree) - cached_nodes, self.vocab_size), -torch.inf)
        for row, text in zip(logits, texts_of_rows(cache, tokens, tree, cached_nodes), strict=True):
            self._fill(row, text)
        cache.write(new_tokens)
        cache.advance(len(new_tokens))
        return logits

    def _fill(self, row: torch.Tensor, text: NDArray[np.int64]) -> None:
        """Write the logits of the token after `text` into `row` [vocab_size]."""
        write_counts(row, self._followers(text)[1])

    def _followers(self, text: NDArray[np.int64]) -> tuple[int, NDArray[np.int64]]:
        """The length of the longest suffix of `text` that occurs earlier in it, and what followed it there, newest
        first."""
        ends = np.flatnonzero(text[:-1] == text[-1])
        longest = 1 if len(ends) else 0
        while longest and longest < self.max_ngram:
            # Those whose token before is that of the suffix as well; the suffix cannot begin before the text.
            fits = ends[ends >= longest]
            fits = fits[text[fits - longest] == text[-1 - longest]]
            if not len(fits):
                break
            ends, longest = fits, longest + 1
        return longest, text[(ends if longest >= self.min_ngram else ends[:0]) + 1][::-1]


def texts_of_rows(
    cache: TokenCache, tokens: Sequence[int], tree: TokenTree, cached_nodes: int
) -> Iterator[NDArray[np.int64]]:
    """The text that each row of a pass continues, one after the other in the same memory."""
    context = cache.length - cached_nodes
    length = context + len(tokens)
    # With space for the deepest path after the context; each node writes its path there.
    text = np.empty(length + tree.depth(), dtype=np.int64)
    text[:context] = np.frombuffer(cache.slots, dtype=np.uint64, count=context) & TOKEN
    text[context:length] = tokens
    if tokens:
        yield text[:length]
    for node in range(cached_nodes, len(tree)):
        path = _path_tokens(tree, node)
        text[length : length + len(path)] = path
        yield text[: length + len(path)]


def write_counts(row: torch.Tensor, followers: NDArray[np.int64]) -> None:
    """Write the logarithm of how often each token is among `followers`, newest first, into `row` [vocab_size]."""
    if not len(followers):
        return
    # The index of a token's first place tells its most recent occurrence.
    tokens, newest, counts = np.unique(followers, return_index=True, return_counts=True)
    recency = np.empty(len(tokens))
    recency[np.argsort(-newest)] = np.arange(len(tokens)) / len(tokens)
    row[torch.from_numpy(tokens)] = torch.from_numpy(np.log(counts + TIE * recency)).float()


def _path_tokens(tree: TokenTree, node: int) -> list[int]:
    """The drafted tokens from the context to `node`, itself included."""
    path = []
    while node != ROOT:
        path.append(tree.token_ids[node])
        node = tree.parents[node]
    return path[::-1]
