"""What a pass of a model is over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from specsplit.decoding.sampling import Sampling
from specsplit.decoding.tree import TokenTree

EMPTY = TokenTree()


@dataclass(frozen=True)
class Walk:
    """Decide at once which path of the tree is the target's own and keep it in the cache, instead of giving logits.

    The result is a Verdict; the cache has yet to do `keep(text, verdict.path)`, or has done it. Raises NonFiniteLogits.
    Not for rejection sampling.
    """

    sampling: Sampling


@dataclass(frozen=True)
class Propose:
    """Give the candidates after each row whose logits are wanted, instead of these; then feed the best candidate of the
    last row, `steps` times, and give those after each. The result is a list of (Candidates, overflowed).

    least: as Pass.pause, once the log-probability of what is to be fed is below it.
    vocab_size, targets: as DraftSettings and Vocabulary have them. offset: tokens of the text before the cache's first.
    """

    sampling: Sampling
    vocab_size: int
    targets: torch.Tensor | None = None
    steps: int = 0
    least: float = -math.inf
    offset: int = 0


@dataclass(frozen=True)
class Pass:
    """The arguments of CausalLM.step: one session's part of a pass.

    then: what an engine that `decides` it does after it, where the logits are; None: the result is the logits.
    states: for a head that reads the target's hidden states, a row for each of `tokens` (HiddenStatesHead.step).
    pause: once it says so, an engine may stop feeding the steps of `then`, and give fewer.
    """

    cache: Any
    tokens: Sequence[int]
    tree: TokenTree = field(default_factory=TokenTree)
    cached_nodes: int = 0
    then: Walk | Propose | None = None
    states: torch.Tensor | None = None
    pause: Callable[[], bool] = lambda: False

    @property
    def size(self) -> int:
        """Tokens fed at first."""
        return len(self.tokens) + len(self.tree) - self.cached_nodes

    @property
    def steps(self) -> int:
        """Tokens fed after them, one by one."""
        return self.then.steps if isinstance(self.then, Propose) else 0

    @property
    def first_wanted(self) -> int:
        """The first token fed whose logits are wanted; they are of it and of all after it."""
        return max(len(self.tokens) - 1, 0)

    def split(self, count: int) -> tuple[Pass, Pass]:
        """A pass over the first `count` of `tokens`, whose result nobody needs, and one over what is left."""
        first, rest = (None, None) if self.states is None else (self.states[:count], self.states[count:])
        before = Pass(self.cache, self.tokens[:count], states=first)
        return before, replace(self, tokens=self.tokens[count:], states=rest)


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


class MakesTogether:
    """What engines have in common whose pass over one session is one over several."""

    def step_many(self, passes: Sequence[Pass]) -> list[Any]:
        """The passes of several sessions, each of another one, made as one; of each the logits, or what Pass.then
        says."""
        raise NotImplementedError

    def step(
        self,
        cache: Any,
        tokens: Sequence[int],
        tree: TokenTree = EMPTY,
        cached_nodes: int = 0,
        then: Walk | Propose | None = None,
        states: torch.Tensor | None = None,
    ) -> Any:
        """One pass, as CausalLM.step, or what `then` says. states: as Pass.states."""
        return self.step_many([Pass(cache, tokens, tree, cached_nodes, then, states)])[0]


class Steps(Protocol):
    """What drafting and verification need of a model."""

    def step(
        self,
        cache: Any,
        tokens: Sequence[int],
        tree: TokenTree = EMPTY,
        cached_nodes: int = 0,
        *,
        states: torch.Tensor | None = None,
    ) -> torch.Tensor: ...
