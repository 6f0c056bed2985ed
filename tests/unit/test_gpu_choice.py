"""Decisions made with torch operations alone: those of decoding/sampling.py and decoding/verification.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specsplit.decoding.growth import CANDIDATES
from specsplit.decoding.sampling import GREEDY, NonFiniteLogits, Sampling, candidates
from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.decoding.verification import verify
from specsplit.engines import gpu_choice
from specsplit.engines.gpu_choice import Kind, noise, packed, rank, ranked, scores

SAMPLINGS = {
    "greedy": GREEDY,
    "coupled": Sampling(temperature=0.8, seed=(1 << 64) - 3),
    "top-k": Sampling(temperature=1.2, top_k=7, seed=4),
    "top-p": Sampling(temperature=1.2, top_p=0.7, seed=5),
    "both": Sampling(temperature=0.6, top_k=30, top_p=0.9, seed=6),
    "rejection": Sampling(temperature=1.1, seed=7, rejection=True),
    "rejection-cut": Sampling(temperature=1.1, top_k=5, top_p=0.8, seed=8, rejection=True),
}
all_samplings = pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)


def some_logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def numbers(sampling: Sampling, rows: int) -> torch.Tensor:
    return torch.tensor([packed(sampling)] * rows)


@pytest.mark.parametrize("vocab", [11, 300])
@all_samplings
def test_candidates(sampling: Sampling, vocab: int) -> None:
    logits, positions = some_logits(6, vocab), [0, 3, 4, 5, 6, 90]
    logits[4] = torch.nan
    logits[5, 2] = torch.inf
    kind = Kind.of(sampling)
    own = numbers(sampling, 6)
    chances = scores(logits, own, kind, noise(torch.tensor(positions), own, kind, vocab))
    found = rank(chances, kind)
    assert gpu_choice.best(chances, kind)[:4].tolist() == found[:4, 0].tolist()
    assert found.shape == (6, gpu_choice.reply_width(kind))
    expected = candidates(logits, positions, sampling, CANDIDATES)
    for row, wanted, broken in zip(found.numpy(), expected, [0, 0, 0, 0, 1, 1], strict=True):
        got, overflowed = ranked(row)
        assert (got.token_ids, got.support) == (wanted.token_ids, wanted.support)
        np.testing.assert_allclose(got.log_probs, wanted.log_probs, rtol=1e-6)
        assert got.probabilities == wanted.probabilities
        assert overflowed == broken


@all_samplings
def test_candidates_of_a_reduced_head(sampling: Sampling) -> None:
    targets, size, logits = torch.tensor([4, 9, 2, 40, 7, 60]), 50, some_logits(3, 6)
    outward = torch.full((3, size), -torch.inf)
    outward[:, targets[:-1]] = logits[:, :-1]
    kind = Kind.of(sampling)
    own = numbers(sampling, 3)
    chances = scores(logits, own, kind, noise(torch.arange(3), own, kind, size, targets), targets, size)
    found = rank(chances, kind, targets)
    assert gpu_choice.best(chances, kind, targets).tolist() == found[:, 0].tolist()
    expected = candidates(outward, [0, 1, 2], sampling, CANDIDATES)
    for row, wanted in zip(found.numpy(), expected, strict=True):
        got, _ = ranked(row)
        assert (got.token_ids, got.support) == (wanted.token_ids, wanted.support)
        np.testing.assert_allclose(got.log_probs, wanted.log_probs, rtol=1e-6)


def ancestors(parents: list[int]) -> torch.Tensor:
    """[rows, rows] of a tree, the context first."""
    matrix = torch.eye(1 + len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        matrix[node + 1] |= matrix[parent + 1]
    return matrix


@pytest.mark.parametrize("sampling", [s for s in SAMPLINGS.values() if not s.rejection], ids=str)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_walk(sampling: Sampling, data: st.DataObject) -> None:
    vocab, padding = 4, data.draw(st.integers(0, 3))
    logits = some_logits(10 + padding, vocab, data.draw(st.integers(0, 99)))
    tree, taken = TokenTree(), set()
    for i in range(data.draw(st.integers(0, 9))):
        parent, token = data.draw(st.integers(ROOT, i - 1)), data.draw(st.integers(0, vocab - 1))
        if (parent, token) not in taken and parent < len(tree):
            taken.add((parent, token))
            tree.add(token, parent, -1.0)
    rows, position = 1 + len(tree), 20
    total = rows + padding
    depths = torch.tensor([0, *tree.depths(), *[0] * padding])
    own, kind = numbers(sampling, total), Kind.of(sampling)
    best, choices = scores(logits[:total], own, kind, noise(position + depths, own, kind, vocab)).max(-1)
    matrix = torch.eye(total, dtype=torch.bool)
    matrix[:rows, :rows] = ancestors(tree.parents)
    reply, accepted = gpu_choice.walk(
        torch.tensor([[0, *tree.token_ids, *[0] * padding]]),
        torch.tensor([[0, *(parent + 1 for parent in tree.parents), *[0] * padding]]),
        matrix[None],
        torch.tensor([rows]),
        choices[None],
        best.isfinite()[None],
    )
    verdict = gpu_choice.walked(reply[0].numpy(), position)
    assert verdict == verify(tree, logits[:rows], position, sampling)
    path = gpu_choice.moves(accepted)[0].tolist()
    assert path[: len(verdict.path)] == verdict.path
    assert path[len(verdict.path) :] == list(range(len(verdict.path), total - 1))


def test_numbers_that_are_not_finite() -> None:
    logits = some_logits(2, 5)
    logits[0] = 0.0
    logits[0, 3] = 1.0
    logits[1, 2] = torch.nan
    best, choices = logits.max(-1)
    for token, position in ((3, 5), (1, None)):  # a row counts only when it is on the path
        reply, _ = gpu_choice.walk(
            torch.tensor([[0, token]]),
            torch.tensor([[0, 0]]),
            ancestors([ROOT])[None],
            torch.tensor([2]),
            choices[None],
            best.isfinite()[None],
        )
        if position is None:
            assert gpu_choice.walked(reply[0].numpy(), 4).next_token == 3
        else:
            with pytest.raises(NonFiniteLogits, match=f"token {position} "):
                gpu_choice.walked(reply[0].numpy(), 4)
