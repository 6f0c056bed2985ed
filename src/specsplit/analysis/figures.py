"""The figures of an experiment, each against the draft length gamma, for a column of a printed page.

A sweep over gamma alone is one curve with a dot for each request. More modes and trees are more curves; more
temperatures and round-trip times are panels beside each other. The means and intervals are those of `summarize`, so a
figure never differs from `summary.csv`. Shapes (dot, square, ring, dashes) tell things apart, not colour alone: for
black-and-white print and for colour-blind readers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame

from specsplit.analysis.by_category import draw_by_category, summarize_by_category
from specsplit.analysis.captions import BY_CATEGORY, FIGURES
from specsplit.analysis.curves import MOST_PANELS, Curve, Panel, left_out, split_curves, split_panels
from specsplit.analysis.drawing import (
    DPI,
    NOTHING_DRAFTED,
    Plot,
    draw_metric,
    draw_positions,
    house_style,
    new_figure,
    save_figure,
    settle_layout,
)
from specsplit.analysis.tables import comparable, summarize

WIDTH_IN, HEIGHT_IN, TALL_IN = 3.4, 2.6, 4.6
PANEL_WIDTH_IN, PANEL_HEIGHT_IN = 2.5, 2.0  # of several beside each other

_LEGEND: dict[str, Any] = {"columnspacing": 1.2, "title_fontsize": 7}
_PLOTS = {
    "tpot": Plot(
        "itl_ms",
        "ITL (ms)",
        "No request has two rounds, so there is no time between tokens.",
        target_alone=True,
        mark_best=True,
    ),
    "acceptance_rate": Plot("average_acceptance_rate", "accepted / drafted", NOTHING_DRAFTED, top=1.0, drafting=True),
    "ttft": Plot("ttft_ms", "TTFT (ms)", "No request generated a token.", target_alone=True),
    "network_idle": Plot("network_idle_fraction", "share of total latency", "No request has a network time."),
    "speculation": Plot(
        "hit_rate",
        "hits / (hits + misses)",
        "No draft was made ahead: only the modes overlap and lookahead do that.",
        top=1.0,
        drafting=True,
    ),
}


def draw_figures(
    requests: DataFrame, rounds: DataFrame, out_dir: Path, *, confidence: float = 0.95, **settings: Any
) -> list[Path]:
    """Draw every figure of FIGURES, and the one by category, as .png (200 dpi) and .svg in `out_dir`; return the paths.

    requests, rounds: the tables of `merge_runs` or `read_tables`. The other arguments are those of
    `summarize`. A figure without data says why instead of being left out. The same input gives the same
    bytes. Raises UserError as `summarize`.
    """
    summary = summarize(requests, rounds, confidence=confidence, **settings)
    summary = summary.rename(columns={"hit_rate": "hit_rate_mean"})
    everything = requests, rounds
    requests, rounds = comparable(requests, rounds)
    ahead = requests["speculation_hits"] + requests["speculation_misses"]
    requests = requests.assign(hit_rate=requests["speculation_hits"] / ahead.where(ahead > 0))
    panels, curves = split_panels(requests, rounds, summary), split_curves(summary)
    paths = []
    with house_style():
        for name in FIGURES:
            plot = _PLOTS[name]
            shown, own = panels, curves
            if plot.drafting:
                shown = [panel.drafting() for panel in panels]
            if name == "speculation":
                own = [curve for curve in curves if curve.mode != "sync"]
            figure = new_figure(WIDTH_IN, HEIGHT_IN)
            omitted = left_out(panels, summary, curves)
            if len(panels) == 1 or not own:
                _draw_alone(figure, FIGURES[name], plot, shown[0], own or curves[:1], confidence, omitted)
            else:
                _draw_panels(figure, FIGURES[name], plot, shown[:MOST_PANELS], own, confidence, omitted)
            settle_layout(figure)
            metadata = {"Title": f"{FIGURES[name]} against draft length"}
            paths += save_figure(figure, Path(out_dir) / f"{name}.png", metadata)
    table = summarize_by_category(*everything, confidence=confidence, **settings)
    return [*paths, *draw_by_category(table, Path(out_dir) / f"{BY_CATEGORY}.png")]


def _draw_alone(
    figure: Figure, title: str, plot: Plot, panel: Panel, curves: list[Curve], confidence: float, omitted: str
) -> None:
    """A single panel, as wide as a column, each axes with its own legend."""
    positions = plot.metric == "average_acceptance_rate"
    height = TALL_IN if positions else HEIGHT_IN
    columns = 2
    if len(curves) > 4:  # over both columns of the page
        figure.set_size_inches(2 * WIDTH_IN, height + (1 + positions) * 0.45)
        columns = 3
    else:
        figure.set_size_inches(WIDTH_IN, height + (0.15 if len(curves) > 2 else 0.0))
    upper, *lower = figure.subplots(1 + positions, squeeze=False)[:, 0]
    upper.set(title=title, xlabel="draft length γ (tokens)", ylabel=plot.axis)
    handles, counts = draw_metric(upper, plot, panel, curves, confidence)
    _note(upper, counts, "request", "at each γ")
    _legend(upper, handles, columns, omitted)
    for axes in lower:
        gamma, rounds, handles = draw_positions(axes, panel, curves, confidence)
        axes.set(xlabel="position in the draft", ylabel="accepted / reached", title=f"By position, γ = {gamma}")
        _note(axes, rounds, "round", "a curve")
        _legend(axes, handles, columns, omitted)


def _draw_panels(
    figure: Figure, title: str, plot: Plot, panels: list[Panel], curves: list[Curve], confidence: float, omitted: str
) -> None:
    """Small panels beside each other on the same axes, with one legend below them."""
    columns = len(panels) if len(panels) <= 3 else 2 if len(panels) == 4 else 3
    lines = -(-len(panels) // columns)
    positions = plot.metric == "average_acceptance_rate"
    grid: Any = figure.subplots(lines * (1 + positions), columns, squeeze=False)
    legend: dict[str, Artist] = {}
    counts: list[int] = []
    drawn: list[tuple[Axes, int]] = []
    for block in range(1 + positions):
        for place in range(lines * columns):
            axes = grid[block * lines + place // columns, place % columns]
            if place >= len(panels):
                axes.set_axis_off()
                continue
            panel = panels[place]
            if block:
                gamma, _, handles = draw_positions(axes, panel, curves, confidence, narrow=True)
                across, up, heading = "position in the draft", "accepted / reached", f"{panel.title}, γ = {gamma}"
            else:
                handles, found = draw_metric(axes, plot, panel, curves, confidence, narrow=True)
                across, up, heading = "draft length γ (tokens)", plot.axis, panel.title
                counts += found
            axes.set_title(heading, fontsize=7.5)
            if place + columns >= len(panels):
                axes.set_xlabel(across)
            if place % columns == 0:
                axes.set_ylabel(up)
            legend |= {str(handle.get_label()): handle for handle in handles}
            drawn += [(axes, place % columns)] if handles else []
    low, high = zip(*(axes.get_ylim() for axes, _ in drawn), strict=True) if drawn else ((0.0,), (1.0,))
    for axes, column in drawn:  # one scale for all
        axes.set_ylim(min(low), max(high))
        axes.tick_params(labelleft=column == 0)
    per_row = max(2, columns)
    rows = -(-len(legend) // per_row)
    height = lines * (1 + positions) * PANEL_HEIGHT_IN + 0.3 + 0.16 * (rows + bool(omitted))
    figure.set_size_inches(PANEL_WIDTH_IN * columns, height)
    note = f", n = {_range(counts)} request{'' if max(counts) == 1 else 's'} at each point" if counts else ""
    figure.suptitle(title + note, x=0.01, ha="left", fontsize=8)
    if legend:
        below: dict[str, Any] = {"loc": "outside lower center", "ncols": per_row, "handlelength": 2.6}
        figure.legend(handles=list(legend.values()), title=omitted or None, **below, **_LEGEND)


def _range(counts: list[int]) -> str:
    few, many = min(counts), max(counts)
    return f"{few}" if few == many else f"{few} to {many}"


def _note(axes: Axes, counts: list[int], unit: str, each: str) -> None:
    if not counts:
        return
    text = f"n = {_range(counts)} {unit}{'' if max(counts) == 1 else 's'}{f' {each}' if len(counts) > 1 else ''}"
    axes.set_title(text, loc="right", fontsize=7, color="#555555")


def _legend(axes: Axes, handles: list[Artist], columns: int, omitted: str) -> None:
    # Under the axes, where it can hide no data.
    if handles:
        place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.24), "ncols": columns}
        length = 1.8 if len(handles) < 5 else 2.6
        figure, heights = axes.get_figure(root=True), []
        while True:  # names of drafts are of any length
            legend = axes.legend(handles=handles, title=omitted or None, handlelength=length, **place, **_LEGEND)
            extent = legend.get_window_extent()
            heights.append(extent.height / DPI)
            if place["ncols"] == 1 or figure is None or extent.width <= figure.bbox.width:
                break
            place["ncols"] -= 1
        if figure is not None and len(heights) > 1:
            figure.set_figheight(figure.get_figheight() + heights[-1] - heights[0])
