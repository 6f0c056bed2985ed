"""How tokens are chosen from logits. What is true of samples on average is in property/test_distributions.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specsplit.decoding import sampling as module
from specsplit.decoding.sampling import (
    ACCEPTANCE,
    COUPLED,
    DRAFTED,
    GREEDY,
    RESIDUAL,
    SUPPORT,
    Candidates,
    Sampling,
    candidates,
    choose,
    gumbel,
    log_probs,
    uniform,
)

KINDS = [
    GREEDY,
    Sampling(temperature=0.8, seed=3),
    Sampling(temperature=1.2, top_k=6, top_p=0.9, seed=4),
    Sampling(temperature=1.0, seed=5, rejection=True),
    Sampling(temperature=0.7, top_k=9, top_p=0.8, seed=6, rejection=True),
]
kinds = pytest.mark.parametrize(
    "sampling", KINDS, ids=["greedy", "coupled", "coupled-cut", "rejection", "rejection-cut"]
)


def random_logits(rows: int, vocab: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


# ---- temperature, top-k, top-p


def of_transformers(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities that `generate` of transformers samples from, computed in float64."""
    warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    return LogitsProcessorList(warpers)(ids, logits.double()).log_softmax(-1)


@pytest.mark.parametrize("vocab", [10, 300, 5000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(0, 1.0), (1, 1.0), (7, 1.0), (20_000, 1.0), (0, 1e-9), (0, 0.5), (0, 0.95), (0, 0.999999), (50, 0.9), (7, 0.3)],
)
def test_log_probs_are_those_of_transformers(vocab: int, temperature: float, top_k: int, top_p: float) -> None:
    sampling = Sampling(temperature, top_k, top_p)
    for spread in (0.01, 1.0, 6.0):  # nearly flat: the nucleus is most of the vocabulary
        logits = random_logits(4, vocab, seed=vocab, spread=spread)
        found = log_probs(logits, sampling)
        assert (found.dtype, found.shape) == (torch.float64, logits.shape)
        torch.testing.assert_close(found, of_transformers(logits, sampling), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.7), (40, 0.9)])
def test_tied_logits(dtype: torch.dtype, top_k: int, top_p: float) -> None:
    """Which of equal tokens the nucleus takes is not specified; how many is. Top-k keeps all that tie."""
    logits = random_logits(50, 200, spread=1.5).round().to(dtype)
    sampling = Sampling(0.9, top_k, top_p)
    found, expected = log_probs(logits, sampling), of_transformers(logits, sampling)
    torch.testing.assert_close(found.sort(-1).values, expected.sort(-1).values, rtol=0, atol=1e-9)
    if top_p == 1:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_the_nucleus_is_the_smallest_set() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    kept = [int((log_probs(logits, Sampling(1.0, top_p=p)) > -math.inf).sum()) for p in (1e-6, 0.49, 0.51, 0.74, 0.76)]
    assert kept == [1, 1, 2, 2, 3]


def test_what_is_impossible_stays_so() -> None:
    """Rows of a vocabulary that is padded with -inf."""
    logits = random_logits(3, 12)
    logits[:, 9:] = -math.inf
    for sampling in (Sampling(1.3), Sampling(1.3, top_k=11), Sampling(1.3, top_p=0.9999)):
        found = log_probs(logits, sampling)
        assert torch.isneginf(found[:, 9:]).all()
        torch.testing.assert_close(found[:, :9].exp().sum(-1), torch.ones(3, dtype=torch.float64))


# ---- noise


def test_the_noise_is_the_same_on_every_machine() -> None:
    """Known answers. Another one here means that two machines, or two versions, write different texts.

    The uniform ones were checked against Philox 4x64-10 written down from the paper: key (seed, purpose), counter
    (1 + index // 4, position, 0, 0), upper 52 bits of word index % 4.
    """
    assert [uniform(0, COUPLED, 0, i) for i in range(3)] == [
        0.011546754286331562,
        0.24154919656271823,
        0.11142585551493822,
    ]
    assert [uniform(2**64 - 1, RESIDUAL, 2**32 - 1, i) for i in range(3)] == [
        0.17939071556373565,
        0.030238404589962964,
        0.5083254864121484,
    ]
    assert uniform(1234, ACCEPTANCE, 56, 7) == 0.4665665247579923
    np.testing.assert_allclose(
        gumbel(1234, DRAFTED, 56, 4).numpy(),
        [0.025624348841066086, 1.1337433353519595, 0.30194753455460255, 1.336856168200536],
        rtol=1e-14,
    )


def test_the_choices_are_the_same_on_every_machine() -> None:
    logits = torch.arange(1000, dtype=torch.float32).remainder(17) / 4
    chosen = [choose(logits, position, Sampling(1.0, seed=7)) for position in range(8)]
    assert chosen == [271, 370, 195, 217, 165, 252, 713, 709]
    drawn = candidates(torch.arange(100.0)[None] / 20, [3], Sampling(1.0, seed=7, rejection=True), 4)[0]
    assert drawn.token_ids == [90, 78, 88, 87]


