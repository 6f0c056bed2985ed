"""The four figures of an experiment, each against the draft length gamma, for one column of a printed page.

The means and intervals are those of `summarize`, so a figure never differs from `summary.csv`.
Shapes (dot, square, ring, dashes) tell things apart, not colour alone: for black-and-white print and for
colour-blind readers.
"""

from __future__ import annotations

import io
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pandas import DataFrame

from specsplit.analysis.statistics import bootstrap_ratio_ci
from specsplit.analysis.tables import draft_position, summarize, write_atomically

FIGURES = ("tpot", "acceptance_rate", "ttft", "network_idle")

WIDTH_IN, HEIGHT_IN, TALL_IN, DPI = 3.4, 2.6, 4.6, 200
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8C8C8C"  # Okabe and Ito's palette, and a grey

_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same layout everywhere
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "svg.fonttype": "none",  # text stays text: searchable, and set in the page's font
    "svg.hashsalt": "specsplit",  # the same data give the same bytes
}


@dataclass(frozen=True)
class _Plot:
    """What a figure shows: a metric of the summary, the text around it, and why it may have no data."""

    metric: str
    title: str
    axis: str
    why_empty: str
    target_alone: bool = False  # a dashed line at the level of gamma 0
    mark_best: bool = False  # a ring around the lowest mean
    top: float | None = None  # end of the y axis; None = what the data need


_PLOTS = {
    "tpot": _Plot(
        "tpot_ms",
        "Time per output token",
        "TPOT (ms)",
        "No request generated two tokens, so there is no time between tokens.",
        target_alone=True,
        mark_best=True,
    ),
    "acceptance_rate": _Plot(
        "average_acceptance_rate",
        "Acceptance rate",
        "accepted / drafted",
        "Nothing was drafted, so there is no acceptance to show.",
        top=1.0,
    ),
    "ttft": _Plot(
        "ttft_ms",
        "Time to first token",
        "TTFT (ms)",
        "No request generated a token.",
        target_alone=True,
    ),
    "network_idle": _Plot(
        "network_idle_fraction",
        "Waiting for the network",
        "share of total latency",
        "No request has a network time.",
    ),
}


def draw_figures(
    requests: DataFrame,
    rounds: DataFrame,
    out_dir: Path,
    *,
    confidence: float = 0.95,
    bootstrap_samples: int = 10_000,
    seed: int = 0,
) -> list[Path]:
    """Draw every figure of FIGURES as `<name>.png` (200 dpi) and `<name>.svg` in `out_dir`; return the paths.

    requests, rounds: the tables of `merge_runs` or `read_tables`. The other arguments are those of
    `summarize`. A figure without data says why instead of being left out. The same input gives the same
    bytes. Raises UserError as `summarize`.
    """
    settings: dict[str, Any] = {"confidence": confidence, "samples": bootstrap_samples, "seed": seed}
    summary = summarize(requests, rounds, confidence=confidence, bootstrap_samples=bootstrap_samples, seed=seed)
    drafting = requests[requests["gamma"] > 0], summary[summary["gamma"] > 0]
    paths = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own matplotlibrc must not change a published figure
        matplotlib.rcParams.update(_STYLE)
        for name in FIGURES:
            plot = _PLOTS[name]
            figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), dpi=DPI, layout="constrained")
            if name == "acceptance_rate":
                figure.set_size_inches(WIDTH_IN, TALL_IN)
                upper, lower = figure.subplots(2)
                _draw_metric(upper, plot, *drafting, confidence)
                _draw_positions(lower, rounds, summary, settings)
            else:
                _draw_metric(figure.subplots(), plot, requests, summary, confidence)
            for _ in range(2):  # the second pass makes room for the tick labels that the first one chose
                figure.draw_without_rendering()
            figure.set_layout_engine("none")  # both formats get this layout
            metadata: dict[str, Any] = {"Title": f"{plot.title} against draft length"}
            for suffix, extra in (("png", {}), ("svg", {"Date": None})):
                paths.append(Path(out_dir) / f"{name}.{suffix}")
                data = io.BytesIO()
                figure.savefig(data, format=suffix, dpi=DPI, metadata=metadata | extra)
                write_atomically(paths[-1], data.getvalue())
    return paths


def _draw_metric(axes: Axes, plot: _Plot, requests: DataFrame, summary: DataFrame, confidence: float) -> None:
    """One metric against gamma: a dot a request, the mean with its interval, reference, best gamma."""
    axes.set(title=plot.title, xlabel="draft length γ (tokens)", ylabel=plot.axis)
    gammas = summary["gamma"].to_list()
    gap = _gamma_axis(axes, gammas)
    known = requests[requests[plot.metric].notna()]
    if known.empty:
        _say(axes, plot.why_empty)
        return

    place = known.groupby("gamma").cumcount().to_numpy()
    # Steps of the golden ratio spread any number of dots evenly, without chance.
    jitter = ((place * 0.618034 + 0.5) % 1 - 0.5) * 0.4 * gap
    handles: list[Artist] = [
        axes.scatter(
            known["gamma"] + jitter,
            known[plot.metric],
            s=5,
            color=GREY,
            alpha=0.55,
            linewidths=0,
            clip_on=False,
            label="one request",
        )
    ]
    mean = summary[f"{plot.metric}_mean"].to_numpy()
    low, high = (summary[f"{plot.metric}_ci_{end}"].to_numpy() for end in ("low", "high"))
    _draw_means(axes, gammas, mean, low, high, marker="o")
    handles.insert(0, _mean_handle("o", "mean", low, confidence))

    alone = summary.loc[summary["gamma"] == 0, f"{plot.metric}_mean"].dropna()
    if plot.target_alone and not alone.empty:
        text = f"target alone: {_ms(alone.iloc[0])}"
        handles.append(axes.axhline(alone.iloc[0], color="black", linestyle="--", linewidth=0.9, label=text))
    if plot.mark_best and len(gammas) > 1:
        best = int(np.nanargmin(mean))
        text = f"lowest: γ = {gammas[best]}, {_ms(mean[best])}"
        ring: dict[str, Any] = {"marker": "o", "markersize": 10, "fillstyle": "none", "markeredgewidth": 1.4}
        handles += axes.plot(
            gammas[best], mean[best], linestyle="none", color=ORANGE, clip_on=False, label=text, **ring
        )
    _value_axis(axes, np.concatenate([known[plot.metric], mean, low, high]), plot.top)
    _note(axes, known.groupby("gamma").size().to_list(), "request")
    _legend(axes, handles)


