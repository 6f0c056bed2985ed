"""Forced acceptance: drafts that are right with a chosen probability, whatever the draft model would say.

So systems can be compared apart from the quality of a draft, as with the synthetic acceptance of vLLM and SPEED-Bench.
The text stays the target's own: it is written once before, alone, and what the draft model proposes at each position is
made right or wrong by it. The passes of both models and the verification are the real ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a client makes no logits
    import torch

ABOVE = 1e5  # logits by which a token that is made right is above all others: more than any noise at any temperature


@dataclass(frozen=True)
class Forced:
    """What comes after the context: the target's tokens, and at which of them the draft is right."""

    tokens: tuple[int, ...] = ()
    right: tuple[bool, ...] = ()


def forced(tokens: Sequence[int], position: int, acceptance: float, seed: int) -> Forced:
    """`tokens`, the first one at `position` of the text, each right with probability `acceptance`.

    Whether a position is right depends on the seed of the text and the position alone: not on gamma, mode or draft.
    """
    drawn = (_uniform(seed, position + i) for i in range(len(tokens)))
    return Forced(tuple(tokens), tuple(value < acceptance for value in drawn))


def _uniform(seed: int, position: int) -> float:
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def force(logits: torch.Tensor, token: int, right: bool) -> None:
    """Make `token` the likeliest of these logits, or impossible; in place."""
    highest = logits.max().clamp(min=0)  # a draft without a model may propose nothing at all
    logits[token] = highest + ABOVE if right else float("-inf")
