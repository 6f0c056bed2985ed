"""A draft as a flat tree of tokens: parents first, so that every prefix of the arrays is a tree as well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

ROOT = -1
"""Parent of the nodes that follow the context directly."""


class TreeError(ValueError):
    """The arrays do not describe a tree of drafted tokens; the message names the node and the reason."""


@dataclass
class TokenTree:
    """Drafted tokens as parallel arrays of length n.

    token_ids[i]: the drafted token of node i.
    parents[i]: index of its parent, always below i, or ROOT (-1) when it follows the context.
    log_probs[i]: the draft's natural log-probability of the token given its path, at most 0.

    A chain is the tree whose parents are -1, 0, 1, ...
    """

    token_ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    @classmethod
    def chain(cls, token_ids: Sequence[int], log_probs: Sequence[float] | None = None) -> TokenTree:
        """The tree in which each token follows the one before it."""
        n = len(token_ids)
        return cls(list(token_ids), list(range(-1, n - 1)), [0.0] * n if log_probs is None else list(log_probs))

    def __len__(self) -> int:
        return len(self.token_ids)

    def add(self, token_id: int, parent: int, log_prob: float) -> int:
        """Append a node and return its index."""
        self.token_ids.append(token_id)
        self.parents.append(parent)
        self.log_probs.append(log_prob)
        return len(self.token_ids) - 1

    @property
    def is_chain(self) -> bool:
        return all(parent == i - 1 for i, parent in enumerate(self.parents))

    def depths(self) -> list[int]:
        """Depth of every node; the children of the context have depth 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths

    def depth(self) -> int:
        """Length of the longest path: the most tokens that one round can accept. 0 for the empty tree."""
        return max(self.depths(), default=0)

    def walk(self, tokens: Sequence[int]) -> list[int]:
        """Nodes of the longest path from the root that spells a prefix of `tokens`."""
        children = {
            (parent, token): i for i, (parent, token) in enumerate(zip(self.parents, self.token_ids, strict=True))
        }
        path: list[int] = []
        for token in tokens:
            node = children.get((path[-1] if path else ROOT, token))
            if node is None:
                break
            path.append(node)
        return path

    def within(self, vocab_size: int) -> TokenTree:
        """The tree without the nodes whose token, or an ancestor's, is outside the vocabulary."""
        kept, place = TokenTree(), {ROOT: ROOT}
        for i, (token, parent) in enumerate(zip(self.token_ids, self.parents, strict=True)):
            if token < vocab_size and parent in place:
                place[i] = kept.add(token, place[parent], self.log_probs[i])
        return kept

    def validate(self, vocab_size: int | None = None, max_nodes: int | None = None) -> None:
        """Raise TreeError unless the arrays form a tree: equal lengths, parents before children, token ids
        inside the vocabulary, finite log-probabilities of at most 0, no token twice under one parent."""
        n = len(self.token_ids)
        if not n == len(self.parents) == len(self.log_probs):
            raise TreeError(
                f"token_ids, parents and log_probs must have one length, "
                f"got {n}, {len(self.parents)} and {len(self.log_probs)}"
            )
        if max_nodes is not None and n > max_nodes:
            raise TreeError(f"tree has {n} nodes, the limit is {max_nodes}")
        seen: set[tuple[int, int]] = set()
        for i, (token, parent, log_prob) in enumerate(zip(self.token_ids, self.parents, self.log_probs, strict=True)):
            if not ROOT <= parent < i:
                raise TreeError(f"node {i}: parent {parent} is not -1 or an earlier node")
            if token < 0:
                raise TreeError(f"node {i}: token id {token} is negative")
            if vocab_size is not None and token >= vocab_size:
                raise TreeError(f"node {i}: token id {token} is outside the vocabulary of {vocab_size}")
            if not (math.isfinite(log_prob) and log_prob <= 0.0):
                raise TreeError(f"node {i}: log-probability {log_prob} is not a finite number of at most 0")
            if (parent, token) in seen:
                raise TreeError(f"node {i}: token {token} stands twice under parent {parent}")
            seen.add((parent, token))


def branching_of(shape: Sequence[int], depth: int) -> int:
    """Children that a node at `depth` (0 = the context) gets in a tree of static shape; a chain beyond it."""
    return shape[depth] if depth < len(shape) else 1


def tree_size(shape: Sequence[int], gamma: int) -> int:
    """Nodes of the full tree of depth `gamma` with `shape` children per level (1 beyond the shape's end)."""
    nodes, level = 0, 1
    for depth in range(gamma):
        level *= branching_of(shape, depth)
        nodes += level
    return nodes
