"""What is drawn into one set of axes (a metric against gamma, or acceptance by position), and how figures are saved."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pandas import DataFrame, Series

from specsplit.analysis.curves import BLACK, BLUE, GREEN, ORANGE, PINK, SKY, Curve, Panel, three_digits
from specsplit.analysis.measures import draft_position
from specsplit.analysis.statistics import rate_ci
from specsplit.experiment.columns import COLOCATED, STREAMED, WORKERS
from specsplit.io import replace_file
from specsplit.settings.names import AUTO

DPI = 200
RED, GREY = "#D55E00", "#8C8C8C"  # Okabe and Ito's vermilion, and a grey
NOTHING_DRAFTED = "Nothing was drafted, so there is no acceptance to show."


_STYLE: Any = {
    "text.parse_math": False,  # names are of users, and may hold dollars
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


@contextmanager
def house_style() -> Iterator[None]:
    """How every figure looks; a reader's own matplotlibrc must not change a published one."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


@dataclass(frozen=True)
class Plot:
    """What a figure shows: a metric of the summary, its axis, and why it may have no data."""

    metric: str
    axis: str
    why_empty: str
    target_alone: bool = False  # a dashed line at the level of gamma 0
    mark_best: bool = False  # a ring around the lowest mean
    top: float | None = None  # end of the y axis; None = what the data need
    drafting: bool = False  # without gamma 0


def new_figure(width_in: float, height_in: float) -> Figure:
    return Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained")


def series_style(place: int) -> dict[str, Any]:
    """Colour and marker of curve `place`, from 0, of a figure; the first one, in black, is usually the target alone."""
    colours, markers = (BLACK, BLUE, ORANGE, GREEN, PINK, SKY), "Dos^vP"
    return {"color": colours[place % len(colours)], "marker": markers[place % len(markers)], "markersize": 4}


def doubling_axis(axes: Axes, values: Iterable[int], label: str) -> None:
    """A logarithmic x axis with a tick at each value."""
    ticks = sorted(set(values))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)


def spread(count: Any, width: float) -> Any:
    """Offsets in -width/2 to width/2 for the points number `count`, an array: steps of the golden ratio spread any
    number of points evenly, without chance."""
    return ((count * 0.618034 + 0.5) % 1 - 0.5) * width


def settle_layout(figure: Figure) -> None:
    """Fix the layout of a finished figure, so that both formats get the same one."""
    for _ in range(2):  # the second pass makes room for the tick labels that the first one chose
        figure.draw_without_rendering()
    figure.set_layout_engine("none")


def save_figure(figure: Figure, path: Path, metadata: dict[str, Any] | None = None) -> list[Path]:
    """Save as `path` with .png and .svg, the same bytes for the same figure; returns the two paths."""
    paths = []
    for suffix, extra in (("png", {}), ("svg", {"Date": None})):
        data = io.BytesIO()
        figure.savefig(data, format=suffix, dpi=DPI, metadata=(metadata or {}) | extra)
        paths.append(path.with_suffix(f".{suffix}"))
        replace_file(paths[-1], data.getvalue())
    return paths


_ALONE = Curve("sync", "chain", name="target alone", colour="black", marker="D", line="none")