seeds = st.integers(0, 2**64 - 1)
positions = st.integers(0, 2**32 - 1)
purposes = st.sampled_from([COUPLED, DRAFTED, ACCEPTANCE, RESIDUAL])


@given(seeds, purposes, positions, st.integers(1, 300), st.integers(0, 300))
def test_a_larger_vocabulary_only_appends(seed: int, purpose: int, position: int, size: int, more: int) -> None:
    """So that a draft whose vocabulary is padded otherwise has the same noise."""
    noise = gumbel(seed, purpose, position, size)
    assert (noise.dtype, noise.shape) == (torch.float64, (size,))
    assert torch.isfinite(noise).all()
    assert torch.equal(gumbel(seed, purpose, position, size + more)[:size], noise)


@given(seeds, purposes, positions, st.integers(0, 40))
def test_gumbel_noise_is_made_of_the_uniform_numbers(seed: int, purpose: int, position: int, index: int) -> None:
    number = uniform(seed, purpose, position, index)
    assert 0 < number < 1
    noise = float(gumbel(seed, purpose, position, index + 1)[index])
    assert noise == pytest.approx(-math.log(-math.log(number)), rel=1e-9, abs=1e-12)


@given(st.lists(st.tuples(seeds, purposes, positions), min_size=2, max_size=2, unique=True))
def test_every_seed_purpose_and_position_has_its_own_numbers(keys: list[tuple[int, int, int]]) -> None:
    """All 64 bits of the seed count."""
    one, other = (gumbel(*key, 4) for key in keys)
    assert not torch.isin(one, other).any()


@pytest.mark.parametrize("seed", [2**53, 2**62, 2**63, 2**64 - 2])
def test_large_seeds_that_differ_by_one(seed: int) -> None:
    assert uniform(seed, ACCEPTANCE, 0, 0) != uniform(seed + 1, ACCEPTANCE, 0, 0)


def test_the_numbers_are_never_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the bits are: the noise stays finite."""

    class Extremes:
        def __init__(self, **_: Any) -> None:
            pass

        def random_raw(self, size: int) -> np.ndarray:
            return np.resize(np.array([0, 2**64 - 1], dtype=np.uint64), size)

    monkeypatch.setattr(np.random, "Philox", Extremes)
    low, high = uniform(0, 0, 0, 0), uniform(0, 0, 0, 1)
    assert 0 < low < 1e-15
    assert 1 - 1e-15 < high < 1
    gumbel.cache_clear()
    try:
        assert torch.isfinite(gumbel(0, 0, 0, 2)).all()
    finally:
        gumbel.cache_clear()


# ---- choosing


def test_greedy_takes_the_likeliest() -> None:
    logits = random_logits(20, 50)
    assert [choose(row, 4, GREEDY) for row in logits] == logits.argmax(-1).tolist()
    ignored = Sampling(temperature=0.0, top_k=1, top_p=0.1, seed=8, rejection=True)
    assert [choose(row, 4, ignored) for row in logits] == logits.argmax(-1).tolist()


def test_low_temperature_is_greedy_in_the_limit() -> None:
    logits = random_logits(50, 1000)
    for temperature in (1e-4, 1e-9, 1e-100):
        cold = [choose(row, i, Sampling(temperature, seed=i)) for i, row in enumerate(logits)]
        assert cold == logits.argmax(-1).tolist()
    warm = [choose(row, i, Sampling(1.0, seed=i)) for i, row in enumerate(logits)]
    assert warm != logits.argmax(-1).tolist()


def test_a_choice_depends_on_seed_and_position() -> None:
    logits = random_logits(1, 1000, spread=0.1)[0]
    assert len({choose(logits, 0, Sampling(1.0, seed=seed)) for seed in range(20)}) > 15
    assert len({choose(logits, position, Sampling(1.0)) for position in range(20)}) > 15


def test_only_what_top_k_and_top_p_leave_is_chosen() -> None:
    logits = random_logits(1, 40, spread=1.0)[0]
    sampling = Sampling(2.0, top_k=9, top_p=0.8)
    possible = set((log_probs(logits[None], sampling)[0] > -math.inf).nonzero().flatten().tolist())
    assert {choose(logits, position, sampling) for position in range(300)} == possible
    assert 1 < len(possible) < 9


# ---- candidates


def test_greedy_candidates_are_the_likeliest() -> None:
    logits = random_logits(5, 30)
    values, tokens = logits.log_softmax(-1).topk(4, dim=-1)
    for found, row_values, row_tokens in zip(candidates(logits, range(5), GREEDY, 4), values, tokens, strict=True):
        assert found.token_ids == row_tokens.tolist()
        assert found.log_probs == pytest.approx(row_values.tolist(), abs=1e-6)
        assert (found.support, found.probabilities) == ([], [])


@given(st.integers(0, 1000), st.integers(0, 5000), st.sampled_from([1, 2, 10, 400]), st.sampled_from(KINDS[:3]))
def test_the_first_candidate_is_the_choice(seed: int, position: int, vocab: int, kind: Sampling) -> None:
    sampling = Sampling(kind.temperature, kind.top_k, kind.top_p, seed)
    logits = random_logits(1, vocab, seed)
    found = candidates(logits, [position], sampling, 3)[0]
    assert found.token_ids[0] == choose(logits[0], position, sampling)


@kinds
@pytest.mark.parametrize("vocab", [3, 8, 60, 700])
def test_candidates_are_different_possible_and_in_order(sampling: Sampling, vocab: int) -> None:
    logits = random_logits(30, vocab, spread=2.0)
    possible = log_probs(logits, sampling) > -math.inf
    for row, found in enumerate(candidates(logits, range(30), sampling, 5)):
        assert len(found.token_ids) == len(found.log_probs) == min(5, int(possible[row].sum()))
        assert len(set(found.token_ids)) == len(found.token_ids)
        assert all(possible[row, token] for token in found.token_ids)
        assert all(value <= 0 for value in found.log_probs)
        if not sampling.uses_rejection:
            assert found.log_probs == sorted(found.log_probs, reverse=True)


@kinds
def test_fewer_candidates_are_the_first_of_more(sampling: Sampling) -> None:
    logits = random_logits(10, 40, spread=1.0)
    many = candidates(logits, range(10), sampling, 5)
    for count in (1, 2, 4):
        for few, more in zip(candidates(logits, range(10), sampling, count), many, strict=True):
            assert few.token_ids == more.token_ids[:count]
            assert few.log_probs == more.log_probs[:count]
            assert (few.support, few.probabilities) == (more.support, more.probabilities)


@kinds
def test_a_row_does_not_depend_on_the_others(sampling: Sampling) -> None:
    """Nor does one whose nucleus is small depend on another's that is large."""
    logits = torch.cat([random_logits(6, 6000, spread=4.0), random_logits(2, 6000, spread=0.01)])
    together = candidates(logits, range(20, 28), sampling, 3)
    for row, found in enumerate(together):
        assert candidates(logits[row : row + 1], [20 + row], sampling, 3) == [found]


