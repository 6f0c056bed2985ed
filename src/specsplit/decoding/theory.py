"""What a round brings and costs: expected tokens and time of each pipeline mode.

Symbols, times in milliseconds: gamma, depth of the draft; alpha, the probability that the target confirms a drafted
token, the same for each and independent; t_d, a pass of the draft model (one for each token of depth); T_v, a
verification; R, a round trip to the target. The draft worker is beside the orchestrator: only the target is far.
What each shape of tree brings, and time per token, are in `tree_plan`.
"""

from __future__ import annotations

from typing import Literal

PipelineMode = Literal["sync", "overlap", "lookahead"]


def expected_tokens(alpha: float, gamma: int) -> float:
    """Mean number of tokens that a round brings: the accepted ones and the target's own.

    E = (1 - alpha^(gamma + 1)) / (1 - alpha), from 1 to gamma + 1 (Leviathan et al. 2023, equation 1).
    """
    # The sum, not the quotient, which loses all digits when alpha is close to 1.
    return sum(alpha**accepted for accepted in range(gamma + 1))


def round_ms(
    mode: PipelineMode,
    gamma: int,
    draft_ms: float,
    verify_ms: float,
    rtt_ms: float = 0.0,
    hit: float = 0.0,
    *,
    ahead_ms: float | None = None,
) -> float:
    """Expected time of a round, derived here; gamma 0: T_v + R, the target alone.

    sync: gamma t_d + R + T_v, also what a miss costs in the other modes: a wrong draft is dropped after its current
        pass, and on average half of that pass has to be waited for, which is left out.
    overlap: the next round is drafted meanwhile for full acceptance and the likeliest next token; gamma + 1 passes, as
        the last drafted token was not fed yet. A hit costs max((gamma + 1) t_d, R + T_v).
    lookahead: drafts for several outcomes are sent to the target while it verifies. Drafting ahead takes gamma + 1
        passes: the candidates after full acceptance are known only once the last drafted token was fed. And two rounds
        are under way at a time. Let x = R + (gamma + 1) t_d be the time from a verdict to the arrival of the drafts for
        the verdict after it. After hits a verification ends at e(n + 1) = max(e(n), e(n - 1) + x) + T_v, so two rounds,
        not one, have to fit around x. After a miss the drafts ahead are asked for together with the draft, so the first
        hit does not wait for the network at all: it costs A = max(T_v, (gamma + 1) t_d), the second
        B = max(A, x + T_v - A), the third A, and so on. With hits of probability p, independent from round to round,
        that is p (A + p B) / (1 + p) + (1 - p) (gamma t_d + R + T_v).

    hit: probability that the draft ahead can be used. ahead_ms: a pass of drafting ahead; default draft_ms.
    """
    miss_ms = gamma * draft_ms + rtt_ms + verify_ms
    if mode == "sync" or gamma == 0:
        return miss_ms
    drafting = (gamma + 1) * (draft_ms if ahead_ms is None else ahead_ms)
    if mode == "overlap":
        return hit * max(drafting, rtt_ms + verify_ms) + (1 - hit) * miss_ms
    first_ms = max(verify_ms, drafting)
    second_ms = max(first_ms, rtt_ms + drafting + verify_ms - first_ms)
    return hit * (first_ms + hit * second_ms) / (1 + hit) + (1 - hit) * miss_ms
