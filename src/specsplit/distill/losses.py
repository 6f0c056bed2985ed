"""How far a draft is from its target, by the target's likeliest tokens and all others together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from specsplit.distill.shards import Text

TINY = 1e-30  # of a probability: its logarithm stays finite


Judged = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # the arguments of top_k_divergence


class Learner(ABC):
    """What is trained, and how a batch of texts is judged: by the draft's next token, or by several of them in a row.

    parameters: those that are trained, float32, by name; tied ones once. tokens: of the output head, None = all of
    `vocab_size`. weights: of each token's loss.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        tokens: Sequence[int] | None,
        vocab_size: int,
        weights: Sequence[float] = (1.0,),
    ) -> None:
        self.parameters = parameters
        self.device = next(iter(parameters.values())).device
        self.weights = weights
        self._row_of: torch.Tensor | None = None  # of every token of the target, -1 where the head has none
        if tokens is not None:
            self._row_of = torch.full((vocab_size,), -1)
            self._row_of[list(tokens)] = torch.arange(len(tokens))

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the loss curve, beside those that each has."""
        return tuple(f"validation_agreement_{number}" for number in range(2, len(self.weights) + 1))

    def loss(self, batch: Any) -> torch.Tensor:
        """The sum over all tokens of answers, nats."""
        judged = zip(self.weights, self.say(batch), strict=True)
        return torch.stack([weight * top_k_divergence(*said).sum() for weight, said in judged]).sum()

    def evaluate(self, batch: Any) -> dict[str, tuple[float, int]]:
        """Sum and count of the columns of a validation. validation_loss: as `loss`. validation_agreement: of the next
        token; _2, _3 and so on: of the further ones, whatever was said before."""
        said = self.say(batch)
        losses = (float(top_k_divergence(*one).double().sum()) for one in said)
        loss = sum(weight * one for weight, one in zip(self.weights, losses, strict=True))
        names = ("validation_agreement", *self.columns)
        agreed = {name: (int(agreement(*one).sum()), len(one[0])) for name, one in zip(names, said, strict=True)}
        return {"validation_loss": (loss, len(said[0][0])), **agreed}

    @abstractmethod
    def collate(self, texts: Sequence[Text]) -> Any:
        """A batch, on the device."""

    @abstractmethod
    def say(self, batch: Any) -> list[Judged]:
        """For each of the tokens the logits [places, rows of the head], and what the target says there."""

    @abstractmethod
    def save(self, dtype: str, target_folder: Path, folder: Path) -> None:
        """Write the model folder. Not to be trained on after that."""


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the processor multiplies it. Not cached: threads share the weights, but not their copies."""
    fast = device.type == "cuda" or bool(torch.cpu._is_avx512_bf16_supported())
    return torch.autocast(device.type, torch.bfloat16, enabled=fast, cache_enabled=False)


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
