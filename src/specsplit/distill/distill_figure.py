"""How the training went and what came of it: loss, agreement with the target, acceptance by position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from pandas import DataFrame, Series

from specsplit.analysis.drawing import DPI, GREY, RED, house_style, save_figure, settle_layout

BLUE = "#0072B2"
TICKS = [digit * 10.0**power for power in range(-4, 3) for digit in (1, 2, 5)]
FURTHER = "validation_agreement_"  # columns of a head: from its own states
SMOOTHED = 50  # points that the line through the steps' losses has


def draw_distillation(losses: DataFrame, acceptance: DataFrame, path: Path) -> list[Path]:
    """Draw loss.csv and acceptance.csv of a distillation as `path` with .png and .svg; returns the two paths."""
    with house_style():
        figure = Figure(figsize=(7.2, 2.6), dpi=DPI, layout="constrained")
        loss, agree, accepted = figure.subplots(1, 3)
        _draw_loss(loss, losses)
        evaluated = losses.dropna(subset=["validation_agreement"])
        further = [name for name in losses.columns if name.startswith(FURTHER)]
        for place, name in enumerate(["validation_agreement", *further], start=1):
            label = f"token {place} of a draft" if further else None
            alpha = 1 - (place - 1) / (len(further) + 1)
            agree.plot(
                evaluated["tokens"], evaluated[name], color=BLUE, alpha=alpha, marker="o", markersize=3, label=label
            )
        if further:
            agree.legend()
        agree.set(title="Same likeliest token", ylabel="share of positions", ylim=(0, 1))
        for axes in (loss, agree):
            axes.set_xlabel("tokens trained on")
            axes.set_xlim(0, None)
        _draw_acceptance(accepted, acceptance)
        settle_layout(figure)
        return save_figure(figure, path, {"Title": "A distilled draft: training and acceptance"})


def _draw_loss(axes: Axes, losses: DataFrame) -> None:
    steps = losses.dropna(subset=["loss"])
    many = len(steps) > 2 * SMOOTHED
    axes.plot(steps["tokens"], steps["loss"], color=GREY, linewidth=0.4 if many else 0.9, label="a step")
    if many:
        mean: Series = steps["loss"].rolling(len(steps) // SMOOTHED, center=True).mean()
        axes.plot(steps["tokens"], mean, color="black", linewidth=1.0, label="running mean")
    evaluated = losses.dropna(subset=["validation_loss"])
    axes.plot(
        evaluated["tokens"],
        evaluated["validation_loss"],
        color=BLUE,
        marker="o",
        markersize=3,
        label="texts not trained on",
    )
    # The first steps bring the layers together again, from ten times the divergence of all that follow.
    axes.set(title="Divergence from the target", ylabel="KL (nats a token)", yscale="log")
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in TICKS if low <= tick <= high], minor=False)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend()


def _draw_acceptance(axes: Axes, acceptance: DataFrame) -> None:
    axes.set(title="Accepted, measured prompts", ylabel="acceptance rate", xlabel="position in the draft", ylim=(0, 1))
    if acceptance.empty:
        axes.text(0.5, 0.5, "Nothing was drafted.", ha="center", transform=axes.transAxes)
        return
    x, rate = acceptance["position"].to_numpy(), acceptance["acceptance_rate"].to_numpy()
    low, high = (acceptance[f"acceptance_rate_ci_{end}"].to_numpy(dtype=float) for end in ("low", "high"))
    axes.vlines(x, low, high, color=RED, linewidth=1.0)
    axes.plot(x, rate, color=RED, marker="s", markersize=4, clip_on=False, label="all prompts")
    axes.axhline(0.5, color=GREY, linewidth=0.7, linestyle=":")
    axes.set_xticks(x[:: 1 + len(x) // 12], [str(tick) for tick in x[:: 1 + len(x) // 12]])
    if np.isfinite(low).any():
        axes.vlines([], [], [], color=RED, linewidth=1.0, label="interval over prompts")
    axes.legend()