@kinds
def test_a_row_without_a_possible_token_has_no_candidates(sampling: Sampling) -> None:
    logits = random_logits(3, 9)
    logits[1] = -math.inf
    logits[2, 1:] = -math.inf
    first, none, only = candidates(logits, [0, 1, 2], sampling, 4)
    assert len(first.token_ids) > 1
    assert none == Candidates([], [])
    assert (only.token_ids, only.log_probs) == ([0], [0.0])


def test_rejection_candidates_carry_the_distribution_that_they_are_drawn_from() -> None:
    sampling = Sampling(1.1, seed=2, rejection=True)
    logits = random_logits(4, 1000, spread=1.0)
    for row, found in enumerate(candidates(logits, range(4), sampling, 3)):
        full = log_probs(logits[row][None], sampling)[0].exp()
        assert found.support == full.topk(SUPPORT).indices.tolist()
        assert found.probabilities == pytest.approx(full[found.support].tolist(), rel=1e-6)
        # Exactly what a 32-bit float on the wire holds.
        assert np.array(found.probabilities, dtype=np.float32).tolist() == found.probabilities
        q = dict(zip(found.support, np.array(found.probabilities) / sum(found.probabilities), strict=True))
        assert found.log_probs == pytest.approx([math.log(q[token]) for token in found.token_ids], abs=1e-12)
        noise = gumbel(2, DRAFTED, row, 1000)
        best = sorted(q, key=lambda token: -(math.log(q[token]) + float(noise[token])))
        assert found.token_ids == best[:3]


def test_rejection_candidates_are_drawn_from_what_top_k_and_top_p_leave() -> None:
    sampling = Sampling(1.0, top_k=5, top_p=0.85, rejection=True)
    logits = random_logits(1, 50, spread=1.0)
    found = candidates(logits, [0], sampling, 3)[0]
    possible = log_probs(logits, sampling)[0] > -math.inf
    assert sorted(found.support) == possible.nonzero().flatten().tolist()


def test_tokens_too_unlikely_for_the_wire_are_not_drawn() -> None:
    """Their probability would be read as 0 there."""
    found = candidates(torch.tensor([[0.0, -1.0, -200.0]]), [0], Sampling(1.0, rejection=True), 3)[0]
    assert sorted(found.support) == sorted(found.token_ids) == [0, 1]


def test_the_purposes_are_different() -> None:
    assert len({COUPLED, DRAFTED, ACCEPTANCE, RESIDUAL}) == 4
    assert module.GREEDY.greedy
    assert not Sampling(0.0, rejection=True).uses_rejection
