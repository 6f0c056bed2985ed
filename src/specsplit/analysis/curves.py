"""How a sweep is laid out in a figure: panels for temperatures and networks, curves for drafts, modes and trees."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pandas import DataFrame

from specsplit.analysis.configurations import NETWORK, configuration_of
from specsplit.errors import counted
from specsplit.experiment.columns import WORKERS
from specsplit.experiment.sweep import plain_number
from specsplit.settings.names import DEFAULT_DRAFT

MOST_PANELS, MOST_CURVES = 6, 9  # more cannot be read; the rest is in summary.csv

BLUE, ORANGE, GREEN, PINK, SKY, BLACK = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000"
_MODE_LINES = {"sync": "-", "overlap": (0, (5, 1.5)), "lookahead": (0, (1.2, 1.2))}
_MODE_COLOURS = {"sync": BLUE, "overlap": ORANGE, "lookahead": GREEN}
_MODE_MARKERS = {"sync": "o", "overlap": "s", "lookahead": "^"}
_VARIANT_COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, "#444444")
_VARIANT_MARKERS = ("o", "s", "^", "D", "v", "P")

PANEL = ("series", "sampling", "temperature", "top_k", "top_p", *NETWORK)
_WORDS = {
    "gamma": "γ = {}",
    "series": "series {}",
    "temperature": "temperature {}",
    "rtt_ms": "RTT {} ms",
    "jitter_ms": "jitter {} ms",
    "bandwidth_mbit": "{} Mbit/s",
    "sampling": "{}",
    "top_k": "top-k {}",
    "top_p": "top-p {}",
}


@dataclass(frozen=True)
class Curve:
    """One draft, mode and tree, and how it is drawn. name: what tells it from the others; empty in a plain sweep."""

    mode: str
    tree: str
    draft: str = DEFAULT_DRAFT
    name: str = ""
    colour: str = BLUE
    marker: str = "o"
    line: Any = "-"
    hollow: bool = False

    def own(self, table: DataFrame) -> DataFrame:
        """Its rows that draft in workers."""
        same = (table["setup"] == WORKERS) if "setup" in table else True
        same &= (table["mode"] == self.mode) & (table["tree"] == self.tree) & (table["draft"] == self.draft)
        return table[(table["gamma"] != 0) & same]

    @property
    def marks(self) -> dict[str, Any]:
        """How matplotlib draws its markers."""
        face = {"markerfacecolor": "white"} if self.hollow else {}
        return {"color": self.colour, "marker": self.marker, "markersize": 4, **face}


@dataclass(frozen=True)
class Panel:
    """The rows of one way to choose tokens on one network."""

    title: str
    requests: DataFrame
    rounds: DataFrame
    summary: DataFrame

    def of_workers(self) -> Panel:
        """Without the baselines."""
        requests, summary = (table[table["setup"] == WORKERS] for table in (self.requests, self.summary))
        return replace(self, requests=requests, summary=summary)

    def drafting(self) -> Panel:
        """Without the target alone."""
        tables = (table[table["gamma"] != 0] for table in (self.requests, self.rounds, self.summary))
        return Panel(self.title, *tables)


def split_panels(requests: DataFrame, rounds: DataFrame, summary: DataFrame) -> list[Panel]:
    """A panel for each value of temperature, round-trip time and what goes with them, in the order of `summary`."""
    names = [name for name in PANEL if name in summary]  # runs that were kept apart have a series
    keys = {id(table): configuration_of(table, names) for table in (requests, rounds, summary)}
    conditions: list[Hashable] = list(dict.fromkeys(keys[id(summary)]))
    rows = [dict(zip(names, condition, strict=True)) for condition in conditions]  # type: ignore[call-overload]
    varied = [name for name in _WORDS if len({row.get(name) for row in rows}) > 1]
    short = [name for name in varied if name in ("series", "temperature", *NETWORK)]
    titles = [_title(row, short) for row in rows]
    if len(set(titles)) < len(titles):
        titles = [_title(row, varied) for row in rows]

    def own(table: DataFrame, condition: Hashable) -> DataFrame:
        return table[np.array([key == condition for key in keys[id(table)]], dtype=bool)]

    return [
        Panel(title, own(requests, condition), own(rounds, condition), own(summary, condition))
        for title, condition in zip(titles, conditions, strict=True)
    ]


def split_curves(summary: DataFrame) -> list[Curve]:
    """A curve for each draft, mode and tree, in the order of `summary`; no two look alike, in grey neither."""
    combinations = _combinations(summary)
    if not combinations:
        return [Curve("sync", "chain")]
    modes, trees, drafts = (list(dict.fromkeys(values)) for values in zip(*combinations, strict=True))
    # What tells the curves of one mode apart: the draft together with its tree.
    variants = list(dict.fromkeys(combination[1:] for combination in combinations))
    combinations = [each for each in combinations if variants.index(each[1:]) < len(_VARIANT_MARKERS)]
    curves = []
    for mode, tree, draft in combinations[:MOST_CURVES]:
        parts = [(draft, drafts, DEFAULT_DRAFT), (mode, modes, "sync"), (tree, trees, "chain")]
        name = ", ".join(part for part, every, plain in parts if len(every) > 1 or part != plain)
        curve = Curve(mode, tree, draft, name)
        if len(combinations) > 1:
            place = variants.index((tree, draft))
            curve = replace(curve, marker=_VARIANT_MARKERS[place] if len(variants) > 1 else _MODE_MARKERS[mode])
            if len(modes) > 1:
                line, colour = _MODE_LINES[mode], _MODE_COLOURS[mode]
                curve = replace(curve, colour=colour, line=line, hollow=mode == "overlap")
            else:
                curve = replace(curve, colour=_VARIANT_COLOURS[place])
        curves.append(curve)
    return curves


def three_digits(value: float) -> str:
    """Three digits or more, never an exponent: 8.31, 52.0, 1274."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def left_out(panels: list[Panel], summary: DataFrame, curves: list[Curve]) -> str:
    """What a figure cannot show of the sweep, in words; empty when it shows everything."""
    every = len(_combinations(summary))
    parts = []
    if len(panels) > MOST_PANELS:
        parts.append(f"{MOST_PANELS} of {counted(len(panels), 'panel')}")
    if every > len(curves):
        parts.append(f"{len(curves)} of {counted(every, 'curve')}")
    return f"{' and '.join(parts)} shown; all are in summary.csv" if parts else ""


def _combinations(summary: DataFrame) -> list[tuple[str, str, str]]:
    """(mode, tree, draft) of everything that drafts, in the order of `summary`."""
    drafting = summary[summary["gamma"] != 0]
    return list(dict.fromkeys(zip(drafting["mode"], drafting["tree"], drafting["draft"], strict=True)))


def in_words(name: str, value: Any) -> str:
    """The value of a column of the configuration with what it is of: "RTT 14 ms"."""
    if name == "bandwidth_mbit" and value == 0:
        return "no bandwidth limit"
    return _WORDS.get(name, "{}").format(plain_number(value) if isinstance(value, float) else value)


def _title(row: dict[str, Any], names: list[str]) -> str:
    return ", ".join(in_words(name, row[name]) for name in names)