def draw_metric(
    axes: Axes, plot: Plot, panel: Panel, curves: list[Curve], confidence: float, *, narrow: bool = False
) -> tuple[list[Artist], list[int]]:
    """One metric against gamma: the means with their intervals, the target alone, the baselines, the lowest mean.

    Of a single curve each request is a dot as well, and the target alone is its first point. narrow: a panel among
    others, which share a legend, so it names no values. Returns what a legend shows, and the requests at each point.
    """
    baselines = panel.summary[panel.summary["setup"] != WORKERS]
    panel = panel.of_workers()
    places, gap = _gamma_axis(axes, panel.summary["gamma"], narrow)
    measured = panel.requests[panel.requests[plot.metric].notna()]
    if measured.empty:
        _say(axes, plot.why_empty, narrow)
        return [], []

    single = len(curves) == 1
    base = panel.summary[panel.summary["gamma"] == 0]
    groups = [(curve, curve.own(panel.summary)) for curve in curves]
    if single:
        groups = [(curves[0], pd.concat([base, groups[0][1]]))]
    elif not base.empty:
        groups.append((_ALONE, base))
    handles: list[Artist] = []
    values: list[Any] = []
    if single:
        jitter = spread(measured.groupby("gamma", sort=False).cumcount().to_numpy(), 0.4 * gap)
        dots: dict[str, Any] = {"s": 5, "color": GREY, "alpha": 0.55, "linewidths": 0, "label": "one request"}
        handles.append(
            axes.scatter(
                measured["gamma"].map(places).astype(float) + jitter, measured[plot.metric], clip_on=False, **dots
            )
        )
        values.append(measured[plot.metric])
    lowest: tuple[float, float, str] | None = None
    for number, (curve, rows) in enumerate(groups):
        mean, low, high = (rows[f"{plot.metric}_{part}"].to_numpy() for part in ("mean", "ci_low", "ci_high"))
        # Beside each other, so that the intervals of several curves can be told apart.
        aside = 0.0 if curve is _ALONE else _aside(number, len(curves), gap)
        x: np.ndarray = rows["gamma"].map(places).to_numpy(dtype=float) + aside
        _draw_means(axes, x, mean, low, high, curve, joined=(rows["gamma"] != AUTO).to_numpy())
        values += [mean, low, high]
        if single:
            handles.insert(0, _mean_handle(curve, "mean", low, confidence))
        elif curve is not _ALONE or not plot.target_alone:
            handles.append(_handle(curve, curve.name))
        for gamma, place, value, speedup in zip(rows["gamma"], x.tolist(), mean.tolist(), rows["speedup"], strict=True):
            if np.isfinite(value) and (lowest is None or value < lowest[1]):
                who = "" if single or curve is _ALONE else f"{curve.name}, "
                whole = "" if gamma == 0 or np.isnan(speedup) else f"\n(speedup of whole texts: {speedup:.2f})"
                lowest = place, value, f"{who}γ = {gamma}, {three_digits(value)} ms{whole}"
    if not single and np.isfinite(np.concatenate(values)).any():
        handles.append(_interval_handle(confidence))
    alone = base[f"{plot.metric}_mean"].dropna()
    if plot.target_alone and not alone.empty:
        text = "target alone" if narrow else f"target alone: {three_digits(alone.iloc[0])} ms"
        handles.append(axes.axhline(alone.iloc[0], color="black", linestyle="--", linewidth=0.9, label=text))
    if plot.target_alone:
        handles += _draw_baselines(axes, plot.metric, baselines, curves, places, narrow)
        values.append(baselines[f"{plot.metric}_mean"])
    if plot.mark_best and len(places) > 1 and lowest is not None:
        text = "lowest of its panel" if narrow else f"lowest: {lowest[2]}"
        ring: dict[str, Any] = {"marker": "o", "markersize": 10, "fillstyle": "none", "markeredgewidth": 1.4}
        handles += axes.plot(*lowest[:2], linestyle="none", color=RED, clip_on=False, label=text, **ring)
    _value_axis(axes, np.concatenate(values), plot.top)
    return handles, measured.groupby(["draft", "mode", "tree", "gamma"], sort=False).size().to_list()


def _draw_baselines(
    axes: Axes, metric: str, baselines: DataFrame, curves: list[Curve], places: dict[Any, float], narrow: bool
) -> list[Artist]:
    """The target that streams, a dotted line; and each curve's pair in one process. Returns what a legend shows."""
    handles: list[Artist] = []
    for value in baselines.loc[baselines["setup"] == STREAMED, f"{metric}_mean"].dropna():
        text = "target streamed" if narrow else f"target streamed: {three_digits(value)} ms"
        handles.append(axes.axhline(value, color=GREY, linestyle=":", linewidth=1.1, label=text))
    pairs = baselines[(baselines["setup"] == COLOCATED) & (baselines["gamma"] != 0)].assign(setup=WORKERS)
    for curve in curves:
        rows = curve.own(pairs)
        look: dict[str, Any] = {"color": curve.colour, "marker": "x", "markersize": 4, "linestyle": "none"}
        drawn = axes.plot(rows["gamma"].map(places).astype(float), rows[f"{metric}_mean"], **look)
        if len(rows) and not any(handle.get_label() == "in one process" for handle in handles):
            drawn[0].set_label("in one process")
            handles += drawn
    return handles


