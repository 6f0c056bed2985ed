"""Bootstrap intervals: do they cover, do they repeat, and what do they say when they cannot know."""

from __future__ import annotations

import math

import numpy as np
import pytest

from specsplit.analysis import statistics
from specsplit.analysis.statistics import bootstrap_mean_ci, bootstrap_ratio_ci, paired_ratio_ci
from specsplit.errors import UserError

SETTINGS = {"confidence": 0.95, "samples": 2000, "seed": 0}


def test_interval_covers_the_true_mean_as_often_as_it_claims():
    rng = np.random.default_rng(1)
    trials = 400
    for confidence in (0.8, 0.95):
        hits = 0
        for trial in range(trials):
            values = rng.normal(50.0, 10.0, size=60)
            low, high = bootstrap_mean_ci(values, confidence=confidence, samples=600, seed=trial)
            hits += low <= 50.0 <= high
        # 4 standard errors of the count, plus 2 % for the percentile method's narrowness.
        tolerance = 4 * math.sqrt(confidence * (1 - confidence) / trials) + 0.02
        assert abs(hits / trials - confidence) < tolerance


def test_interval_has_the_width_that_theory_gives():
    values = np.random.default_rng(2).normal(0.0, 3.0, size=200)
    low, high = bootstrap_mean_ci(values, confidence=0.95, samples=5000, seed=0)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(200), rel=0.05)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.05)


def test_higher_confidence_is_wider():
    values = np.random.default_rng(3).exponential(size=30)
    narrow = bootstrap_mean_ci(values, confidence=0.8, samples=2000, seed=0)
    wide = bootstrap_mean_ci(values, confidence=0.99, samples=2000, seed=0)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_same_seed_repeats_and_another_differs():
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    first = bootstrap_mean_ci(values, **SETTINGS)
    assert bootstrap_mean_ci(values, **SETTINGS) == first
    assert bootstrap_mean_ci(values, **(SETTINGS | {"seed": 1, "samples": 50})) != first


def test_chunks_do_not_change_the_interval(monkeypatch):
    values = np.random.default_rng(4).normal(size=13)
    whole = bootstrap_mean_ci(values, **SETTINGS)
    monkeypatch.setattr(statistics, "_CHUNK", 100)
    assert bootstrap_mean_ci(values, **SETTINGS) == whole


@pytest.mark.parametrize("values", [[], [7.0]])
def test_fewer_than_two_values_have_no_interval(values):
    assert all(math.isnan(end) for end in bootstrap_mean_ci(values, **SETTINGS))
    assert all(math.isnan(end) for end in paired_ratio_ci(values, values, values, values, **SETTINGS))


def test_equal_values_have_an_interval_of_no_width():
    assert bootstrap_mean_ci([2.5] * 5, **SETTINGS) == (2.5, 2.5)


def test_ratio_of_a_table_with_itself_is_one():
    time, tokens = [10.0, 30.0, 20.0], [1.0, 4.0, 3.0]
    assert paired_ratio_ci(time, tokens, time, tokens, **SETTINGS) == (1.0, 1.0)


def test_pairing_narrows_the_interval_of_correlated_requests():
    rng = np.random.default_rng(5)
    count = 40
    length = rng.uniform(0.2, 3.0, size=count)  # what makes a request slow on both sides
    slow = 100 * length * rng.normal(1, 0.03, size=count)
    fast = 50 * length * rng.normal(1, 0.03, size=count)
    tokens = np.full(count, 64.0)
    low, high = paired_ratio_ci(slow, tokens, fast, tokens, **SETTINGS)
    apart = [
        slow[rng.integers(count, size=count)].sum() / fast[rng.integers(count, size=count)].sum() for _ in range(2000)
    ]
    unpaired = np.quantile(apart, 0.975) - np.quantile(apart, 0.025)
    assert low < slow.sum() / fast.sum() < high
    assert high - low < unpaired / 5


def test_ratio_interval_is_that_of_the_ratio_of_sums():
    # Every request has the ratio 1/2, so the ratio of sums is 1/2 however the requests are drawn.
    assert bootstrap_ratio_ci([1.0, 2.0, 50.0], [2.0, 4.0, 100.0], **SETTINGS) == (0.5, 0.5)
    low, high = bootstrap_ratio_ci([0.0, 90.0, 1.0], [10.0, 100.0, 10.0], **SETTINGS)
    assert low == pytest.approx(0.0)
    assert high == pytest.approx(0.9)


def test_resample_without_a_denominator_leaves_the_ratio_unknown():
    assert all(math.isnan(end) for end in bootstrap_ratio_ci([1.0, 0.0], [2.0, 0.0], **SETTINGS))


@pytest.mark.parametrize("values", [[1.0, math.nan], [1.0, math.inf], [[1.0, 2.0], [3.0, 4.0]]])
def test_missing_values_are_the_callers_decision(values):
    with pytest.raises(ValueError, match="values: one row of finite numbers"):
        bootstrap_mean_ci(values, **SETTINGS)


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"different lengths: \[2, 2, 3, 2\]"):
        paired_ratio_ci([1.0, 2.0], [1.0, 1.0], [1.0, 2.0, 3.0], [1.0, 1.0], **SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"confidence": 95}, "confidence is 95: it must lie between 0 and 1"),
        ({"confidence": 0.0}, "confidence is 0"),
        ({"samples": 0}, "bootstrap_samples is 0"),
    ],
)
def test_impossible_settings_name_the_setting(change, message):
    with pytest.raises(UserError, match=message):
        bootstrap_mean_ci([1.0, 2.0], **(SETTINGS | change))
    with pytest.raises(UserError, match=message):
        paired_ratio_ci([1.0], [1.0], [1.0], [1.0], **(SETTINGS | change))
