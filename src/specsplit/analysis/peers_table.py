"""The race against the peers: a row a contender with its ratios to every peer, and the figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from pandas import DataFrame

from specsplit.analysis.curves import BLUE, ORANGE
from specsplit.analysis.drawing import GREY, house_style, new_figure, save_figure, settle_layout, spread
from specsplit.analysis.measures import TIMES, median_over_repeats, metric_columns, paired_columns, ratio
from specsplit.analysis.reading import read_records
from specsplit.analysis.statistics import compare_jointly, level_of_each
from specsplit.errors import counted
from specsplit.experiment.peer_race import PeerRecord
from specsplit.io import write_csv
from specsplit.provenance.facts import read_run

WIDTH_IN, ROW_IN = 6.8, 0.27


def summarize_peers(
    requests: DataFrame,
    left_out: Mapping[str, Mapping[str, str]] | None = None,
    *,
    confidence: float = 0.95,
    bootstrap_samples: int = 10_000,
    seed: int = 0,
) -> DataFrame:
    """One row a contender, ours first, those that could not be raced last.

    left_out: of these, by name, `engine` and `reason`.

    contender, engine, requests, repeats, generated_tokens
    <t>_mean, _ci_low, _ci_high, _median, _p90, _p99 for each t of TIMES
        over requests, of the medians over the repeats of each.
    tokens_per_round, tokens_per_second
    itl_vs_P, _ci_low, _ci_high; latency_vs_P, _ci_low, _ci_high for each peer P
        this contender's milliseconds divided by those of P: mean time per token after the first burst, over the
        requests that have it on both sides, and end to end per token over all requests. Below 1 this one is faster.
        Paired: the same prompts on both sides. Each interval is for itself.
    latency_joint_low_P, latency_joint_high_P
        the interval of latency_vs_P that holds for all contenders and peers at once.
    identical
        share of requests with, in every repeat, the text of our target alone.
    first_divergence
        the earliest token, from 0, at which a text is another one; nothing when all are identical.
    reason
        why it could not be raced; then nothing else is there.
    """
    table = median_over_repeats(requests, ("contender", "request_id"), "identical")
    own = {str(name): rows.set_index("request_id") for name, rows in table.groupby("contender", sort=False)}
    order = sorted(own, key=lambda name: (own[name]["engine"].iloc[0] != "specsplit", _rank(name)))
    peers = [name for name in order if own[name]["engine"].iloc[0] != "specsplit"]
    # Who compares with the fastest peer has picked it by its result.
    level = level_of_each(confidence, len(peers))
    settings: dict[str, Any] = {"confidence": level, "samples": bootstrap_samples, "seed": seed}
    joint = {peer: _joint_intervals(own, peer, settings) for peer in peers}
    result = []
    for name in order:
        rows = own[name]
        tokens, latency = rows["generated_tokens"].sum(), rows["total_latency_ms"].sum()
        row: dict[str, Any] = {
            "contender": name,
            "engine": rows["engine"].iloc[0],
            "requests": len(rows),
            "repeats": requests["repeat"].nunique(),
            "generated_tokens": int(tokens),
        }
        for metric in TIMES:
            row |= metric_columns(rows[metric], metric, confidence)
        row["tokens_per_round"] = tokens / rows["num_rounds"].sum()
        row["tokens_per_second"] = ratio(1e3 * tokens, latency)
        for peer in peers:
            other = own[peer].loc[rows.index]
            for what, columns in (("itl", _itl_columns), ("latency", latency_columns)):
                found = columns(f"{what}_vs_{peer}", rows, other, confidence)
                row |= dict.fromkeys(found, 1.0) if name == peer else found
            row[f"latency_joint_low_{peer}"], row[f"latency_joint_high_{peer}"] = joint[peer][name]
        row["identical"] = rows["identical"].mean()
        row["first_divergence"] = requests.loc[requests["contender"] == name, "first_divergence"].min()
        row["reason"] = None
        result.append(row)
    for name, why in (left_out or {}).items():
        result.append({"contender": name, "engine": why["engine"], "requests": 0, "reason": why["reason"]})
    return DataFrame(result)


def _rank(name: str) -> tuple[bool, int, str]:
    """The target alone first, then by gamma and mode; peers by name."""
    number = name.rpartition("_")[2]
    return (name != "gamma_0", int(number) if number.isdecimal() else 99, name)


def _itl_columns(name: str, rows: DataFrame, other: DataFrame, confidence: float) -> dict[str, float]:
    """Over the requests that have a time per token on both sides: one of a single burst has none."""
    both = rows["itl_ms"].notna() & other["itl_ms"].notna()
    ones = np.ones(int(both.sum()))
    return paired_columns(name, rows.loc[both, "itl_ms"], ones, other.loc[both, "itl_ms"], ones, confidence)


def latency_columns(
    name: str, rows: DataFrame, other: DataFrame, confidence: float, among: int = 0
) -> dict[str, float]:
    """NAME: milliseconds per token of the texts in `rows`, divided by those of the same texts in `other`."""
    ours, tokens = rows["total_latency_ms"], rows["generated_tokens"]
    return paired_columns(name, ours, tokens, other["total_latency_ms"], other["generated_tokens"], confidence, among)


def _joint_intervals(own: dict[str, DataFrame], peer: str, settings: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Of each contender's milliseconds per token divided by the peer's; they hold all at once."""
    order = [peer, *(name for name in own if name != peer)]
    tables = [own[name].loc[own[peer].index] for name in order]
    times, tokens = (
        [table[name].to_numpy(float) for table in tables] for name in ("total_latency_ms", "generated_tokens")
    )
    found = compare_jointly(times, tokens, **settings)
    if found is None:
        return dict.fromkeys(order, (math.nan, math.nan))
    speedups = {name: found.against_first(place) for place, name in enumerate(order)}
    return {name: (1 / high, 1 / low if low else math.inf) for name, (low, high) in speedups.items()}


