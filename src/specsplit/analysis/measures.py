"""Columns of a summary, each with its interval: quantiles, means, rates, and ratios of times on the same prompts; and
the medians over repeats that they are of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from pandas import DataFrame, Series

from specsplit.analysis.statistics import bounded_mean_ci, level_of_each, mean_ci, paired_ratio_ci, quantile, rate_ci

TIMES = ("tpot_ms", "itl_ms", "ttft_ms", "total_latency_ms")


def ratio(top: float, bottom: float) -> float:
    """NaN where there is nothing to divide by."""
    return float(top / bottom) if bottom else math.nan


def interval_columns(name: str, interval: tuple[float, float], kind: str = "ci") -> dict[str, float]:
    """{NAME_ci_low, NAME_ci_high}"""
    return {f"{name}_{kind}_low": interval[0], f"{name}_{kind}_high": interval[1]}


def paired_columns(
    name: str,
    num_a: ArrayLike,
    den_a: ArrayLike,
    num_b: ArrayLike,
    den_b: ArrayLike,
    confidence: float,
    among: int = 0,
) -> dict[str, float]:
    """NAME, (sum num_a / sum den_a) / (sum num_b / sum den_b) over the same prompts, and its interval.

    among: of so many ratios that are judged together: also NAME_joint_low, _high, which hold for all of them at once.
    All are NaN where something is missing or there is nothing to divide by.
    """
    columns = [np.asarray(column, float) for column in (num_a, den_a, num_b, den_b)]
    levels = {"ci": confidence} | ({"joint": level_of_each(confidence, among)} if among else {})
    value, intervals = math.nan, dict.fromkeys(levels, (math.nan, math.nan))
    if np.isfinite(columns).all():
        tops, bottoms = [ratio(columns[at].sum(), columns[at + 1].sum()) for at in (0, 2)]
        value = ratio(tops, bottoms)
        intervals = {kind: paired_ratio_ci(*columns, confidence=level) for kind, level in levels.items()}
    row = {name: value}
    for kind, interval in intervals.items():
        row |= interval_columns(name, interval, kind)
    return row


def rate_columns(name: str, kept: Series, reached: Series, confidence: float) -> dict[str, float]:
    """NAME, sum kept / sum reached, and its interval; an entry of each is a prompt."""
    interval = rate_ci(kept, reached, confidence=confidence)
    return {name: ratio(kept.sum(), reached.sum()), **interval_columns(name, interval)}


def quantiles(values: Series, name: str, percents: Sequence[int]) -> dict[str, float]:
    """{NAME_median, NAME_p90, ...} of the values that are there; NaN when there are too few (`quantile`)."""
    known = values.dropna().to_numpy()
    return {
        f"{name}_{'median' if percent == 50 else f'p{percent}'}": (
            float(np.median(known)) if percent == 50 and known.size else quantile(known, percent / 100)
        )
        for percent in percents
    }


def metric_columns(values: Series, name: str, confidence: float, upper: float | None = None) -> dict[str, float]:
    """NAME_mean, its interval and the median of the values that are there; of times p90 and p99 as well.

    upper: the most that a value can be, where the mean may be near it.
    """
    values = values.dropna()
    known = values.to_numpy()
    if upper is None:
        interval = mean_ci(known, confidence=confidence)
    else:
        interval = bounded_mean_ci(known, upper, confidence=confidence)
    row = {f"{name}_mean": float(values.mean()), **interval_columns(name, interval)}
    return row | quantiles(values, name, (50, 90, 99) if name in TIMES else (50,))


def draft_position(rounds: DataFrame, position: int) -> tuple[Series, Series]:
    """Whether each round reached the draft's token number `position` (from 1), and whether it was kept there.

    A round reaches a position when it drafted that far and every token before it was accepted.
    """
    reached = (rounds["drafted"] >= position) & (rounds["accepted"] >= position - 1)
    return reached, reached & (rounds["accepted"] >= position)


def verifies_draft(rounds: DataFrame) -> Series:
    """Whether each round verified a draft, whatever of it counts as drafted."""
    return (rounds["tree_nodes"] > 0) | (rounds["drafted"] > 0)


def median_over_repeats(table: DataFrame, key: Sequence[str], flag: str) -> DataFrame:
    """One row for each combination of the columns `key`: the medians of what was measured over its repeats.

    table: with a column `repeat`. What is no number is that of the first repeat; the truth value `flag` holds when it
    does in every repeat, and is unknown when it is in one.
    """
    if table["repeat"].nunique() == 1:
        return table
    groups = table.groupby([table[name] for name in key], sort=False)
    first = table[~table.duplicated(list(key))].copy()
    for name in map(str, table.select_dtypes("number")):
        if name not in (*key, "repeat"):
            first[name] = groups[name].median().array
    first[flag] = pd.array([own.all(skipna=False) for _, own in groups[flag]], dtype="boolean")
    return first
