"""How a draft grows from a node: static shapes level by level, dynamic ones best first.

A growth is a generator. It yields the (node, token, log-probability) that the draft model must be fed to go on, is sent
the nodes that these became, or None when nothing more can be fed, and returns the tree. So that many growths, one for
each outcome that is drafted for, share the passes of the model.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass

from specsplit.decoding.forced import Forced
from specsplit.decoding.sampling import GREEDY, Candidates, Sampling
from specsplit.decoding.tree import MAX_BRANCHING, ROOT, TokenTree, TreeShape

CANDIDATES = 2 * MAX_BRANCHING
"""Kept of each node: enough for any shape, and for what may come instead of the drafted tokens."""

CHAIN = TreeShape()
NOT_FORCED = Forced()

ToFeed = tuple[int, int, float]
Growth = Generator[list[ToFeed], list[int] | None, TokenTree]


@dataclass(frozen=True)
class DraftSettings:
    """What is asked of a draft. length_limit: tokens that the text can have; a draft ends one before it. forced: where
    it is made right or wrong. p_min: as in `grow`."""

    gamma: int
    shape: TreeShape = CHAIN
    sampling: Sampling = GREEDY
    stop_token_ids: frozenset[int] = frozenset()
    vocab_size: int = 1 << 31
    length_limit: int = 1 << 31
    forced: Forced = NOT_FORCED
    p_min: float = 0.0


def least_log(p_min: float) -> float:
    """The least log-probability of a path that is drafted."""
    return math.log(p_min) if p_min else -math.inf


def grow(asked: DraftSettings, gamma: int, start: int, candidates: Mapping[int, Candidates]) -> Growth:
    """The draft of depth `gamma` that follows the node `start`, in at most gamma - 1 passes.

    asked: its shape, the tokens that end it, and p_min. gamma: asked.gamma, or less near the end of a text. candidates:
    of every node that has been fed; the caller adds those of the nodes that it sends. Nothing is drafted after a stop
    token. Drafts for rejection sampling carry the distributions of their nodes.
    asked.p_min: tokens whose path from `start` is less probable by the draft model are left out (`--draft-p-min` of
    llama.cpp); 0 leaves out none. With rejection sampling it would bias the text.
    """
    each = _grow_best_first if asked.shape.nodes and gamma > 0 else _grow_levels
    return each(asked, gamma, start, candidates)


def _grow_levels(asked: DraftSettings, gamma: int, start: int, candidates: Mapping[int, Candidates]) -> Growth:
    tree, least = TokenTree(), least_log(asked.p_min)
    # Nodes as the model was fed them, their places in this tree, and the log-probabilities of their paths.
    level = [(start, ROOT, 0.0)]
    for depth in range(gamma):
        wants: list[ToFeed] = []
        places = []
        for node, place, path in level:
            best = candidates[node]
            if best.support and best.token_ids:
                tree.distributions[place] = (best.support, best.probabilities)
            for token, log_prob in zip(best.token_ids[: asked.shape.children(depth)], best.log_probs, strict=False):
                if path + log_prob < least:
                    continue
                child = tree.add(token, place, log_prob)
                if token not in asked.stop_token_ids:
                    wants.append((node, token, log_prob))
                    places.append((child, path + log_prob))
        if not wants or depth == gamma - 1:
            break
        nodes = yield wants
        if nodes is None:
            break
        level = [(node, *place) for node, place in zip(nodes, places, strict=True)]
    return tree


def _grow_best_first(asked: DraftSettings, gamma: int, start: int, candidates: Mapping[int, Candidates]) -> Growth:
    """Each pass feeds the `width` likeliest candidates by the probability of their whole path; the `nodes` likeliest of
    all candidates are the draft (EAGLE-2, Li et al. 2024)."""
    shape, least = asked.shape, least_log(asked.p_min)
    # A candidate: (-log-probability of its path, its number), so that a heap gives the likeliest, first come first.
    found: list[tuple[float, int]] = []
    # By number: parent's number, node fed before, token, log p, depth.
    what: list[tuple[int, int, int, float, int]] = []
    heap: list[tuple[float, int]] = []

    def offer(parent: int, node: int, cost: float, depth: int) -> None:
        for token, log_prob in zip(candidates[node].token_ids, candidates[node].log_probs, strict=True):
            entry = (cost - log_prob, len(what))
            if entry[0] > -least:
                continue
            what.append((parent, node, token, log_prob, depth))
            found.append(entry)
            if depth < gamma and token not in asked.stop_token_ids:
                heapq.heappush(heap, entry)

    offer(ROOT, start, 0.0, 1)
    for _ in range(gamma - 1):
        worst_kept = sorted(found)[: shape.nodes][-1] if len(found) >= shape.nodes else (float("inf"), 0)
        picked: list[tuple[float, int]] = []
        while heap and len(picked) < shape.width and heap[0] < worst_kept:
            picked.append(heapq.heappop(heap))  # children of what is not kept would not be kept either
        if not picked:
            break
        nodes = yield [(what[number][1], what[number][2], what[number][3]) for _, number in picked]
        if nodes is None:
            break
        for (cost, number), node in zip(picked, nodes, strict=True):
            offer(number, node, cost, what[number][4] + 1)
    tree = TokenTree()
    places = {ROOT: ROOT}
    for _, number in sorted(found)[: shape.nodes]:  # a path costs at least what its beginning costs: parents first
        parent, _, token, log_prob, _ = what[number]
        places[number] = tree.add(token, places[parent], log_prob)
    return tree