def write_peers(results_dir: Path, *, confidence: float = 0.95, **settings: Any) -> list[Path]:
    """Summary and figure of `peers_requests.csv`: `peers.csv`, `figures/peers.png` and .svg; returns the paths.

    Who could not be raced is in `peers_run.json`, where it was written by this version.
    """
    requests = read_records(results_dir / "peers_requests.csv", PeerRecord, "specsplit bench --baseline")
    run = results_dir / "peers_run.json"
    left_out = read_run(run).get("left_out") if run.is_file() else None
    summary = summarize_peers(requests, left_out, confidence=confidence, **settings)
    figures = draw_peers(requests, summary, results_dir / "figures" / "peers.png", confidence=confidence)
    write_csv(summary, results_dir / "peers.csv")
    return [results_dir / "peers.csv", *figures]


def draw_peers(requests: DataFrame, summary: DataFrame, path: Path, *, confidence: float = 0.95) -> list[Path]:
    """Draw ITL and TTFT of every contender, and whole texts beside the fastest peer, as `path` .png and .svg.

    The fastest peer has the most tokens per second; the ratio's intervals hold for all contenders and peers at once.
    """
    table = median_over_repeats(requests, ("contender", "request_id"), "identical")
    summary = summary[summary["requests"] > 0]
    names = list(summary["contender"])
    peers = summary[(summary["engine"] != "specsplit") & summary["tokens_per_second"].notna()]
    best = "" if peers.empty else str(peers.sort_values("tokens_per_second", ascending=False)["contender"].iloc[0])
    with house_style():
        figure = new_figure(WIDTH_IN, ROW_IN * len(names) + 1.1)
        panels = figure.subplots(1, 3 if best else 2, sharey=True)
        for axes, metric, title in zip(
            panels, ("itl_ms", "ttft_ms"), ("Time between tokens", "Time to first token"), strict=False
        ):
            _draw_times(axes, table, summary, metric)
            axes.set(title=title, xlabel=f"{'ITL' if metric == 'itl_ms' else 'TTFT'} (ms)")
        if best:
            _draw_ratio(panels[2], summary, best)
        panels[0].set_yticks(range(len(names)), [_words(name) for name in names])
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        count = int(summary["requests"].max())
        text = f"Bars: medians; dots: {counted(count, 'request')}."
        if best:
            text += f" Ratio with its {confidence:.0%} interval, for all at once: left of 1 is faster than that peer."
        figure.supxlabel(text, fontsize=7, color="#555555")
        settle_layout(figure)
        return save_figure(figure, path, {"Title": "Ours beside other programs' decoding"})


def _draw_times(axes: Axes, table: DataFrame, summary: DataFrame, metric: str) -> None:
    for place, (_, row) in enumerate(summary.iterrows()):
        values = table.loc[table["contender"] == row["contender"], metric].dropna().to_numpy()
        axes.barh(place, row[f"{metric}_median"], height=0.66, color=_colour(row["engine"]), alpha=0.55, linewidth=0)
        axes.scatter(values, place + spread(np.arange(len(values)), 0.5), s=3, color=GREY, linewidths=0, zorder=3)
    axes.set_xlim(0, None)


def _draw_ratio(axes: Axes, summary: DataFrame, best: str) -> None:
    key = f"latency_vs_{best}"
    for place, (_, row) in enumerate(summary.iterrows()):
        colour = _colour(row["engine"])
        axes.hlines(
            place, row[f"latency_joint_low_{best}"], row[f"latency_joint_high_{best}"], color=colour, linewidth=1.4
        )
        axes.plot(row[key], place, marker="o" if row["engine"] == "specsplit" else "s", color=colour, markersize=4.5)
        axes.annotate(f"{row[key]:.2f}", (1.03, place), xycoords=("axes fraction", "data"), va="center", fontsize=7)
    axes.axvline(1, color="black", linestyle="--", linewidth=0.9)
    axes.set(title=f"Whole text / {_words(best)}", xlabel="ratio")
    axes.set_xlim(0, None)


def _colour(engine: str) -> str:
    return BLUE if engine == "specsplit" else ORANGE


def _words(name: str) -> str:
    for prefix, program in (("hf_", "HF "), ("llama_cpp", "llama.cpp")):
        if name.startswith(prefix):
            return program + name.removeprefix(prefix).replace("_", " ")
    mode, _, gamma = name.rpartition("gamma_")
    return "target alone" if name == "gamma_0" else f"{mode.strip('_').replace('_', ' ') or 'sync'}, γ = {gamma}"
