"""A draft as a flat tree of tokens: parents first, so that every prefix of the arrays is a tree as well."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_BRANCHING = 8
MAX_TREE_NODES = 256
ROOT = -1
"""Parent of the nodes that follow the context directly."""


class TreeError(ValueError):
    """The arrays do not describe a tree of drafted tokens; the message names the node and the reason."""


def check_lengths(token_ids: int, parents: int, log_probs: int) -> None:
    """Raise TreeError unless the arrays of a tree have one length."""
    if not token_ids == parents == log_probs:
        raise TreeError(
            f"token_ids, parents and log_probs must have one length, got {token_ids}, {parents} and {log_probs}"
        )


@dataclass
class TokenTree:
    """Drafted tokens as parallel arrays of length n.

    token_ids[i]: the drafted token of node i.
    parents[i]: index of its parent, always below i, or ROOT (-1) when it follows the context.
    log_probs[i]: the draft's natural log-probability of the token given its path, at most 0.

    distributions[i] (rejection sampling alone): token ids and probabilities that the children of node i were drawn
        from, without replacement and in their order; ROOT for those that follow the context.

    source: where the first token comes from, of a draft with several places to look; else empty.

    A chain is the tree whose parents are -1, 0, 1, ...
    """

    token_ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    distributions: dict[int, tuple[list[int], list[float]]] = field(default_factory=dict)
    source: str = ""

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

    def validate(self, vocab_size: int) -> None:
        """Raise TreeError unless the arrays form a tree: equal lengths, parents before children, token ids
        inside the vocabulary, finite log-probabilities of at most 0, no token twice under one parent."""
        n = len(self.token_ids)
        check_lengths(n, len(self.parents), len(self.log_probs))
        seen: set[tuple[int, int]] = set()
        for i, (token, parent, log_prob) in enumerate(zip(self.token_ids, self.parents, self.log_probs, strict=True)):
            if not ROOT <= parent < i:
                raise TreeError(f"node {i}: parent {parent} is not -1 or an earlier node")
            if not 0 <= token < vocab_size:
                raise TreeError(f"node {i}: token id {token} is outside the vocabulary of {vocab_size}")
            if not (math.isfinite(log_prob) and log_prob <= 0.0):
                raise TreeError(f"node {i}: log-probability {log_prob} is not a finite number of at most 0")
            if (parent, token) in seen:
                raise TreeError(f"node {i}: token {token} stands twice under parent {parent}")
            seen.add((parent, token))
        for node, (tokens, probabilities) in self.distributions.items():
            if not ROOT <= node < n:
                raise TreeError(f"distribution of node {node}: there is no such node")
            if not tokens or len(tokens) != len(probabilities) or len(set(tokens)) != len(tokens):
                raise TreeError(f"distribution of node {node}: wants different tokens, each with a probability")
            if min(tokens) < 0 or max(tokens) >= vocab_size:
                raise TreeError(f"distribution of node {node}: a token is outside the vocabulary of {vocab_size}")
            if not all(math.isfinite(p) and p > 0 for p in probabilities):
                raise TreeError(f"distribution of node {node}: a probability is not a finite number above 0")

    def check_drawn(self) -> None:
        """Raise TreeError unless every node with children has a distribution that can draw them."""
        drawable = {node: set(tokens) for node, (tokens, _) in self.distributions.items()}
        for i, (token, parent) in enumerate(zip(self.token_ids, self.parents, strict=True)):
            if token not in drawable.get(parent, ()):
                raise TreeError(f"node {i}: rejection sampling needs a distribution of its parent that draws its token")


@dataclass(frozen=True)
class TreeShape:
    """How a draft of depth gamma spreads.

    branching: children of each node, level by level, one beyond its end; empty is a chain (static shapes).
    nodes: 0 for a static shape; else the draft has at most that many nodes, grown best first by the draft's own
        probabilities (EAGLE-2, Li et al. 2024; Sequoia, Chen et al. 2024).
    width: nodes that a dynamic tree feeds in each pass.
    """

    branching: tuple[int, ...] = ()
    nodes: int = 0
    width: int = 4

    @classmethod
    def parse(cls, text: str) -> TreeShape:
        """`chain`, `3x2` (children per level), `dynamic-16` or `dynamic-16x4` (nodes, nodes fed in a pass).

        Raises ValueError that says what is wanted.
        """
        wanted = f"{text!r} is not a tree: write chain, 3x2 (children per level, 1 to 8) or dynamic-16x4"
        if text == "chain":
            return cls()
        if match := re.fullmatch(r"dynamic-(\d+)(?:x(\d+))?", text):
            nodes, width = int(match[1]), int(match[2] or cls.width)
            if not (1 <= nodes <= MAX_TREE_NODES and 1 <= width <= MAX_TREE_NODES):
                raise ValueError(f"{wanted}; nodes and width are 1 to {MAX_TREE_NODES}")
            return cls(nodes=nodes, width=width)
        if not re.fullmatch(r"\d+(x\d+)*", text):
            raise ValueError(wanted)
        branching = tuple(int(level) for level in text.split("x"))
        if any(not 1 <= level <= MAX_BRANCHING for level in branching):
            raise ValueError(wanted)
        return cls(branching)

    def __str__(self) -> str:
        if self.nodes:
            return f"dynamic-{self.nodes}x{self.width}"
        return "x".join(map(str, self.branching)) or "chain"

    def children(self, depth: int) -> int:
        """Children that a node at `depth` (0 = the context) gets in a static shape."""
        return self.branching[depth] if depth < len(self.branching) else 1

    def within(self, nodes: int, *, children: int = MAX_BRANCHING, width: int = MAX_TREE_NODES) -> TreeShape:
        """This shape, or a narrower one: at most `nodes` nodes at depth 1, or in all where it is dynamic, `children`
        of each, `width` fed in a pass."""
        if self.nodes:
            return TreeShape(nodes=max(min(self.nodes, nodes), 1), width=max(min(self.width, width), 1))
        return TreeShape(tuple(max(min(level, children, nodes), 1) for level in self.branching))

    def size(self, gamma: int) -> int:
        """The most nodes that a draft of depth `gamma` can have."""
        if self.nodes:
            return self.nodes
        nodes, level = 0, 1
        for depth in range(gamma):
            level *= self.children(depth)
            nodes += level
        return nodes
