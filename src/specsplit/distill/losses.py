"""How far a draft is from its target, by the target's likeliest tokens and all others together."""

from __future__ import annotations

from typing import Any

import torch

TINY = 1e-30  # of a probability: its logarithm stays finite


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
    found: torch.Tensor = _Divergence.apply(logits, rows, log_probs)
    return found


class _Divergence(torch.autograd.Function):
    """With its gradient by hand, as logits are large: autograd would keep and go through several copies of them."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, rows: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
        wide = logits.double() if logits.dtype == torch.float64 else logits.float()
        in_head = rows >= 0
        places = in_head.nonzero()[:, 0], rows[in_head]
        target = torch.where(in_head, log_probs.to(wide.dtype).exp(), 0.0)
        rest = (1.0 - target.sum(-1)).clamp(min=0.0)
        draft_logs = wide.gather(-1, rows.clamp(min=0)) - wide.logsumexp(-1, keepdim=True)
        tops = torch.where(in_head, target * (log_probs - draft_logs), 0.0).sum(-1)
        # Summed over the other rows alone: 1 - sum would lose all digits where the draft is sure.
        gradient = wide.softmax(-1)
        gradient[places] = 0
        draft_rest = gradient.sum(-1).clamp(min=TINY)
        if ctx.needs_input_grad[0]:
            gradient.mul_((1 - rest / draft_rest)[:, None])
            gradient[places] = (draft_logs.exp() - target)[in_head]
            ctx.save_for_backward(gradient)
        return tops + torch.where(rest > 0, rest * (rest.clamp(min=TINY).log() - draft_rest.log()), 0.0)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0][:, None], None, None


def agreement(logits: torch.Tensor, rows: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Whether the draft's likeliest token is the target's, [positions]: what greedy acceptance counts.

    Arguments as of top_k_divergence.
    """
    best = log_probs.argmax(-1, keepdim=True)
    return logits.argmax(-1) == rows.gather(-1, best).squeeze(-1)
