"""Models without weights: what they share, and their cache of one number a token, where others have keys and values."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise

import torch

from specsplit.decoding.tree import TokenTree

MAX_CONTEXT = 1 << 20


class Slots:
    """How many tokens a cache holds, and what may be done with them.

    length: tokens held. capacity: the most it can hold.
    """

    length: int
    capacity: int

    def advance(self, count: int) -> None:
        """Count the tokens that the pass just made has written."""
        self.length += count

    def rollback(self, length: int) -> None:
        """Forget everything after the first `length` tokens, in O(1)."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back to {length}: the cache holds {self.length} tokens")
        self.length = length

    def clean(self) -> None:
        """Leave nothing behind `length` that a later pass could read. Most caches look at what they hold alone."""

    def source_after(self, length: int) -> str:
        """Where the candidates after the first `length` tokens come from; empty when the model has one source."""
        return ""

    def check_keep(self, context: int, path: Sequence[int]) -> None:
        """Raise ValueError unless `path`, increasing offsets from `context`, is of tokens that are held."""
        if context < 0:
            raise ValueError(f"cannot keep {context} tokens")
        if any(b <= a for a, b in pairwise(path)) or (path and path[0] < 0):
            raise ValueError(f"path {list(path)} must increase")
        if context + (path[-1] + 1 if path else 0) > self.length:
            raise ValueError(f"path {list(path)} after {context} tokens is beyond the {self.length} held")


class TokenCache(Slots):
    """The cache of one session, with the semantics and the errors of KVCache.

    length: tokens held. capacity: the most it can hold.
    slots: one unsigned 64-bit number a token, written in place; those from `length` on mean nothing.
    """

    def __init__(self, capacity: int) -> None:
        self.length = 0
        self.capacity = capacity
        self.slots = array("Q", bytes(8 * capacity))

    def write(self, values: Sequence[int]) -> None:
        """Put `values` after what is held. They count only once `advance` says so."""
        end = self.length + len(values)
        if end > self.capacity:
            raise ValueError(f"{self.length} + {len(values)} tokens exceed the cache of {self.capacity}")
        self.slots[self.length : end] = array("Q", values)

    def keep(self, context: int, path: Sequence[int]) -> None:
        """Keep the first `context` tokens and, after them, the tree nodes of `path` (increasing offsets from
        `context`); everything else is forgotten."""
        self.check_keep(context, path)
        end = context + len(path)
        self.slots[context:end] = array("Q", [self.slots[context + node] for node in path])
        self.length = end

    def nbytes(self) -> int:
        """Bytes reserved by this cache."""
        return self.capacity * self.slots.itemsize


class WeightlessLM:
    """What a model without weights has in common with CausalLM. vocab_size: columns of its logits."""

    batch_tokens = 0
    prefill_tokens = 512
    uses_torch_threads = False
    taps = False
    max_context = MAX_CONTEXT
    eos_token_ids: tuple[int, ...] = ()
    parameters = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device("cpu")

    def cache_bytes(self, capacity: int, taps: int = 0) -> int:
        return 8 * capacity

    def new_cache(self, capacity: int) -> TokenCache:
        """An empty cache for one sequence of at most `capacity` tokens, tree nodes included."""
        return TokenCache(capacity)


def tokens_of_pass(cache: TokenCache, tokens: Sequence[int], tree: TokenTree, cached_nodes: int) -> list[int]:
    """What one pass feeds: `tokens`, then the nodes of `tree` from `cached_nodes` on (see CausalLM.step).

    Raises ValueError for a pass that a CausalLM would refuse.
    """
    ids = [*tokens, *tree.token_ids[cached_nodes:]]
    if not ids:
        raise ValueError("a pass needs at least one token")
    if tokens and cached_nodes:
        raise ValueError("context tokens cannot follow tree nodes that are in the cache")
    if cached_nodes > cache.length:
        raise ValueError(f"{cached_nodes} nodes cannot be in a cache that holds {cache.length} tokens")
    if cache.length + len(ids) > cache.capacity:
        raise ValueError(f"{cache.length} + {len(ids)} tokens exceed the cache of {cache.capacity}")
    return ids
