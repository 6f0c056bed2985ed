"""Percentile bootstrap intervals for means, ratios of sums and ratios of medians.

A request is the unit that is drawn again: requests are independent of each other, rounds of one request are
not. With few requests (under about 20) percentile intervals are a little too narrow: measure more prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specsplit.errors import UserError

_CHUNK = 1 << 20  # indices drawn at a time: 8 MB, whatever the number of resamples
_UNKNOWN = (math.nan, math.nan)


def bootstrap_mean_ci(values: ArrayLike, *, confidence: float, samples: int, seed: int) -> tuple[float, float]:
    """Interval of the mean of `values` (one number a request), as (low, high) in their unit.

    confidence: share of such intervals that cover the true mean, e.g. 0.95. samples: number of resamples.
    The same arguments give the same interval. With fewer than two values it is unknown: (NaN, NaN).

    Raises UserError for a confidence outside ]0, 1[ or fewer than one resample, ValueError for values that
    are not one row of finite numbers (drop missing ones before: only the caller knows what they mean).
    """
    _check_settings(confidence, samples)
    data = _numbers("values", values)
    if data.size < 2:
        return _UNKNOWN
    means = [data[index].mean(axis=1) for index in _resamples(data.size, samples, seed)]
    return _percentiles(np.concatenate(means), confidence)


def bootstrap_ratio_ci(
    numerators: ArrayLike, denominators: ArrayLike, *, confidence: float, samples: int, seed: int
) -> tuple[float, float]:
    """Interval of sum(numerators) / sum(denominators), one pair a request. Otherwise as `paired_ratio_ci`."""
    ones = np.ones(np.shape(denominators))
    return paired_ratio_ci(numerators, denominators, ones, ones, confidence=confidence, samples=samples, seed=seed)


def paired_ratio_ci(
    num_a: ArrayLike,
    den_a: ArrayLike,
    num_b: ArrayLike,
    den_b: ArrayLike,
    *,
    confidence: float,
    samples: int,
    seed: int,
) -> tuple[float, float]:
    """Interval of (sum num_a / sum den_a) / (sum num_b / sum den_b), where entry i of all four is request i.

    Each resample takes the same requests on both sides, so what makes a request slow on both cancels out;
    drawing the sides apart would count it as noise. Unknown, (NaN, NaN), with fewer than two requests or when
    a resample has no ratio because a sum that divides is 0.

    Raises UserError and ValueError as `bootstrap_mean_ci`, and ValueError when the four differ in length.
    """
    _check_settings(confidence, samples)
    columns = (
        _numbers("num_a", num_a),
        _numbers("den_a", den_a),
        _numbers("num_b", num_b),
        _numbers("den_b", den_b),
    )
    count = columns[0].size
    if any(column.size != count for column in columns):
        raise ValueError(f"columns of different lengths: {[column.size for column in columns]}")
    if count < 2:
        return _UNKNOWN
    ratios = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for index in _resamples(count, samples, seed):
            top_a, bottom_a, top_b, bottom_b = (column[index].sum(axis=1) for column in columns)
            ratios.append((top_a / bottom_a) / (top_b / bottom_b))
    every = np.concatenate(ratios)
    return _percentiles(every, confidence) if np.isfinite(every).all() else _UNKNOWN


def paired_median_ratio_ci(
    values_a: ArrayLike, values_b: ArrayLike, *, confidence: float, samples: int, seed: int
) -> tuple[float, float]:
    """Interval of median(values_a) / median(values_b), where entry i of both is request i. Otherwise as
    `paired_ratio_ci`."""
    _check_settings(confidence, samples)
    a, b = _numbers("values_a", values_a), _numbers("values_b", values_b)
    if a.size != b.size:
        raise ValueError(f"columns of different lengths: {[a.size, b.size]}")
    if a.size < 2:
        return _UNKNOWN
    ratios = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for index in _resamples(a.size, samples, seed):
            ratios.append(np.median(a[index], axis=1) / np.median(b[index], axis=1))
    every = np.concatenate(ratios)
    return _percentiles(every, confidence) if np.isfinite(every).all() else _UNKNOWN


def _resamples(count: int, samples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Indices into `count` requests, [rows, count] at a time, `samples` rows in all."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // count)
    for start in range(0, samples, rows):
        yield rng.integers(count, size=(min(rows, samples - start), count))


def _percentiles(estimates: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(estimates, (tail, 1 - tail))
    return float(low), float(high)


def _numbers(name: str, values: ArrayLike) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise ValueError(f"{name}: one row of finite numbers is needed")
    return numbers


def _check_settings(confidence: float, samples: int) -> None:
    if not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence:g}: it must lie between 0 and 1, e.g. 0.95")
    if samples < 1:
        raise UserError(f"bootstrap_samples is {samples}: it must be at least 1, e.g. 10000")
