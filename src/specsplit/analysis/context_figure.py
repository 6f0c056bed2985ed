"""Cost of a token against the length of its context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pandas import DataFrame

from specsplit.analysis.drawing import doubling_axis, house_style, new_figure, save_figure, series_style, settle_layout
from specsplit.analysis.measures import quantiles
from specsplit.settings.names import gamma_order

WIDTH_IN, HEIGHT_IN = 6.8, 2.6


def summarize_contexts(texts: DataFrame) -> DataFrame:
    """One row a gamma and context length, from the rows of `experiment.context_curve.measure_contexts`.

    gamma, context_tokens, texts, output_tokens; ttft_ms_median, itl_ms_median, itl_ms_p90, verify_compute_ms_median,
    draft_compute_ms_median (over texts), tokens_per_round (mean); relative_length, relative_cost: context_tokens and
    itl_ms_median divided by those of the shortest context. Less than linear growth is relative_cost < relative_length.
    """
    rows: list[dict[str, Any]] = []
    for (gamma, length), own in texts.groupby(["gamma", "context_tokens"], sort=False):
        row: dict[str, Any] = {"gamma": gamma, "context_tokens": length, "texts": len(own)}
        row["output_tokens"] = int(own["output_tokens"].median())
        row |= quantiles(own["ttft_ms"], "ttft_ms", (50,)) | quantiles(own["itl_ms"], "itl_ms", (50, 90))
        for name in ("verify_compute_ms", "draft_compute_ms"):
            row |= quantiles(own[name], name, (50,))
        row["tokens_per_round"] = own["tokens_per_round"].mean()
        shortest = next((other for other in rows if other["gamma"] == gamma), row)
        row["relative_length"] = length / shortest["context_tokens"]
        row["relative_cost"] = row["itl_ms_median"] / shortest["itl_ms_median"]
        rows.append(row)
    table = DataFrame(rows).sort_values("gamma", kind="stable", key=lambda gammas: gammas.map(gamma_order))
    return table.reset_index(drop=True)


def draw_context_curve(table: DataFrame, path: Path) -> list[Path]:
    """Draw milliseconds per token, and time to the first one, against context length: `path` .png and .svg."""
    with house_style():
        figure = new_figure(WIDTH_IN, HEIGHT_IN)
        cost, first = figure.subplots(1, 2)
        for place, (gamma, own) in enumerate(table.groupby("gamma", sort=False)):
            name = "target alone" if gamma == 0 else f"γ = {gamma}"
            cost.plot(own["context_tokens"], own["itl_ms_median"], label=name, **series_style(place))
            first.plot(own["context_tokens"], own["ttft_ms_median"], **series_style(place))
        alone = table[table["gamma"] == table["gamma"].iloc[0]]
        linear = alone["itl_ms_median"].iloc[0] * alone["relative_length"]
        top = 1.15 * table["itl_ms_median"].max()
        cost.plot(alone["context_tokens"], linear, color="black", linestyle=":", linewidth=0.9, label="linear growth")
        cost.set(title="Time between tokens", ylabel="ITL (ms), median", ylim=(0, top))
        first.set(title="Time to the first token", ylabel="TTFT (ms), median", ylim=(0, None))
        for axes in (cost, first):
            doubling_axis(axes, table["context_tokens"], "context (tokens)")
        figure.legend(*cost.get_legend_handles_labels(), loc="outside lower center", ncols=5)
        settle_layout(figure)
        return save_figure(figure, path, {"Title": "Cost of a token against context length"})
