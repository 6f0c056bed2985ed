"""How far a draft is from its target, by the target's likeliest tokens and all others together."""

from __future__ import annotations

import torch
from torch.nn import functional as F

NOT_AT_ALL = float("-inf")  # a log-probability


def to_draft_rows(top_ids: torch.Tensor, row_of: torch.Tensor | None) -> torch.Tensor:
    """Target tokens as rows of the draft's output head; -1 for tokens that it does not have.

    top_ids: [...]. row_of: [target vocabulary], -1 where there is no row; None = one vocabulary for both.
    """
    return top_ids if row_of is None else row_of[top_ids]


def top_k_divergence(logits: torch.Tensor, rows: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of the draft from the target, nats, [positions].

    It is that of the two distributions over k + 1 outcomes: each of the target's likeliest tokens, and any other. A
    likely token that the draft cannot say counts among the others.

    logits: [positions, rows of the draft's head]. rows: [positions, k], the row of each likely token, or -1.
    log_probs: [positions, k], the target's. There must be fewer likely tokens than rows.
    """
    logits, log_probs = logits.float(), log_probs.float()
    in_head = rows >= 0
    draft = logits.log_softmax(-1)
    target = torch.where(in_head, log_probs.exp(), 0.0)
    rest = (1.0 - target.sum(-1)).clamp(min=0.0)
    tops = torch.where(in_head, target * (log_probs - draft.gather(-1, rows.clamp(min=0))), 0.0).sum(-1)
    # Over the other rows alone: 1 - sum would lose all digits where the draft is sure. One row more takes what is
    # written for tokens that the draft does not have.
    others = F.pad(draft, (0, 1), value=NOT_AT_ALL).scatter(-1, torch.where(in_head, rows, draft.shape[-1]), NOT_AT_ALL)
    draft_rest = others.logsumexp(-1)
    return tops + torch.where(rest > 0, rest * (rest.clamp(min=1e-30).log() - draft_rest), 0.0)


def agreement(logits: torch.Tensor, rows: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Whether the draft's likeliest token is the target's, [positions]: what greedy acceptance counts.

    Arguments as of top_k_divergence.
    """
    best = log_probs.argmax(-1, keepdim=True)
    return logits.argmax(-1) == rows.gather(-1, best).squeeze(-1)
