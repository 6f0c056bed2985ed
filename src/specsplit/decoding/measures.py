"""What is measured of a text and its rounds: time per token, acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Verified(Protocol):
    """A round: tokens drafted, nodes of the tree that was verified, and how many tokens the target accepted."""

    @property
    def drafted(self) -> int: ...
    @property
    def tree_nodes(self) -> int: ...
    @property
    def accepted(self) -> int: ...


def per_token_ms(total_ms: float, ttft_ms: float | None, tokens: int, first: int = 1) -> float | None:
    """Milliseconds per token after the first ones: (total_ms - ttft_ms) / (tokens - first).

    ttft_ms: when the first tokens came, None when none did. first: how many of them count as free. With 1 this is the
    time per output token (TPOT); with all tokens of the first round, the time between tokens (ITL).
    None when no token came later.
    """
    return None if ttft_ms is None or tokens <= first else (total_ms - ttft_ms) / (tokens - first)


def acceptance_rate(rounds: Sequence[Verified]) -> float | None:
    """Mean of accepted / drafted over the rounds that drafted something; None when none did."""
    rates = [r.accepted / r.drafted for r in rounds if r.drafted]
    return sum(rates) / len(rates) if rates else None


def verifications(rounds: Sequence[Verified]) -> int:
    """Rounds in which the target verified a draft, one cut to nothing by the end of the text included."""
    return sum(r.tree_nodes > 0 or r.drafted > 0 for r in rounds)


def acceptance_length(rounds: Sequence[Verified]) -> float | None:
    """1 + accepted tokens / verifications; None when nothing was verified.

    As vLLM, SGLang and AIPerf count it: tokens that a verification adds, its bonus token included.
    """
    verified = verifications(rounds)
    return 1 + sum(r.accepted for r in rounds) / verified if verified else None


def tokens_per_round(rounds: Sequence[Verified]) -> float:
    """Mean number of tokens that a round adds: accepted ones and the target's own. rounds: at least one."""
    return sum(r.accepted + 1 for r in rounds) / len(rounds)
