"""What a draft of each depth brings and costs by the model of `theory`, for every shape of tree.

The target's own token has rank r among the draft's candidates with probability alpha (1 - alpha)^(r - 1). A node of the
tree is reached with the product of these along its path, so a tree brings 1 + the sum over its nodes (Sequoia, Chen et
al. 2024, section 3).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from specsplit.decoding.growth import CANDIDATES
from specsplit.decoding.theory import PipelineMode, round_ms
from specsplit.decoding.tree import ROOT, TreeShape


@dataclass(frozen=True)
class Plan:
    """A draft of one depth.

    passes: of the draft model; fed: tokens of these passes, of which the first reads one. verified: tokens of the
    target's pass, the last one of the text among them. tokens: expected of a round, the target's own among them.
    hit: probability that the verification ends as one of the likeliest outcomes: (k tokens accepted, the target's own
    token has rank r), where rank 1 is drafted unless k is the whole depth. leaves: nodes that drafting ahead has yet to
    feed.
    """

    passes: int
    fed: int
    verified: int
    tokens: float
    hit: float
    leaves: int


@lru_cache(maxsize=512)
def plans(shape: TreeShape, alpha: float, limit: int, fan_out: int) -> tuple[Plan, ...]:
    """Plans of the depths 0 to `limit`; fan_out: outcomes that lookahead drafts for."""
    return tuple((_best_first if shape.nodes else _levels)(shape, alpha, limit, fan_out))


def hit_probability(mode: PipelineMode, alpha: float, gamma: int, plan: Plan) -> float:
    """Probability that what a mode drafts ahead of the draft of `plan` can be used."""
    if mode == "sync" or gamma == 0:
        return 0.0
    return alpha ** (gamma + 1) if mode == "overlap" else plan.hit


def tpot_ms(
    mode: PipelineMode,
    gamma: int,
    alpha: float,
    draft_ms: float,
    verify_ms: float,
    rtt_ms: float = 0.0,
    fan_out: int = 8,
) -> float:
    """Time per output token of chains in the long run: expected time of a round by its expected tokens.

    The ratio of the expectations is right whether or not hits and accepted tokens go together, since both are sums
    over the same rounds.
    """
    plan = plans(TreeShape(), alpha, gamma, fan_out)[gamma]
    hit = hit_probability(mode, alpha, gamma, plan)
    return round_ms(mode, gamma, draft_ms, verify_ms, rtt_ms, hit) / plan.tokens


def _levels(shape: TreeShape, alpha: float, limit: int, fan_out: int) -> Iterable[Plan]:
    """Static shapes. Of each level only the `fan_out` likeliest nodes can end a likely outcome."""
    yield Plan(0, 0, 1, 1.0, 0.0, 0)
    likeliest, width, nodes, fed, tokens, expected = [1.0], 1, 0, 0, 1.0, 1.0
    ends: list[float] = []  # outcomes that end above the last level
    for depth in range(limit):
        children = shape.children(depth)
        ends += _after(likeliest, children, alpha, fan_out)
        likeliest = heapq.nlargest(fan_out, (p * alpha * (1 - alpha) ** r for p in likeliest for r in range(children)))
        fed += width
        width *= children
        nodes += width
        expected *= 1 - (1 - alpha) ** children
        tokens += expected
        outcomes = heapq.nlargest(fan_out, [*ends, *_after(likeliest, 0, alpha, fan_out)])
        yield Plan(depth + 1, fed, nodes + 1, tokens, min(1.0, sum(outcomes)), width)


def _best_first(shape: TreeShape, alpha: float, limit: int, fan_out: int) -> Iterable[Plan]:
    """Dynamic shapes: the growth of `growth.grow`, with the probabilities of the model."""
    yield Plan(0, 0, 1, 1.0, 0.0, 0)
    ranks = [alpha * (1 - alpha) ** rank for rank in range(CANDIDATES)]
    found: list[tuple[float, int]] = []  # (-probability of the path, number)
    parents: list[int] = []
    heap: list[tuple[float, int]] = []
    passes = fed = 0
    unfed = [(-1.0, ROOT)]
    for _ in range(limit):
        if unfed:
            passes, fed = passes + 1, fed + len(unfed)
        for path, number in unfed:
            for rank in ranks:
                entry = (path * rank, len(parents))
                parents.append(number)
                found.append(entry)
                heapq.heappush(heap, entry)
        kept = heapq.nsmallest(shape.nodes, found)
        worst = kept[-1] if len(kept) == shape.nodes else (0.0, 0)
        unfed = []
        while heap and len(unfed) < shape.width and heap[0] < worst:
            unfed.append(heapq.heappop(heap))
        children = Counter(parents[number] for _, number in kept)
        ends = heapq.nsmallest(
            fan_out,
            (path * rank for path, n in [(-1.0, ROOT), *kept] for rank in _ranks_beyond(children[n], alpha, fan_out)),
        )
        leaves = sum(number not in children for _, number in kept)
        yield Plan(passes, fed, len(kept) + 1, 1 - sum(p for p, _ in kept), min(1.0, -sum(ends)), leaves)


def _after(paths: Sequence[float], children: int, alpha: float, fan_out: int) -> list[float]:
    """Probabilities of the outcomes that end at these nodes with a token that is not drafted under them."""
    return [path * rank for path in paths for rank in _ranks_beyond(children, alpha, fan_out)]


def _ranks_beyond(children: int, alpha: float, count: int) -> list[float]:
    return [alpha * (1 - alpha) ** (children + i) for i in range(count)]


def ranks(parents: Sequence[int], path: Sequence[int]) -> list[tuple[int, int]]:
    """What a verification tells of each node that it came to: (rank of the target's token among the node's children,
    how many these are). The rank is that number itself where none of them is the target's.

    parents: of a tree, siblings in the order of the draft's ranking. path: the accepted nodes.
    """
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        children.setdefault(parent, []).append(node)
    found = []
    for node, following in zip([ROOT, *path], [*path, None], strict=True):
        below = children.get(node, [])
        if below:
            found.append((len(below) if following is None else below.index(following), len(below)))
    return found
