"""The summary by category of the prompts, as benchmarks of speculative decoding show theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pandas import DataFrame, concat

from specsplit.analysis.configurations import configuration_of, row_of
from specsplit.analysis.drawing import house_style, new_figure, save_figure, series_style, settle_layout
from specsplit.analysis.measures import ratio, verifies_draft
from specsplit.analysis.tables import comparable, summarize
from specsplit.errors import counted, shortened
from specsplit.experiment.columns import WORKERS
from specsplit.settings.axes import PLAIN

POOLED, MACRO = "all prompts", "mean of categories"
# Columns of the summary that are told by category, each with its interval where it has one.
MEASURES = (
    *("acceptance_length", "draft_acceptance_rate", "itl_ms_mean", "tpot_ms_mean", "ttft_ms_mean"),
    *("tokens_per_second", "speedup", "speedup_over_streamed", "speedup_over_colocated"),
)
# Rounds by the place in the output where they begin: name -> first token, end.
WINDOWS = {"first_32": (0, 32), "32_to_128": (32, 128), "beyond_128": (128, np.inf)}
MOST_CURVES = 6
WIDTH_IN, ROW_IN = 6.8, 0.34


def summarize_by_category(requests: DataFrame, rounds: DataFrame, **settings: Any) -> DataFrame:
    """One row a category and configuration, then those of all prompts together and of the mean over the categories.

    requests, rounds: of `merge_runs` or `read_tables`. settings: those of `summarize`, whose columns MEASURES are, with
    their intervals; category, and the columns of a configuration, come first.

    category
        of the dataset; `all prompts`: pooled; `mean of categories`: the plain mean of the rows above, each category
        counting alike, without intervals, and empty where a category has no value. Empty in the dataset is `none`; one
        that has the name of a row of all is `... (category)`.
    acceptance_length_first_32, _32_to_128, _beyond_128
        acceptance length of the verifications that begin at these places of the output.
    """
    names = {"": "none", **{name: f"{name} (category)" for name in (POOLED, MACRO)}}
    requests = requests.assign(category=requests["category"].replace(names))
    of_request = requests.drop_duplicates("request_id").set_index("request_id")["category"]
    parts = []
    for category in sorted(of_request.unique()):
        ids = of_request.index[of_request == category]
        part = requests[requests["request_id"].isin(ids)], rounds[rounds["request_id"].isin(ids)]
        parts.append(_part(category, *part, settings))
    pooled = _part(POOLED, requests, rounds, settings)
    tables = [*parts, pooled]
    if len(parts) > 1:
        tables.append(_macro(parts, pooled))
    return concat(tables, ignore_index=True)


def _part(category: str, requests: DataFrame, rounds: DataFrame, settings: dict[str, Any]) -> DataFrame:
    summary = summarize(requests, rounds, **settings)
    measures = [
        name
        for measure in MEASURES
        for name in (measure, *(f"{measure.removesuffix('_mean')}_ci_{end}" for end in ("low", "high")))
        if name in summary
    ]
    table = summary[[*row_of(summary), "requests", "compared", *measures, "lossless", "lossless_compared"]]
    table.insert(0, "category", category)
    windows = _windows(comparable(requests, rounds)[1])
    keys = configuration_of(summary)
    for name in WINDOWS:
        lengths = [windows.get((key, name), np.nan) for key in keys]
        drafted = (summary["gamma"] != 0) & (summary["setup"] == WORKERS)
        table[f"acceptance_length_{name}"] = np.where(drafted, lengths, np.nan)
    return table


def _windows(rounds: DataFrame) -> dict[Any, float]:
    """(configuration, name of the window) -> acceptance length of the verifications that begin in it."""
    rounds = rounds.sort_values("round", kind="stable")
    configurations = configuration_of(rounds)
    text = [configurations, rounds["request_id"], rounds["repeat"]]
    added = rounds["accepted"].astype(float) + 1
    begins = added.groupby(text, sort=False).cumsum() - added
    verified = verifies_draft(rounds)
    lengths = {}
    for name, (first, end) in WINDOWS.items():
        inside = verified & (begins >= first) & (begins < end)
        for key, accepted in rounds.loc[inside, "accepted"].groupby(configurations[inside], sort=False):
            lengths[key, name] = 1 + ratio(float(accepted.sum()), len(accepted))
    return lengths


def _macro(parts: list[DataFrame], pooled: DataFrame) -> DataFrame:
    """The mean over the categories of each measure, in the rows of `pooled`."""
    every = concat(parts, ignore_index=True)
    rows = pooled.assign(category=MACRO)
    counts = (*row_of(rows), "requests", "compared")
    measured = [name for name in map(str, rows.select_dtypes("number")) if name not in counts]
    rows_of = every.groupby(configuration_of(every, row_of(every)), sort=False)
    of_row = rows_of[measured].sum(min_count=len(parts)) / len(parts)
    for name in measured:
        means = configuration_of(rows, row_of(rows)).map(of_row[name])
        rows[name] = np.nan if "_ci_" in name or name == "lossless_compared" else means.astype(float)
    return rows


def draw_by_category(table: DataFrame, path: Path) -> list[Path]:
    """Draw acceptance length and speedup of the drafting configurations by category, as `path` .png and .svg."""
    drafted = table[(table["gamma"] != 0) & (table["setup"] == WORKERS)]
    names = list(dict.fromkeys(table["category"]))
    streamed = drafted["speedup_over_streamed"].notna().any()
    speedup = "speedup_over_streamed" if streamed else "speedup"
    pooled = drafted[drafted["category"] == POOLED]
    fastest = set(configuration_of(pooled.sort_values(speedup, ascending=False, kind="stable"))[:MOST_CURVES])
    every = list(drafted.groupby(configuration_of(drafted), sort=False))
    curves = [(key, own) for key, own in every if key in fastest]
    against = "the target that streams" if streamed else "the target alone"
    with house_style():
        figure = new_figure(WIDTH_IN, 1.3 + ROW_IN * len(names))
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, measure in ((left, "acceptance_length"), (right, speedup)):
            for place, (key, own) in enumerate(curves):
                own = own.set_index("category").reindex(names)
                style = series_style(place + 1) | {"linestyle": "none"}
                offset = (place - (len(curves) - 1) / 2) * 0.11
                y = np.arange(len(names)) + offset
                low, high = (own[f"{measure}_ci_{end}"] for end in ("low", "high"))
                axes.hlines(y, low, high, color=style["color"], linewidth=0.8)
                axes.plot(own[measure], y, label=_name(key), **style)
            if measure == speedup:
                axes.axvline(1, color="black", linestyle=":", linewidth=0.8)
        left.set(xlabel="acceptance length (tokens)", title="Tokens a verification adds")
        right.set(xlabel=f"speedup over {against}", title="Speedup")
        left.set_yticks(range(len(names)), [shortened(" ".join(name.split())) for name in names])
        left.invert_yaxis()
        if curves:
            omitted = len(every) - len(curves)
            slower = counted(omitted, "slower configuration is", "slower configurations are")
            title = f"{slower} in the table alone" if omitted else None
            figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, title=title)
        settle_layout(figure)
        return save_figure(figure, path, {"Title": "Acceptance length and speedup by category"})


def _name(configuration: tuple[Any, ...]) -> str:
    gamma, *rest = configuration
    special = [str(value) for value, plain in zip(rest, [*PLAIN.values(), 1], strict=False) if value != plain]
    return ", ".join([f"γ = {gamma}", *special])
