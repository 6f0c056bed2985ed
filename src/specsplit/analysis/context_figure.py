"""Cost of a token against the length of its context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pandas import DataFrame

from specsplit.analysis.drawing import DPI, house_style, save_figure, settle_layout
from specsplit.settings.run import gamma_order

WIDTH_IN, HEIGHT_IN = 6.8, 2.6
_COLOURS, _MARKERS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7"), ("D", "o", "s", "^", "v")


def summarize_contexts(texts: DataFrame) -> DataFrame:
    """One row a gamma and context length, from the rows of `bench.context_curve.measure_contexts`.

    gamma, context_tokens, texts, output_tokens; ttft_ms_median, itl_ms_median, itl_ms_p90, verify_compute_ms_median,
    draft_compute_ms_median (over texts), tokens_per_round (mean); relative_length, relative_cost: context_tokens and
    itl_ms_median divided by those of the shortest context. Less than linear growth is relative_cost < relative_length.
    """
    rows: list[dict[str, Any]] = []
    first: dict[Any, tuple[float, float]] = {}
    key = ["gamma", "context_tokens"]
    for _, own in texts.groupby(key, sort=False):
        gamma, length = own["gamma"].iloc[0], int(own["context_tokens"].iloc[0])
        row: dict[str, Any] = {"gamma": gamma, "context_tokens": length, "texts": len(own)}
        row["output_tokens"] = int(own["output_tokens"].median())
        row["ttft_ms_median"] = own["ttft_ms"].median()
        row["itl_ms_median"] = own["itl_ms"].median()
        row["itl_ms_p90"] = own["itl_ms"].quantile(0.9)
        for name in ("verify_compute_ms", "draft_compute_ms"):
            row[f"{name}_median"] = own[name].median()
        row["tokens_per_round"] = own["tokens_per_round"].mean()
        base = first.setdefault(gamma, (length, row["itl_ms_median"]))
        row |= {"relative_length": length / base[0], "relative_cost": row["itl_ms_median"] / base[1]}
        rows.append(row)
    table = DataFrame(rows).sort_values("gamma", kind="stable", key=lambda gammas: gammas.map(gamma_order))
    return table.reset_index(drop=True)


def draw_context_curve(table: DataFrame, path: Path) -> list[Path]:
    """Draw milliseconds per token, and time to the first one, against context length: `path` .png and .svg."""
    with house_style():
        figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), dpi=DPI, layout="constrained")
        cost, first = figure.subplots(1, 2)
        for place, (gamma, own) in enumerate(table.groupby("gamma", sort=False)):
            style: dict[str, Any] = {
                "color": _COLOURS[place % len(_COLOURS)],
                "marker": _MARKERS[place % len(_MARKERS)],
                "markersize": 4,
            }
            cost.plot(own["context_tokens"], own["itl_ms_median"], label=_name(gamma), **style)
            first.plot(own["context_tokens"], own["ttft_ms_median"], **style)
        alone = table[table["gamma"] == table["gamma"].iloc[0]]
        linear = alone["itl_ms_median"].iloc[0] * alone["relative_length"]
        top = 1.15 * table["itl_ms_median"].max()
        cost.plot(alone["context_tokens"], linear, color="black", linestyle=":", linewidth=0.9, label="linear growth")
        cost.set(title="Time between tokens", ylabel="ITL (ms), median", ylim=(0, top))
        first.set(title="Time to the first token", ylabel="TTFT (ms), median", ylim=(0, None))
        ticks = sorted(table["context_tokens"].unique())
        for axes in (cost, first):
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
            axes.set_xlabel("context (tokens)")
        figure.legend(*cost.get_legend_handles_labels(), loc="outside lower center", ncols=5)
        settle_layout(figure)
        return save_figure(figure, path, {"Title": "Cost of a token against context length"})


def _name(gamma: object) -> str:
    return "target alone" if gamma == 0 else f"γ = {gamma}"
