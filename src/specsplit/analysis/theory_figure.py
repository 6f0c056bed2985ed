"""Measured time per token beside the formula's, a panel for each round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pandas import DataFrame

from specsplit.analysis.curves import BLUE, GREEN, ORANGE
from specsplit.analysis.drawing import house_style, new_figure, save_figure

STYLE = {"sync": (BLUE, "o"), "overlap": (ORANGE, "s"), "lookahead": (GREEN, "^")}


def draw_theory_check(table: DataFrame, path: Path) -> list[Path]:
    """Draw the rows of theory_check.csv as `path` with .png and .svg; returns the two paths.

    Lines are the formulas at the measured tokens per round, dotted ones with the bare gRPC round trips added, marks the
    measurements; at the right, gamma chosen while writing.
    """
    rtts = sorted(table["rtt_ms"].unique())
    with house_style():
        figure = new_figure(2.6 * len(rtts) + 0.6, 3.2)
        panels = figure.subplots(1, len(rtts), squeeze=False)[0]
        numbers = [gamma for gamma in table["gamma"].unique() if gamma != "auto" and gamma != 0]
        auto_at = max(numbers, default=0) + 2
        for axes, rtt in zip(panels, rtts, strict=True):
            own = table[table["rtt_ms"] == rtt]
            alone = own.loc[own["gamma"] == 0, "tpot_ms"].iloc[0]
            for mode, (colour, marker) in STYLE.items():
                rows = own[(own["mode"] == mode) & (own["gamma"] != 0)]
                fixed, auto = rows[rows["gamma"] != "auto"], rows[rows["gamma"] == "auto"]
                x = fixed["gamma"].astype(float)
                axes.plot(x, fixed["expected_ms"], color=colour, linewidth=1.1)
                axes.plot(x, fixed["limit_ms"], color=colour, linewidth=1.1, linestyle=":")
                mark: dict[str, Any] = {"linestyle": "none", "color": colour, "marker": marker, "markersize": 4.5}
                axes.plot(x, fixed["tpot_ms"], label=mode, **mark)
                if len(auto):
                    axes.plot([auto_at], auto["tpot_ms"], markerfacecolor="white", **mark)
            axes.set(title=f"RTT {rtt:g} ms (target alone: {alone:.0f} ms)", xlabel="draft length γ (tokens)")
            ticks = [*numbers, *([auto_at] if "auto" in set(own["gamma"]) else [])]
            axes.set_xticks(ticks, [str(n) for n in numbers] + (["auto"] if len(ticks) > len(numbers) else []))
            axes.set_ylim(0, None)
        panels[0].set_ylabel("TPOT (ms)")
        panels[0].plot([], [], color="black", linewidth=1.1, label="formula")
        panels[0].plot([], [], color="black", linewidth=1.1, linestyle=":", label="formula with bare gRPC")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        return save_figure(figure, path)
