"""Measured time per token beside the formula's, a panel for each round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from pandas import DataFrame

from specsplit.analysis.drawing import DPI, save_figure

STYLE = {"sync": ("#0072B2", "o"), "overlap": ("#E69F00", "s"), "lookahead": ("#009E73", "^")}


def draw_theory_check(table: DataFrame, path: Path) -> list[Path]:
    """Draw the rows of theory_check.csv as `path` with .png and .svg; returns the two paths.

    Lines are the formulas at the measured tokens per round, dotted ones with the bare gRPC round trips added, marks the
    measurements; at the right, gamma chosen while writing.
    """
    rtts = sorted(table["rtt_ms"].unique())
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 8, "svg.hashsalt": "specsplit", "svg.fonttype": "none"})
        figure = Figure(figsize=(2.6 * len(rtts) + 0.6, 3.2), dpi=DPI, layout="constrained")
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
            axes.set_title(f"RTT {rtt:g} ms (target alone: {alone:.0f} ms)", loc="left", fontsize=8)
            axes.set_xlabel("draft length γ (tokens)")
            ticks = [*numbers, *([auto_at] if "auto" in set(own["gamma"]) else [])]
            axes.set_xticks(ticks, [str(n) for n in numbers] + (["auto"] if len(ticks) > len(numbers) else []))
            axes.set_ylim(0, None)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("TPOT (ms)")
        panels[0].plot([], [], color="black", linewidth=1.1, label="formula")
        panels[0].plot([], [], color="black", linewidth=1.1, linestyle=":", label="formula with bare gRPC")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
        return save_figure(figure, path)
