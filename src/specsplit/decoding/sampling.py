"""How a token is chosen from logits: greedily, or with noise that both workers compute for themselves.

All noise comes from Philox 4x64 (Salmon et al. 2011, as in NumPy), a counter-based generator: a number is a function of
(seed, purpose, absolute position, token id) and of nothing else. Philox is integers alone, the same on every machine.
The logarithms after it are NumPy's, which on other processors may differ in the last bit: then a text is another one
only where two tokens' scores are as close as that, less than once in 10^12 tokens. It is the target's own in any case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # a client, which needs the settings alone, starts a second sooner without it
    import torch

# Purposes of random numbers: each has a stream of its own, so that no two decisions share a number.
COUPLED, DRAFTED, ACCEPTANCE, RESIDUAL = range(4)
SUPPORT = 256
"""Tokens of a draft's distribution under rejection sampling: the likeliest, renormalised. They cross the wire."""


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 = greedy. top_k: 0 = all tokens. top_p: in (0, 1], 1 = all tokens. seed: of the text, 64 bits.

    rejection: verify by rejection sampling; else by coupled noise: draft and target both choose
        argmax(log p + Gumbel noise), a sample of p, with the same noise at the same position (Daliri, Musco, Suresh:
        "Coupling without Communication and Drafter-Invariant Speculative Decoding").
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    rejection: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def uses_rejection(self) -> bool:
        return self.rejection and not self.greedy


GREEDY = Sampling()


class NonFiniteLogits(ArithmeticError):
    """The logits that a token is to be chosen from hold NaN or infinity, so there is no right token."""

    def __init__(self, position: int) -> None:
        super().__init__(
            f"the logits of token {position} of the text are not finite (NaN or infinity): "
            "the model overflows here; serve it in a wider dtype, bfloat16 or float32"
        )


def check_chosen(score: float, position: int) -> None:
    """Raise NonFiniteLogits unless the score that won is a number: NaN and infinity win over every number."""
    if not math.isfinite(score):
        raise NonFiniteLogits(position)


@dataclass(frozen=True)
class Candidates:
    """The tokens that a draft may continue a node with, best first.

    log_probs: the draft's confidence in each, natural logarithm, at most 0.
    support, probabilities: rejection sampling alone: the distribution that the tokens were drawn from.
    """

    token_ids: list[int]
    log_probs: list[float]
    support: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)


def log_probs(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Natural log-probabilities after temperature, top-k and top-p, in that order (as in transformers).

    logits: [rows, vocab]. Returns float64 [rows, vocab]; -inf for tokens that cannot be sampled.
    """
    scores = logits.double() / (sampling.temperature or 1.0)
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    if sampling.top_p < 1:
        scores = scores.masked_fill(~_nucleus(scores.softmax(-1), sampling.top_p), -math.inf)
    return scores.log_softmax(-1)


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Mask of the smallest set of likeliest tokens whose probability reaches top_p; [rows, vocab]."""
    import torch

    vocab = probabilities.shape[-1]
    for count in (256, 4096, vocab):  # sorting the whole vocabulary is slow and seldom needed
        values, tokens = probabilities.topk(min(count, vocab), dim=-1)
        before = values.cumsum(-1) - values
        if count >= vocab or bool((before[..., -1] >= top_p).all()):
            break
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, tokens, before < top_p)


def choose(logits: torch.Tensor, position: int, sampling: Sampling) -> int:
    """The token at `position` of the text (0 = the first of the prompt): greedy, or a coupled sample.

    logits: [vocab]. Raises NonFiniteLogits.
    """
    if sampling.greedy:
        scores = logits
    else:
        scores = log_probs(logits[None], sampling)[0].cpu()
        scores = scores + gumbel(sampling.seed, COUPLED, position, len(scores))
    token = int(scores.argmax())
    check_chosen(float(scores[token]), position)
    return token


def candidates(logits: torch.Tensor, positions: Sequence[int], sampling: Sampling, count: int) -> list[Candidates]:
    """Of each row of logits [rows, vocab], the `count` best tokens for its position; fewer when fewer are possible,
    none when a number of the row is not finite.

    Greedy: the likeliest. Coupled: the highest log p + noise. Rejection: drawn without replacement from the truncated
    distribution, in the order drawn (Gumbel top-k: Kool et al. 2019).
    """
    if sampling.greedy:
        scores = logits.float().log_softmax(-1)
    elif sampling.rejection:
        return [_drawn(row, position, sampling, count) for row, position in zip(logits, positions, strict=True)]
    else:
        import torch

        noise = torch.stack([gumbel(sampling.seed, COUPLED, p, logits.shape[-1]) for p in positions])
        # How far ahead the winner is says how sure it is that the target, with the same noise, chooses it as well.
        scores = (log_probs(logits, sampling).cpu() + noise).log_softmax(-1)
    values, tokens = scores.topk(min(count, scores.shape[-1]), dim=-1)
    found = []
    for row_tokens, row_values in zip(tokens.tolist(), values.clamp_(max=0.0).tolist(), strict=True):
        # Best first, so the impossible ones are at the end.
        possible = len(row_values) if row_values[-1] > -math.inf else sum(v > -math.inf for v in row_values)
        found.append(Candidates(row_tokens[:possible], row_values[:possible]))
    return found


def _drawn(logits: torch.Tensor, position: int, sampling: Sampling, count: int) -> Candidates:
    logs, tokens = log_probs(logits[None], sampling)[0].cpu().topk(min(SUPPORT, logits.shape[-1]))
    # As it will be read from the wire, so that it is the very distribution that is sampled.
    q = logs.exp().float().double()
    tokens, q = tokens[q > 0], q[q > 0]
    if not len(q):
        return Candidates([], [])
    noise = gumbel(sampling.seed, DRAFTED, position, logits.shape[-1])[tokens]
    order = (q.log() + noise).topk(min(count, len(q))).indices
    logs = (q / q.sum()).log()
    return Candidates(
        tokens[order].tolist(), [min(value, 0.0) for value in logs[order].tolist()], tokens.tolist(), q.tolist()
    )


@lru_cache(maxsize=64)
def gumbel(seed: int, purpose: int, position: int, size: int) -> torch.Tensor:
    """Standard Gumbel noise of the first `size` token ids at a position; float64, on the CPU. Do not change it."""
    import torch

    return torch.from_numpy(-np.log(-np.log(_uniform(seed, purpose, position, size))))


def uniform(seed: int, purpose: int, position: int, index: int) -> float:
    """Number `index` of the uniform ones in (0, 1) at a position."""
    return float(_uniform(seed, purpose, position, index + 1)[index])


def _uniform(seed: int, purpose: int, position: int, size: int) -> np.ndarray:
    key = np.array([seed, purpose], dtype=np.uint64)  # a list with a number above 2^63 would become floats
    bits = np.random.Philox(key=key, counter=[0, position, 0, 0]).random_raw(size)
    return ((bits >> np.uint64(12)) + 0.5) * 2.0**-52  # the middle of 2^52 equal cells, exactly: never 0 or 1
