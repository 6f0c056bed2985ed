"""What decoding/sampling.py and decoding/verification.py decide, as torch operations without a branch on a value.

So a pass that has logits goes on to its decision on the device, within one recorded launch, and only the decision is
copied back. Verification by rejection sampling is not here: it needs whole distributions, and stays on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from specsplit.decoding.growth import CANDIDATES
from specsplit.decoding.sampling import COUPLED, DRAFTED, SUPPORT, Candidates, NonFiniteLogits, Sampling
from specsplit.decoding.verification import Verdict
from specsplit.engines import gpu_noise

NUMBERS = 4  # int64 of each session: seed, temperature, top_k, top_p; floats as the bits of float64
ACCEPTED, FINITE = 1, 2  # bits of a row in the reply of `walk`


@dataclass(frozen=True)
class Kind:
    """What of a request for sampling changes the operations; the rest are numbers that they read.

    method: greedy | coupled | drawn (candidates for rejection sampling). cut: top_k or top_p leave tokens out.
    """

    method: str = "greedy"
    cut: bool = False

    @classmethod
    def of(cls, sampling: Sampling) -> Kind:
        if sampling.greedy:
            return cls()
        return cls("drawn" if sampling.rejection else "coupled", bool(sampling.top_k) or sampling.top_p < 1)


def packed(sampling: Sampling) -> list[int]:
    """The NUMBERS of a session."""
    temperature, top_p = np.array([sampling.temperature or 1.0, sampling.top_p]).view(np.int64).tolist()
    return [gpu_noise.signed(sampling.seed), temperature, sampling.top_k, top_p]


def log_probs(logits: torch.Tensor, numbers: torch.Tensor, kind: Kind) -> torch.Tensor:
    """As sampling.log_probs. logits: [rows, vocab]; numbers: int64 [rows, NUMBERS]."""
    floats = numbers.view(torch.float64)
    scores = logits.double() / floats[:, 1:2]
    if kind.cut:
        vocab = scores.shape[-1]
        ordered, tokens = scores.sort(dim=-1, descending=True)
        top_k = numbers[:, 2:3]
        least = ordered.gather(1, torch.where(top_k > 0, top_k, vocab).clamp(max=vocab) - 1)
        probabilities = ordered.masked_fill(ordered < least, -math.inf).softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        nucleus = (before < floats[:, 3:4]) | (floats[:, 3:4] >= 1)
        kept = torch.zeros_like(nucleus).scatter(1, tokens, nucleus) & (scores >= least)
        scores = scores.masked_fill(~kept, -math.inf)
    return scores.log_softmax(-1)


def noise(
    positions: torch.Tensor, numbers: torch.Tensor, kind: Kind, size: int, targets: torch.Tensor | None = None
) -> torch.Tensor | None:
    """The noise that tokens at these positions of their texts are chosen with, float64 [rows, vocab]; None when greedy.

    size: tokens that there are. targets: of a reduced head the token of each column, of which those from `size` on do
    not count; None: columns are tokens.
    """
    if kind.method == "greedy":
        return None
    purpose = DRAFTED if kind.method == "drawn" else COUPLED
    found = gpu_noise.gumbel(numbers[:, 0], purpose, positions, size)
    return found if targets is None else found[:, targets.clamp(max=size - 1)]


def scores(
    logits: torch.Tensor,
    numbers: torch.Tensor,
    kind: Kind,
    noise: torch.Tensor | None,
    targets: torch.Tensor | None = None,
    size: int = 0,
) -> torch.Tensor:
    """What the choice of a token is the highest of, [rows, vocab]; float64 unless it is greedy. targets, size: as in
    `noise`. Of kind "drawn" it is log-probabilities and noise, [rows, 2, vocab], for `best` and `rank` alone."""
    if targets is not None:
        logits = logits.masked_fill(targets >= size, -math.inf)
    if noise is None:
        return logits
    logs = log_probs(logits, numbers, kind)
    return logs + noise if kind.method == "coupled" else torch.stack([logs, noise], 1)


def reply_width(kind: Kind) -> int:
    """Numbers that `rank` gives for a row."""
    return 2 * CANDIDATES + 1 + (2 * SUPPORT if kind.method == "drawn" else 0)


def rank(chances: torch.Tensor, kind: Kind, targets: torch.Tensor | None = None) -> torch.Tensor:
    """As sampling.candidates of CANDIDATES: int64 [rows, reply_width], which `ranked` reads; first the token of `best`.

    chances: what `scores` gave for the rows. targets: as in `scores`.
    """
    count = min(CANDIDATES, chances.shape[-1])
    support: list[torch.Tensor] = []
    if kind.method == "drawn":
        logs, noise = chances.unbind(1)
        overflowed = logs.isnan().any(-1, keepdim=True)
        logs, columns = logs.topk(min(SUPPORT, logs.shape[-1]), dim=-1)
        q = logs.exp().float().double()  # as it will be read from the wire, so that it is the very distribution drawn
        order = (q.log() + noise.gather(1, columns)).masked_fill(~(q > 0), -math.inf).topk(count, dim=-1)
        support = [_to_width(_tokens(columns, targets), SUPPORT), _to_width(q, SUPPORT).view(torch.int64)]
        values, columns = (q / q.sum(-1, keepdim=True)).log().gather(1, order.indices), columns.gather(1, order.indices)
    else:
        overflowed = (chances.isnan() | chances.isposinf()).any(-1, keepdim=True)
        if kind.method == "greedy":
            chances = chances.float()
        values, columns = chances.log_softmax(-1).topk(count, dim=-1)
        first = chances.argmax(-1, keepdim=True)  # of equals topk gives any first
        columns = torch.cat([first, torch.where(columns == first, columns[:, :1], columns)[:, 1:]], 1)
        values = values.double()
    values = _to_width(values.clamp(max=0.0), CANDIDATES, -math.inf)
    tokens = _to_width(_tokens(columns, targets), CANDIDATES)
    return torch.cat([tokens, values.view(torch.int64), overflowed.long(), *support], -1)


def best(chances: torch.Tensor, kind: Kind, targets: torch.Tensor | None = None) -> torch.Tensor:
    """The token of each row that `rank` gives first, int64 [rows]."""
    return rank(chances, kind, targets)[:, 0] if kind.method == "drawn" else _tokens(chances.argmax(-1), targets)


def _tokens(columns: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
    return columns if targets is None else targets[columns]


def _to_width(numbers: torch.Tensor, width: int, value: float = 0) -> torch.Tensor:
    return torch.nn.functional.pad(numbers, (0, width - numbers.shape[-1]), value=value)


def ranked(row: np.ndarray) -> tuple[Candidates, bool]:
    """The candidates in a row of `rank`, int64 on the host, and whether its logits overflowed."""
    tokens, values = row[:CANDIDATES], row[CANDIDATES : 2 * CANDIDATES].view(np.float64)
    possible = values > -math.inf  # impossible ones are last; of logits that are not numbers none is possible
    support = row[2 * CANDIDATES + 1 :]
    distribution: tuple[list[int], list[float]] = ([], [])
    if len(support) and possible.any():
        q = support[SUPPORT:].view(np.float64)
        distribution = support[:SUPPORT][q > 0].tolist(), q[q > 0].tolist()
    return Candidates(tokens[possible].tolist(), values[possible].tolist(), *distribution), bool(row[2 * CANDIDATES])


def walk(
    tokens: torch.Tensor,
    parents: torch.Tensor,
    ancestors: torch.Tensor,
    count: torch.Tensor,
    choices: torch.Tensor,
    finite: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The path along the target's own choices (verification.follow), of several trees at once.

    Row 0 of a tree is the end of its context, row i its node i - 1. tokens, parents (rows), choices, finite: [trees,
    rows]; ancestors: bool [trees, rows, rows], each row's own included; count: rows that a tree has, [trees].
    Returns the reply, int64 [trees, 1 + rows]: the next token, then of each row the bits ACCEPTED and FINITE; and the
    accepted rows, bool [trees, rows], the context's among them.
    """
    rows = torch.arange(tokens.shape[1], device=tokens.device)
    follows = (choices.gather(1, parents.clamp(min=0)) == tokens) | (rows == 0)
    accepted = (~ancestors | follows[:, None]).all(-1) & (rows < count[:, None])
    last = (rows * accepted).amax(-1, keepdim=True)  # a child comes after its parent
    bits = accepted * ACCEPTED + finite * FINITE
    return torch.cat([choices.gather(1, last), bits], 1), accepted


def walked(reply: np.ndarray, position: int) -> Verdict:
    """The verdict in a row of the reply of `walk`. Raises NonFiniteLogits, as verification.verify does.

    position: of the first drafted token in the text.
    """
    path = np.flatnonzero(reply[1:] & ACCEPTED)
    for depth, row in enumerate(path):
        if not reply[1 + row] & FINITE:
            raise NonFiniteLogits(position + depth)
    return Verdict((path[1:] - 1).tolist(), int(reply[0]))


def moves(accepted: torch.Tensor) -> torch.Tensor:
    """Where the node of each row of the accepted path is now: int64 [trees, rows - 1], for the rows from 1 on.

    Rows behind the path stay where they are.
    """
    nodes = accepted[:, 1:]
    place = torch.arange(nodes.shape[1], device=nodes.device)
    chosen = nodes[:, None] & ((nodes.cumsum(1) - 1)[:, None] == place[:, None])  # [trees, to, from]
    return torch.where(chosen.any(-1), (chosen * place).sum(-1), place)