def _draw_positions(axes: Axes, rounds: DataFrame, summary: DataFrame, settings: dict[str, Any]) -> None:
    """Acceptance at each position of the draft, for the largest gamma; intervals over its requests."""
    gamma = int(summary["gamma"].max())
    axes.set(xlabel="position in the draft", ylabel="accepted / reached", title=f"By position, γ = {gamma}")
    own = rounds[rounds["gamma"] == gamma]
    row = summary[summary["gamma"] == gamma].iloc[0]
    every = {position: row[f"acceptance_at_{position}"] for position in range(1, gamma + 1)}
    positions = [position for position, value in every.items() if np.isfinite(value)]
    rate = np.array([every[position] for position in positions])
    _gamma_axis(axes, positions)
    if not positions:
        _say(axes, _PLOTS["acceptance_rate"].why_empty)
        return
    ticks = positions[:: 1 + len(positions) // 20]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    intervals = []
    for position in positions:
        reached, kept = draft_position(own, position)
        counts = own[["request_id"]].assign(kept=kept, reached=reached).groupby("request_id").sum()
        intervals.append(bootstrap_ratio_ci(counts["kept"], counts["reached"], **settings))
    low, high = np.array(intervals).T
    _draw_means(axes, positions, rate, low, high, marker="s")
    handles: list[Artist] = [_mean_handle("s", "all rounds", low, settings["confidence"])]
    unknown = ~np.isfinite(low)
    if unknown.any() and not unknown.all():
        handles += axes.plot(
            np.array(positions)[unknown],
            rate[unknown],
            linestyle="none",
            marker="s",
            markersize=4,
            color=BLUE,
            markerfacecolor="white",
            clip_on=False,
            zorder=4,
            label="too few for an interval",
        )
    _value_axis(axes, np.concatenate([rate, low, high]), 1.0)
    _note(axes, [len(own)], "round")
    _legend(axes, handles)


def _draw_means(axes: Axes, x: list[int], mean: np.ndarray, low: np.ndarray, high: np.ndarray, marker: str) -> None:
    axes.plot(x, mean, color=BLUE, marker=marker, markersize=4, clip_on=False, zorder=3)
    axes.vlines(x, low, high, color=BLUE, linewidth=1.0, zorder=3, clip_on=False)
    for end in (low, high):
        axes.plot(x, end, linestyle="none", marker="_", markersize=5, color=BLUE, markeredgewidth=1, clip_on=False)


def _mean_handle(marker: str, what: str, low: np.ndarray, confidence: float) -> Line2D:
    known = f", {100 * confidence:g} % interval" if np.isfinite(low).any() else ", no interval"
    return Line2D([], [], color=BLUE, marker=marker, markersize=4, label=what + known)


def _ms(value: float) -> str:
    """Three digits or more, never an exponent: 8.31 ms, 52.0 ms, 1274 ms."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} ms"


def _gamma_axis(axes: Axes, values: list[int]) -> float:
    """A linear axis with a tick at each value, labelled where there is room. Returns the smallest gap."""
    if not values:
        axes.set_xticks([])
        return 1.0
    gap = float(np.diff(values).min()) if len(values) > 1 else 1.0
    span = values[-1] - values[0]
    margin = max(0.4 * gap, 0.04 * span) if span else 1.0
    axes.set_xlim(values[0] - margin, values[-1] + margin)
    labels: list[str] = []
    last = -np.inf
    for value in values:
        room = 0.022 * (1 + len(str(value))) * span  # of a figure's width, one digit and some air
        labels.append(str(value) if value - last >= room else "")
        last = value if labels[-1] else last
    axes.set_xticks(values, labels)
    return gap


def _value_axis(axes: Axes, values: np.ndarray, top: float | None) -> None:
    """From 0 to a little above everything drawn (below 0 only if a value is)."""
    values = values[np.isfinite(values)]
    most = max(values.max(), top or 0.0)
    axes.set_ylim(min(0.0, values.min()), 1.05 * most if most > 0 else 1.0)


def _note(axes: Axes, counts: list[int], unit: str) -> None:
    few, many = min(counts), max(counts)
    number = f"{few}" if few == many else f"{few} to {many}"
    each = " at each γ" if len(counts) > 1 else ""
    axes.set_title(f"n = {number} {unit}{'' if many == 1 else 's'}{each}", loc="right", fontsize=7, color="#555555")


def _legend(axes: Axes, handles: list[Artist]) -> None:
    # Under the axes, where it can hide no data.
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.45, -0.24),
        ncols=2,
        columnspacing=1.2,
        handlelength=1.8,
    )


def _say(axes: Axes, sentence: str) -> None:
    axes.set(ylim=(0, 1), yticks=[])
    axes.text(
        0.5,
        0.5,
        textwrap.fill(sentence, 40),
        ha="center",
        va="center",
        transform=axes.transAxes,
        color="#555555",
    )
