"""Intervals and comparisons against simulations with a known truth: do they cover, and what do they claim in vain."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from specsplit.analysis.statistics import (
    MIN_PROMPTS,
    bounded_mean_ci,
    compare_jointly,
    mean_ci,
    paired_ratio_ci,
    quantile,
    rate_ci,
    t_quantile,
)
from specsplit.errors import UserError

TRIALS = 4000
# Four standard errors of a coverage of 95 % in TRIALS trials are 1.4 points: a true 94.5 to 95.5 % stays within these.
COVERAGE = (0.93, 0.97)


def edges(*values: float) -> list[Any]:
    """The least and the most; what is between them by `make test-all`."""
    return [values[0], *(pytest.param(value, marks=pytest.mark.slow) for value in values[1:-1]), values[-1]]


PROMPTS = edges(6, 8, 16, 48)
LOG_SDS = edges(0.05, 0.2, 0.4)


def covered(intervals: list[tuple[float, float]], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("log_sd", LOG_SDS)
@pytest.mark.parametrize("lengths", ["alike", "unequal"])
def test_speedup_interval_covers_the_truth(prompts: int, log_sd: float, lengths: str) -> None:
    rng = np.random.default_rng(prompts)
    length = np.exp(rng.normal(0, 0.0 if lengths == "alike" else 0.5, (TRIALS, prompts)))
    slow, fast = (length * np.exp(rng.normal(0, log_sd, (TRIALS, prompts))) for _ in range(2))
    tokens = 64 * length
    found = [paired_ratio_ci(a, n, b / 1.3, n, confidence=0.95) for a, b, n in zip(slow, fast, tokens, strict=True)]
    assert COVERAGE[0] <= covered(found, 1.3) <= COVERAGE[1]


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("log_sd", LOG_SDS)
def test_interval_of_a_mean_time_covers_the_truth(prompts: int, log_sd: float) -> None:
    rng = np.random.default_rng(200 + prompts)
    found = [mean_ci(row, confidence=0.95) for row in np.exp(rng.normal(0, log_sd, (TRIALS, prompts)))]
    assert COVERAGE[0] <= covered(found, math.exp(log_sd**2 / 2)) <= COVERAGE[1]


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("rate", edges(0.5, 0.8, 0.95, 0.99))
@pytest.mark.parametrize("between", [0.0, 0.05, 0.15])
def test_interval_of_a_rate_covers_the_truth(prompts: int, rate: float, between: float) -> None:
    """Beta-binomial counts, `between` the correlation of two trials of one prompt. Where most prompts show no failure
    rates may be covered more often."""
    rng = np.random.default_rng(round(1000 * rate) + prompts)
    trials = rng.integers(8, 31, (1000, prompts))
    own = np.full(trials.shape, rate)
    if between:
        scale = 1 / between - 1
        own = rng.beta(rate * scale, (1 - rate) * scale, trials.shape)
    kept = rng.binomial(trials, own)
    counts = [rate_ci(k, n, confidence=0.95) for k, n in zip(kept, trials, strict=True)]
    means = [bounded_mean_ci(k / n, 1.0, confidence=0.95) for k, n in zip(kept, trials, strict=True)]
    assert covered(counts, rate) >= 0.93
    assert covered(means, rate) >= 0.93
    if rate <= 0.8:  # no wider than it must where prompts tell; 1000 trials: two standard errors are 1.4 points
        assert covered(counts, rate) <= 0.98
        assert covered(means, rate) <= 0.98


@pytest.mark.parametrize("prompts", PROMPTS)
def test_interval_of_a_rate_covers_the_truth_when_few_prompts_have_most_of_the_trials(prompts: int) -> None:
    """As drafts that were looked up: many in one text, few in another, five tokens each and accepted up to the first
    that is wrong."""
    rng = np.random.default_rng(prompts)

    def counts(shape: tuple[int, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        drafts = rng.binomial(rng.integers(8, 30, shape), rng.beta(0.6, 1.6, shape))
        right = 1 / (1 + np.exp(-rng.normal(1.5, 1.2, shape)))
        kept = sum(np.minimum(rng.geometric(1 - right) - 1, 5) * (turn < drafts) for turn in range(30))
        return np.asarray(kept, float), 5.0 * drafts

    kept, reached = counts((200_000,))
    found = [rate_ci(k, n, confidence=0.95) for k, n in zip(*counts((2000, prompts)), strict=True)]
    known = [interval for interval in found if not math.isnan(interval[0])]
    assert 0.93 <= covered(known, kept.sum() / reached.sum()) <= 0.99


def false_and_true_claims(speeds: list[float], prompts: int, log_sd: float, trials: int) -> NDArray[np.float64]:
    """Shares of experiments in which: a configuration is called faster that is not, one called slower that is not, an
    equal pair told apart; the fastest one is called faster. speeds: of the candidates; the target alone has 1."""
    rng = np.random.default_rng(prompts * 100 + len(speeds))
    speed = np.array([1.0, *speeds])
    best = int(speed.argmax())
    counts = np.zeros(4)
    for trial in range(trials):
        length = np.exp(rng.normal(0, 0.5, prompts))
        times = length * np.exp(rng.normal(0, log_sd, (len(speed), prompts))) / speed[:, None]
        found = compare_jointly(times, np.tile(64 * length, (len(speed), 1)), confidence=0.95, samples=400, seed=trial)
        assert found is not None
        intervals = [found.against_first(place) for place in range(len(speed))]
        places = range(len(speed))
        counts += (
            any(low > 1 and speed[k] <= 1 for k, (low, _) in enumerate(intervals)),
            any(high < 1 and speed[k] >= 1 for k, (_, high) in enumerate(intervals)),
            any(found.distinguishable(i, j) for i in places for j in range(i) if speed[i] == speed[j]),
            intervals[best][0] > 1,
        )
    return counts / trials


@pytest.mark.parametrize("prompts", [8, 16])
@pytest.mark.parametrize("candidates", edges(1, 2, 5, 15))
def test_equal_candidates_are_seldom_told_apart(prompts: int, candidates: int) -> None:
    trials = 400
    faster, slower, apart, _ = false_and_true_claims([1.0] * candidates, prompts, 0.2, trials)
    # At most 5 %, give or take three standard errors of the simulation.
    allowance = 3 * math.sqrt(0.05 * 0.95 / trials)
    assert max(faster, slower) <= 0.025 + allowance
    assert apart <= 0.05 + allowance


def test_a_real_difference_is_found_among_many() -> None:
    faster, _, apart, found = false_and_true_claims([1.3, *[1.0] * 4], 16, 0.1, 200)
    assert found >= 0.95
    assert max(faster, apart) <= 0.1
    assert false_and_true_claims([1.2, *[0.8] * 14], 16, 0.05, 100)[3] >= 0.95


def test_the_winner_can_be_told_from_the_others() -> None:
    rng = np.random.default_rng(1)
    times = np.exp(rng.normal(0, 0.05, (4, 16))) / np.array([[1.0], [1.5], [1.48], [1.1]])
    found = compare_jointly(times, np.ones_like(times), confidence=0.95, samples=1000, seed=0)
    assert found is not None
    assert found.distinguishable(1, 0)
    assert found.distinguishable(1, 3)
    assert found.distinguishable(3, 1)
    assert not found.distinguishable(1, 2)


def test_joint_intervals_repeat_with_their_seed_and_contain_the_single_one() -> None:
    times = np.exp(np.random.default_rng(2).normal(0, 0.1, (4, 10)))
    tokens = np.ones_like(times)
    one, again, other = (compare_jointly(times, tokens, confidence=0.95, samples=300, seed=s) for s in (0, 0, 1))
    assert one is not None
    assert again is not None
    assert other is not None
    assert one.against_first(2) == again.against_first(2) != other.against_first(2)
    single = paired_ratio_ci(times[0], tokens[0], times[2], tokens[2], confidence=0.95)
    joint = one.against_first(2)
    assert joint[0] < single[0] < single[1] < joint[1]


def test_equal_columns_are_no_difference() -> None:
    times = np.tile(np.arange(1.0, 9.0), (3, 1))
    found = compare_jointly(times, times, confidence=0.95, samples=100, seed=0)
    assert found is not None
    assert found.against_first(1) == (1.0, 1.0)
    assert not found.distinguishable(1, 2)
    halves = compare_jointly(times / [[1.0], [2.0], [2.0]], times, confidence=0.95, samples=100, seed=0)
    assert halves is not None
    assert halves.against_first(1) == pytest.approx((2.0, 2.0))
    assert halves.distinguishable(0, 1)


@pytest.mark.parametrize("count", range(MIN_PROMPTS))
def test_few_prompts_have_no_interval(count: int) -> None:
    values = np.arange(1.0, count + 1)
    for interval in (
        mean_ci(values, confidence=0.95),
        paired_ratio_ci(values, values, values, values, confidence=0.95),
        rate_ci(values, values, confidence=0.95),
        bounded_mean_ci(values / 10, 1.0, confidence=0.95),
    ):
        assert all(math.isnan(end) for end in interval)
    table = np.tile(values, (2, 1))
    assert compare_jointly(table, table, confidence=0.95, samples=10, seed=0) is None


def test_a_rate_without_a_failure_has_the_interval_of_two_trials_a_prompt() -> None:
    low, high = rate_ci([30] * 16, [30] * 16, confidence=0.95)
    t = t_quantile(0.95, 15)
    assert high == 1.0
    assert low == pytest.approx(32 / (32 + t * t))
    assert rate_ci([0] * 16, [30] * 16, confidence=0.95) == pytest.approx((0.0, 1 - low))
    assert bounded_mean_ci([4.0] * 16, 4.0, confidence=0.95) == pytest.approx((4 * low, 4.0))
    assert rate_ci([1] * 16, [1] * 16, confidence=0.95)[0] == pytest.approx(16 / (16 + t * t))  # no more than there are


def test_pairing_narrows_the_interval_of_correlated_requests() -> None:
    rng = np.random.default_rng(5)
    length = rng.uniform(0.2, 3.0, size=40)  # what makes a request slow on both sides
    slow, fast = (ms * length * rng.normal(1, 0.03, size=40) for ms in (100, 50))
    ones = np.ones(40)
    low, high = paired_ratio_ci(slow, ones, fast, ones, confidence=0.95)
    low_apart, high_apart = paired_ratio_ci(slow, ones, fast[::-1], ones, confidence=0.95)
    assert low < slow.sum() / fast.sum() < high
    assert high - low < (high_apart - low_apart) / 5


def test_higher_confidence_is_wider() -> None:
    values = np.random.default_rng(3).exponential(size=30)
    narrow, wide = (mean_ci(values, confidence=confidence) for confidence in (0.8, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_values_below_zero_have_an_interval_too() -> None:
    low, high = mean_ci([-1.0, 1.0, -2.0, 2.0, 0.5, -0.5], confidence=0.95)
    assert low == pytest.approx(-high)


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (15, 2.1314), (47, 2.0117), (120, 1.9799)]
)
def test_quantiles_of_students_t_are_those_of_the_tables(degrees: float, expected: float) -> None:
    assert t_quantile(0.95, degrees) == pytest.approx(expected, rel=2e-4)


def test_a_quantile_needs_a_value_above_it() -> None:
    assert quantile(np.arange(10.0), 0.9) == pytest.approx(8.1)
    assert math.isnan(quantile(np.arange(9.0), 0.9))
    assert math.isnan(quantile(np.arange(99.0), 0.99))
    assert quantile(np.arange(101.0), 0.99) == pytest.approx(99.0)
    assert math.isnan(quantile([], 0.5))


def test_a_sum_that_is_not_positive_leaves_the_ratio_unknown() -> None:
    ones, once = np.ones(8), np.eye(8)[0]
    assert all(math.isnan(end) for end in paired_ratio_ci(ones, once, ones, ones, confidence=0.95))
    table = np.array([ones, once])
    assert compare_jointly(table, np.ones((2, 8)), confidence=0.95, samples=10, seed=0) is None


CALLS: dict[str, Callable[..., object]] = {
    "values": mean_ci,
    "num_a": lambda values, **settings: paired_ratio_ci(values, values, values, values, **settings),
    "kept": lambda values, **settings: rate_ci(values, values, **settings),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("values", [[1.0, math.nan], [1.0, math.inf], [[1.0, 2.0], [3.0, 4.0]]])
def test_missing_values_are_the_callers_decision(name: str, values: object) -> None:
    with pytest.raises(ValueError, match=f"{name}: one row of finite numbers"):
        CALLS[name](values, confidence=0.95)


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"different lengths: \[2, 2, 3, 2\]"):
        paired_ratio_ci([1.0, 2.0], [1.0, 1.0], [1.0, 2.0, 3.0], [1.0, 1.0], confidence=0.95)
    with pytest.raises(ValueError, match="of one shape"):
        compare_jointly(np.ones((2, 8)), np.ones((3, 8)), confidence=0.95, samples=10, seed=0)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("confidence", [95, 0.0, 1.0])
def test_impossible_levels_are_named(name: str, confidence: float) -> None:
    with pytest.raises(UserError, match=f"confidence is {confidence:g}: it must lie between 0 and 1"):
        CALLS[name]([1.0, 2.0], confidence=confidence)


def test_impossible_draws_are_named() -> None:
    with pytest.raises(UserError, match="bootstrap_samples is 0"):
        compare_jointly(np.ones((2, 8)), np.ones((2, 8)), confidence=0.95, samples=0, seed=0)
