"""The divergence over likely tokens and the rest, beside the same written out number by number."""

from __future__ import annotations

import math

import pytest
import torch

from specsplit.distill.losses import agreement, to_draft_rows, top_k_divergence


def by_hand(logits: list[float], rows: list[int], log_probs: list[float]) -> float:
    """One position, in plain Python."""
    total = sum(math.exp(x) for x in logits)
    draft = [math.exp(x) / total for x in logits]
    pairs = [(math.exp(p), draft[row]) for row, p in zip(rows, log_probs, strict=True) if row >= 0]
    rest = 1 - sum(p for p, _ in pairs), 1 - sum(q for _, q in pairs)
    return sum(p * math.log(p / q) for p, q in [*pairs, rest] if p > 0)


@pytest.mark.parametrize("rows", [[3, 0, 5], [3, -1, 5], [-1, -1, -1], [0, -1, 1]])
def test_divergence_and_its_gradient(rows: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 7, generator=generator).double().requires_grad_()
    log_probs = torch.tensor([[0.5, 0.3, 0.15]]).log()
    found = top_k_divergence(logits, torch.tensor([rows]), log_probs)
    assert found.item() == pytest.approx(by_hand(logits[0].tolist(), rows, log_probs[0].tolist()), abs=1e-6)
    found.sum().backward()
    assert logits.grad is not None
    step = 1e-3
    for i in range(7):
        moved = logits.detach().clone()
        moved[0, i] += step
        slope = (by_hand(moved[0].tolist(), rows, log_probs[0].tolist()) - found.item()) / step
        assert logits.grad[0, i].item() == pytest.approx(slope, abs=1e-3)


def test_a_draft_that_is_the_target_has_no_divergence_and_a_sure_one_a_finite_one() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0, -2.0]])
    top = logits.log_softmax(-1).topk(2)
    assert top_k_divergence(logits, top.indices, top.values).item() == pytest.approx(0, abs=1e-6)
    sure = torch.tensor([[200.0, 0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    loss = top_k_divergence(sure, torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.3]]).log())
    loss.backward()
    assert torch.isfinite(loss).all()
    assert sure.grad is not None
    assert torch.isfinite(sure.grad).all()


def test_log_probabilities_that_add_up_to_more_than_one_by_rounding() -> None:
    """As float16 may make of a position at which the target is sure."""
    log_probs = torch.tensor([[0.0, -11.0]])
    assert torch.isfinite(top_k_divergence(torch.randn(1, 4), torch.tensor([[1, 2]]), log_probs)).all()


def test_rows_of_the_draft_and_agreement() -> None:
    row_of = torch.tensor([-1, 1, -1, 0, 2])
    top = torch.tensor([[3, 0], [0, 3], [1, 4]])
    rows = to_draft_rows(top, row_of)
    assert rows.tolist() == [[0, -1], [-1, 0], [1, 2]]
    assert to_draft_rows(top, None) is top
    logits = torch.tensor([[9.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    log_probs = torch.tensor([[-0.1, -3.0]] * 3)
    # The target's likeliest token is one that the draft has and means; one that it lacks; one that it does not mean.
    assert agreement(logits, rows, log_probs).tolist() == [True, False, False]
