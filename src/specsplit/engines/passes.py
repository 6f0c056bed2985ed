"""What a pass of a model is over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from specsplit.decoding.tree import TokenTree

EMPTY = TokenTree()


@dataclass(frozen=True)
class Pass:
    """The arguments of CausalLM.step: one session's part of a pass.

    states: for a head that reads the target's hidden states, a row for each of `tokens` (HiddenStatesHead.step).
    """

    cache: Any
    tokens: Sequence[int]
    tree: TokenTree = field(default_factory=TokenTree)
    cached_nodes: int = 0
    states: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Tokens fed."""
        return len(self.tokens) + len(self.tree) - self.cached_nodes

    @property
    def first_wanted(self) -> int:
        """The first token fed whose logits are wanted; they are of it and of all after it."""
        return max(len(self.tokens) - 1, 0)


@contextmanager
def all_or_none(caches: Iterable[Any]) -> Iterator[None]:
    """A pass happens for all of its sessions or for none: when it fails, every cache holds what it held before.

    Each engine makes its passes in one of these. Tokens are written only after those that a cache holds, so taking back
    the lengths takes back the pass, and it can be tried again.
    """
    lengths = [(cache, cache.length) for cache in caches]
    try:
        yield
    except BaseException:
        for cache, length in lengths:
            cache.rollback(length)
        raise


class Steps(Protocol):
    """What drafting and verification need of a model."""

    def step(
        self,
        cache: Any,
        tokens: Sequence[int],
        tree: TokenTree = EMPTY,
        cached_nodes: int = 0,
        states: torch.Tensor | None = None,
    ) -> torch.Tensor: ...
