"""What a round brings and costs: expected tokens and time per token of each pipeline mode.

Symbols, times in milliseconds: gamma, depth of the draft; alpha, the probability that the target confirms a drafted
token, the same for each and independent; t_d, a pass of the draft model (one for each token of depth); T_v, a
verification; R, a round trip to the target. The draft worker is beside the orchestrator: only the target is far.

The draft's ranking is modelled as well: the target's own token has rank r among the draft's candidates with probability
alpha (1 - alpha)^(r - 1), so that rank 1 has alpha. Real models agree in streaks; then deep drafts bring a little more
than this says.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, get_args

PipelineMode = Literal["sync", "overlap", "lookahead"]
VerifyCost = float | Callable[[int], float]
"""ms of a verification: a number, or a function of the tokens that the pass is over (gamma drafted and the one before
them)."""


def expected_tokens(alpha: float, gamma: int) -> float:
    """Mean number of tokens that a round brings: the accepted ones and the target's own.

    E = (1 - alpha^(gamma + 1)) / (1 - alpha), from 1 to gamma + 1 (Leviathan et al. 2023, equation 1). Raises
    ValueError when alpha is not in [0, 1] or gamma is negative.
    """
    _check(alpha, gamma)
    # The sum, not the quotient, which loses all digits when alpha is close to 1.
    return sum(alpha**accepted for accepted in range(gamma + 1))


def hit_probability(alpha: float, gamma: int, fan_out: int) -> float:
    """Probability that a verification ends as one of the `fan_out` likeliest of its outcomes.

    An outcome is (k tokens accepted, the target's own token has rank r), of probability
    alpha^(k + 1) (1 - alpha)^(r - 1), with r >= 2 for k < gamma, as rank 1 was drafted, and r >= 1 for k = gamma.
    Derived here. Raises ValueError as `expected_tokens`.
    """
    return min(1.0, sum(probability for probability, _ in _likeliest(alpha, gamma, fan_out)))


def fan_out_per_depth(alpha: float, gamma: int, fan_out: int) -> list[int]:
    """How many of the `fan_out` likeliest outcomes accept k tokens, for k = 0..gamma; of equal ones the least k first.

    For k < gamma the numbers fall by the same step from each k to the next: the probabilities are geometric in k and r.
    """
    counts = [0] * (gamma + 1)
    for _, accepted in _likeliest(alpha, gamma, fan_out):
        counts[accepted] += 1
    return counts


def round_ms(
    mode: PipelineMode,
    gamma: int,
    draft_ms: float,
    verify_ms: VerifyCost,
    rtt_ms: float = 0.0,
    hit: float = 0.0,
    *,
    ahead_ms: float | None = None,
) -> float:
    """Expected time of a round by the plain formulas, derived here; gamma 0: T_v + R, the target alone.

    sync: gamma t_d + R + T_v, also what a miss costs in the other modes: a wrong draft is dropped after its current
    pass, and on average half of that pass has to be waited for, which is left out.
    overlap: the next round is drafted meanwhile for full acceptance and the likeliest next token; gamma + 1 passes, as
        the last drafted token was not fed yet. A hit costs max((gamma + 1) t_d, R + T_v).
    lookahead: drafts for several outcomes are sent to the target while it verifies. A hit costs
        max(T_v, R + gamma t_d). `lookahead_round_ms` is more exact.

    hit: probability that the draft ahead can be used. ahead_ms: a pass of drafting ahead; default draft_ms.
    Raises ValueError when the mode is unknown, hit is not in [0, 1] or gamma is negative.
    """
    if mode not in get_args(PipelineMode):
        raise ValueError(f"mode must be one of {', '.join(get_args(PipelineMode))}, got {mode!r}")
    _check(hit, gamma, "hit")
    verify = _verify_ms(verify_ms, gamma)
    ahead = draft_ms if ahead_ms is None else ahead_ms
    miss_ms = gamma * draft_ms + rtt_ms + verify
    if mode == "sync" or gamma == 0:
        return miss_ms
    overlapped_ms = max((gamma + 1) * ahead, rtt_ms + verify)
    hit_ms = overlapped_ms if mode == "overlap" else max(verify, rtt_ms + gamma * ahead)
    return hit * hit_ms + (1 - hit) * miss_ms


def lookahead_round_ms(
    gamma: int,
    draft_ms: float,
    verify_ms: VerifyCost,
    rtt_ms: float = 0.0,
    hit: float = 0.0,
    *,
    ahead_ms: float | None = None,
) -> float:
    """Expected time of a lookahead round, with the two things that the plain formula leaves out. Derived here.

    Drafting ahead takes gamma + 1 passes: the candidates after full acceptance are known only once the last drafted
    token was fed. And two rounds are under way at a time. Let x = R + (gamma + 1) t_d be the time from a verdict to the
    arrival of the drafts for the verdict after it. After hits a verification ends at
    e(n + 1) = max(e(n), e(n - 1) + x) + T_v, so two rounds, not one, have to fit around x. After a miss the drafts
    ahead are asked for together with the draft, so the first hit does not wait for the network at all: it costs
    A = max(T_v, (gamma + 1) t_d), the second B = max(A, x + T_v - A), the third A, and so on. With hits of probability
    p, independent from round to round, that is p (A + p B) / (1 + p) + (1 - p) (gamma t_d + R + T_v).

    Arguments and errors as `round_ms`.
    """
    _check(hit, gamma, "hit")
    verify = _verify_ms(verify_ms, gamma)
    if gamma == 0:
        return verify + rtt_ms
    drafting = (gamma + 1) * (draft_ms if ahead_ms is None else ahead_ms)
    first_ms = max(verify, drafting)
    second_ms = max(first_ms, rtt_ms + drafting + verify - first_ms)
    hits_ms = hit * (first_ms + hit * second_ms) / (1 + hit)
    return hits_ms + (1 - hit) * (gamma * draft_ms + rtt_ms + verify)


def tpot_ms(
    mode: PipelineMode,
    gamma: int,
    alpha: float,
    draft_ms: float,
    verify_ms: VerifyCost,
    rtt_ms: float = 0.0,
    fan_out: int = 8,
    *,
    hit: float | None = None,
    ahead_ms: float | None = None,
    plain: bool = False,
) -> float:
    """Time per output token in the long run: expected time of a round by its expected tokens.

    The ratio of the expectations is right whether or not hits and accepted tokens go together, since both are sums
    over the same rounds. hit: measured probability of a hit; default: alpha^(gamma + 1) in overlap mode, that of the
    `fan_out` likeliest outcomes in lookahead mode. plain: use the plain formula for lookahead as well. Everything else
    as `round_ms`; raises ValueError as well when alpha is not in [0, 1].
    """
    tokens = expected_tokens(alpha, gamma)
    if hit is None:
        hit = mode_hit_probability(mode, alpha, gamma, fan_out)
    if mode == "lookahead" and not plain:
        return lookahead_round_ms(gamma, draft_ms, verify_ms, rtt_ms, hit, ahead_ms=ahead_ms) / tokens
    return round_ms(mode, gamma, draft_ms, verify_ms, rtt_ms, hit, ahead_ms=ahead_ms) / tokens


def mode_hit_probability(mode: PipelineMode, alpha: float, gamma: int, fan_out: int = 8) -> float:
    """Probability that what a mode drafts ahead can be used; 0 in sync mode and when nothing is drafted."""
    if mode == "sync" or gamma == 0:
        return 0.0
    return alpha ** (gamma + 1) if mode == "overlap" else hit_probability(alpha, gamma, fan_out)


def best_gamma(
    mode: PipelineMode,
    alpha: float,
    draft_ms: float,
    verify_ms: VerifyCost,
    rtt_ms: float = 0.0,
    limit: int = 16,
    fan_out: int = 8,
    *,
    hit: float | None = None,
    ahead_ms: float | None = None,
    plain: bool = False,
) -> int:
    """The gamma from 0 to `limit` of the least `tpot_ms`, which has the same arguments; of equal ones the smallest."""

    def tpot(gamma: int) -> float:
        return tpot_ms(
            mode, gamma, alpha, draft_ms, verify_ms, rtt_ms, fan_out, hit=hit, ahead_ms=ahead_ms, plain=plain
        )

    return min(range(limit + 1), key=tpot)


@lru_cache(maxsize=4096)
def _likeliest(alpha: float, gamma: int, fan_out: int) -> tuple[tuple[float, int], ...]:
    """The `fan_out` likeliest outcomes as (probability, tokens accepted), likeliest first."""
    _check(alpha, gamma)

    def outcome(accepted: int, rank: int) -> tuple[float, int, int]:
        return -(alpha ** (accepted + 1)) * (1 - alpha) ** (rank - 1), accepted, rank

    heap = [outcome(accepted, 2 if accepted < gamma else 1) for accepted in range(gamma + 1)]
    heapq.heapify(heap)
    found = []
    for _ in range(fan_out):
        cost, accepted, rank = heap[0]
        found.append((-cost, accepted))
        heapq.heapreplace(heap, outcome(accepted, rank + 1))
    return tuple(found)


def _verify_ms(verify_ms: VerifyCost, gamma: int) -> float:
    return verify_ms(gamma + 1) if callable(verify_ms) else verify_ms


def _check(probability: float, gamma: int, name: str = "alpha") -> None:
    if not 0 <= probability <= 1:
        raise ValueError(f"{name} is a probability, got {probability}")
    if gamma < 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")
