"""A summary as a table that a person reads, on a screen or in the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pandas import DataFrame, Series, isna

from specsplit.analysis.configurations import varied
from specsplit.analysis.curves import three_digits
from specsplit.analysis.references import BASES
from specsplit.experiment.sweep import plain_number

_HEADINGS = {"gamma": "γ", "rtt_ms": "RTT, ms", "jitter_ms": "jitter, ms", "bandwidth_mbit": "Mbit/s"}
# Column of the summary -> its heading, and how its cells are written. `_mean` has its interval beside it.
_MEASURES = {
    "speedup": ("speedup", ".2f"),
    "speedup_over_streamed": ("over streamed", ".2f"),
    "speedup_over_colocated": ("over colocated", ".2f"),
    "itl_ms_mean": ("ITL, ms", "digits"),
    "tpot_ms_mean": ("TPOT, ms", "digits"),
    "ttft_ms_mean": ("TTFT, ms", "digits"),
    "average_acceptance_rate_mean": ("acceptance", ".3f"),
    "acceptance_length": ("acceptance length", ".2f"),
    "draft_share_lookup": ("looked up", "%"),
    "mean_accepted_length_mean": ("tokens/round", ".2f"),
    "network_idle_fraction_mean": ("network", "%"),
    "tokens_per_second": ("tokens/s", "digits"),
    "hit_rate": ("ahead, hit", ".2f"),
    "lossless": ("lossless", "share"),
    "reference_drift": ("drift", "%"),
}


def summary_table(summary: DataFrame) -> tuple[list[str], list[list[str]]]:
    """The headings and the cells of the summary as a person reads it: what varies, then the measures.

    An interval is beside its mean, in brackets. A column without any value is left out; a missing value is "-".
    """
    names = [*varied(summary), *(["setup"] if summary["setup"].nunique() > 1 else [])]
    columns = {_HEADINGS.get(name, name): [_plain(value) for value in summary[name]] for name in names}
    for name, (heading, form) in _MEASURES.items():
        if summary[name].notna().any():
            columns[heading] = [_cell(row, name, form) for _, row in summary.iterrows()]
    return list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)]


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table for a terminal, columns to the right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (headings, *rows)]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(row: Series, name: str, form: str) -> str:
    if isna(row[name]):
        return "-"
    text, metric = _number(row[name], form), name.removesuffix("_mean")
    if metric not in ("itl_ms", *BASES.values()):
        return text
    low, high = row[f"{metric}_ci_low"], row[f"{metric}_ci_high"]
    # Gamma 0 is its own measure: an interval of [1, 1] says nothing.
    return text if isna(low) or low == high else f"{text} [{_number(low, form)}, {_number(high, form)}]"


def _number(value: float, form: str) -> str:
    if form == "digits":
        return three_digits(value)
    if form == "share":  # of requests: most often all, and never all when one is not
        return "100 %" if value == 1 else f"{min(99.9, 100 * value):.1f} %"
    return f"{100 * value:z.1f} %" if form == "%" else f"{value:{form}}"


def _plain(value: Any) -> str:
    return plain_number(value) if isinstance(value, float) else str(value)
