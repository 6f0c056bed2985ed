"""Configurations as the keys of tables: what tells rows apart, what must be alike to be compared, and their order."""

from __future__ import annotations

from collections.abc import Sequence

from pandas import DataFrame, Series

from specsplit.experiment.columns import COLOCATED, STREAMED, WORKERS
from specsplit.settings.axes import CONFIGURATION, PLAIN, SERIES
from specsplit.settings.names import gamma_order
from specsplit.settings.run import MODES, NO_NETWORK

NETWORK = tuple(NO_NETWORK)
_CHOICE = ("sampling", "temperature", "top_k", "top_p")  # what the text depends on


def keys_of(table: DataFrame) -> tuple[str, ...]:
    """The columns of a configuration: that of the series is among them where runs were kept apart."""
    return (*CONFIGURATION, SERIES) if SERIES in table else CONFIGURATION


def row_of(table: DataFrame) -> tuple[str, ...]:
    """The columns that say what a row of the summary is of: the configuration, then the setup."""
    return (*keys_of(table), "setup")


def configuration_of(table: DataFrame, names: Sequence[str] = ()) -> Series:
    """The configuration of each row, or the part of it that `names` says, as one tuple that can be compared."""
    return tuples(table[list(names or keys_of(table))])


def conditions_of(requests: DataFrame, *more: str) -> Series:
    """How the tokens of each row are chosen, and `more` columns. To greedy decoding the rest of sampling is nothing."""
    greedy = requests["temperature"] == 0
    chosen = {name: requests[name].mask(greedy, PLAIN[name]) for name in _CHOICE}
    more = (*more, SERIES) if SERIES in requests else more
    return tuples(DataFrame({**chosen, **{name: requests[name] for name in more}}))


def tuples(table: DataFrame) -> Series:
    """Each row as one tuple that can be compared."""
    return Series(list(table.itertuples(index=False, name=None)), index=table.index, dtype=object)


def sort_rows(table: DataFrame) -> DataFrame:
    """By configuration, each curve together, baselines after them; rows of one configuration stay in their order."""
    setups = table["setup"] if "setup" in table else Series(WORKERS, index=table.index)
    ranks = {
        **({SERIES: table[SERIES]} if SERIES in table else {}),
        **{name: table[name] for name in ("temperature", "top_k", "top_p", "sampling", *NETWORK)},
        "setup": setups.map({setup: rank for rank, setup in enumerate((WORKERS, STREAMED, COLOCATED))}),
        "other_draft": table["draft"] != PLAIN["draft"],
        "draft": table["draft"],
        "mode": table["mode"].map({mode: rank for rank, mode in enumerate(MODES)}),
        "other_tree": table["tree"] != PLAIN["tree"],
        "tree": table["tree"],
        "gamma": table["gamma"].map(gamma_order),
    }
    order = DataFrame(ranks).reset_index(drop=True).sort_values(list(ranks), kind="stable").index
    return table.iloc[order].reset_index(drop=True)


def varied(table: DataFrame) -> list[str]:
    """The names of the configuration that take several values in this sweep; gamma always."""
    return [name for name in keys_of(table) if name == "gamma" or table[name].nunique() > 1]