def draw_positions(
    axes: Axes, panel: Panel, curves: list[Curve], confidence: float, *, narrow: bool = False
) -> tuple[int | str, list[int], list[Artist]]:
    """Acceptance at each position of the draft, for the largest gamma; intervals over its requests.

    Returns that gamma, the number of rounds of each curve, and what a legend shows.
    """
    gammas = list(panel.summary["gamma"])
    gamma = max((gamma for gamma in gammas if gamma != AUTO), default=AUTO if gammas else 0)
    rates: list[tuple[Curve, DataFrame, Series]] = []
    for curve in curves:
        row = curve.own(panel.summary[panel.summary["gamma"] == gamma])
        if not row.empty:
            rate = row.iloc[0].filter(regex="^acceptance_at_").astype(float)
            rate.index = [int(name.rpartition("_")[2]) for name in rate.index]
            rates.append((curve, curve.own(panel.rounds[panel.rounds["gamma"] == gamma]), rate.dropna()))
    positions = sorted({position for _, _, rate in rates for position in rate.index})
    _gamma_axis(axes, positions, narrow)
    if not positions:
        _say(axes, NOTHING_DRAFTED, narrow)
        return gamma, [], []
    ticks = positions[:: 1 + len(positions) // (10 if narrow else 20)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    handles: list[Artist] = []
    values: list[Any] = []
    for curve, own, rate in rates:
        intervals = []
        for position in rate.index:
            reached, kept = draft_position(own, position)
            counts = own[["request_id"]].assign(kept=kept, reached=reached).groupby("request_id").sum()
            intervals.append(rate_ci(counts["kept"], counts["reached"], confidence=confidence))
        low, high = np.array(intervals).T
        x = rate.index.to_numpy(dtype=float) + _aside(curves.index(curve), len(curves), 1.0)
        single = len(curves) == 1
        drawn = replace(curve, marker="s") if single else curve
        _draw_means(axes, x, rate.to_numpy(), low, high, drawn, np.ones(len(x), dtype=bool))
        handles.append(_mean_handle(drawn, "all rounds", low, confidence) if single else _handle(curve, curve.name))
        values += [rate, low, high]
        unknown = ~np.isfinite(low)
        if single and unknown.any() and not unknown.all():
            few: dict[str, Any] = {**drawn.marks, "markerfacecolor": "white", "label": "too few for an interval"}
            handles += axes.plot(x[unknown], rate[unknown], linestyle="none", clip_on=False, zorder=4, **few)
    if len(curves) > 1:
        handles.append(_interval_handle(confidence))
    _value_axis(axes, np.concatenate(values), 1.0)
    return gamma, [len(own) for _, own, _ in rates], handles


def _draw_means(
    axes: Axes, x: np.ndarray, mean: np.ndarray, low: np.ndarray, high: np.ndarray, curve: Curve, joined: np.ndarray
) -> None:
    """Means with intervals. joined: those that a line goes through; gamma auto is no place on the line."""
    for points, line in ((joined, curve.line), (~joined, "none")):
        if points.any():  # a line without points would upset the layout
            axes.plot(x[points], mean[points], linestyle=line, clip_on=False, zorder=3, **curve.marks)
    axes.vlines(x, low, high, color=curve.colour, linewidth=1.0, zorder=3 if not curve.hollow else 2.9, clip_on=False)
    cap: dict[str, Any] = {"linestyle": "none", "marker": "_", "markersize": 5, "markeredgewidth": 1}
    for end in (low, high):
        axes.plot(x, end, color=curve.colour, clip_on=False, **cap)


def _aside(number: int, curves: int, gap: float) -> float:
    """How far to the side the points of a curve are moved, all within 0.6 of the gap between two places."""
    return (number - (curves - 1) / 2) * min(0.12, 0.6 / curves) * gap


def _handle(curve: Curve, label: str) -> Line2D:
    return Line2D([], [], linestyle=curve.line, label=label, **curve.marks)


def _mean_handle(curve: Curve, what: str, low: np.ndarray, confidence: float) -> Line2D:
    known = f", {100 * confidence:g} % interval" if np.isfinite(low).any() else ", no interval"
    return _handle(curve, (f"{curve.name}: " if curve.name else "") + what + known)


def _interval_handle(confidence: float) -> Line2D:
    label = f"mean, {100 * confidence:g} % interval"
    return Line2D([], [], linestyle="none", marker="|", markersize=8, color=GREY, label=label)


def _gamma_axis(axes: Axes, values: Iterable[int | str], narrow: bool = False) -> tuple[dict[int | str, float], float]:
    """A linear axis with a tick at each value, labelled where there is room; `auto` stands apart at the right.

    Returns where each value is, and the smallest gap between two.
    """
    numbers = sorted({int(value) for value in values if value != AUTO})
    places: dict[int | str, float] = {number: float(number) for number in numbers}
    gap = float(np.diff(numbers).min()) if len(numbers) > 1 else 1.0
    if AUTO in list(values):
        apart = max(gap, 0.14 * (numbers[-1] - numbers[0])) if numbers else 0.0
        places[AUTO] = (numbers[-1] if numbers else 0.0) + apart
        if numbers:
            axes.axvline(places[AUTO] - apart / 2, color=GREY, linewidth=0.6, linestyle=":", zorder=0)
    if not places:
        axes.set_xticks([])
        return places, gap
    first, last = min(places.values()), max(places.values())
    span = last - first
    margin = max(0.4 * gap, 0.04 * span) if span else 1.0
    axes.set_xlim(first - margin, last + margin)
    labels: list[str] = []
    before = -np.inf
    for value, place in places.items():
        room = (0.03 if narrow else 0.022) * (1 + len(str(value))) * span  # of a figure's width, a digit and some air
        labels.append(str(value) if place - before >= room or value == AUTO else "")
        before = place if labels[-1] else before
    axes.set_xticks(list(places.values()), labels)
    return places, gap


def _value_axis(axes: Axes, values: np.ndarray, top: float | None) -> None:
    """From 0 to a little above everything drawn (below 0 only if a value is)."""
    values = values[np.isfinite(values)]
    most = max(values.max(), top or 0.0)
    axes.set_ylim(min(0.0, values.min()), 1.05 * most if most > 0 else 1.0)


def _say(axes: Axes, sentence: str, narrow: bool = False) -> None:
    axes.set(ylim=(0, 1), yticks=[])
    place: dict[str, Any] = {"ha": "center", "va": "center", "transform": axes.transAxes, "color": "#555555"}
    axes.text(0.5, 0.5, textwrap.fill(sentence, 28 if narrow else 40), **place)
