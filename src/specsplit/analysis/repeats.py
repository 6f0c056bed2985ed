"""Requests that were run several times: one row each, so that what is drawn again is a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from pandas import DataFrame


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
