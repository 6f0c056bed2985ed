"""A draft model without weights: what followed earlier occurrences of the last tokens, in the text itself.

Prompt lookup decoding (Saxena 2023; `prompt_lookup_num_tokens` in transformers, `ngram` in vLLM). It costs no pass of a
model and is right wherever a text repeats itself or its prompt: summaries, code edits, quotations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.engines.passes import EMPTY, Pass, all_or_none
from specsplit.engines.token_cache import TokenCache, WeightlessLM, tokens_of_pass

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
        context = cache.length - cached_nodes
        length = context + len(tokens)
        # With space for the deepest path after the context; each node writes its path there.
        text = np.empty(length + tree.depth(), dtype=np.int64)
        text[:context] = np.frombuffer(cache.slots, dtype=np.uint64, count=context)
        text[context:length] = tokens
        ends = [length] if tokens else []
        logits = torch.full((len(ends) + len(tree) - cached_nodes, self.vocab_size), -torch.inf)
        if tokens:
            self._fill(logits[0], text[:length])
        for row, node in enumerate(range(cached_nodes, len(tree)), start=len(ends)):
            path = _path_tokens(tree, node)
            text[length : length + len(path)] = path
            self._fill(logits[row], text[: length + len(path)])
        cache.write(new_tokens)
        cache.advance(len(new_tokens))
        return logits

    def _fill(self, row: torch.Tensor, text: NDArray[np.int64]) -> None:
        """Write the logits of the token after `text` into `row` [vocab_size]."""
        ends = self._matches(text)
        if not len(ends):
            return
        # Newest first, so that the index of a token's first place tells its most recent occurrence.
        tokens, newest, counts = np.unique(text[ends + 1][::-1], return_index=True, return_counts=True)
        recency = np.empty(len(tokens))
        recency[np.argsort(-newest)] = np.arange(len(tokens)) / len(tokens)
        row[torch.from_numpy(tokens)] = torch.from_numpy(np.log(counts + TIE * recency)).float()

    def _matches(self, text: NDArray[np.int64]) -> NDArray[np.intp]:
        """Where the longest suffix of `text` that occurs earlier in it ends there: indices, increasing."""
        ends = np.flatnonzero(text[:-1] == text[-1])
        longest = 1 if len(ends) else 0
        while longest and longest < self.max_ngram:
            # Those whose token before is that of the suffix as well; the suffix cannot begin before the text.
            fits = ends[ends >= longest]
            fits = fits[text[fits - longest] == text[-1 - longest]]
            if not len(fits):
                break
            ends, longest = fits, longest + 1
        return ends if longest >= self.min_ngram else ends[:0]


def _path_tokens(tree: TokenTree, node: int) -> list[int]:
    """The drafted tokens from the context to `node`, itself included."""
    path = []
    while node != ROOT:
        path.append(tree.token_ids[node])
        node = tree.parents[node]
    return path[::-1]
