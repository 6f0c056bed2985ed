"""Throughput, latency and goodput against the number of clients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pandas import DataFrame

from specsplit.analysis.drawing import doubling_axis, house_style, new_figure, save_figure, series_style, settle_layout
from specsplit.analysis.reading import read_records
from specsplit.analysis.tables import quantiles
from specsplit.experiment.capacity import CapacityRecord
from specsplit.experiment.columns import FAILED
from specsplit.io import write_csv

LEVEL = ("mode", "gamma", "clients")
LIMIT_FACTOR = 2.0  # of the median ITL of one client, when no limit is given
WIDTH_IN, HEIGHT_IN = 6.8, 2.5


def summarize_capacity(requests: DataFrame, tpot_limit_ms: float | None = None) -> DataFrame:
    """One row a mode, gamma and number of clients; all but wall_s and the last column over requests that did not fail.

    mode, gamma, clients, requests, generated_tokens
    wall_s
        from the start of the first request to the end of the last one.
    tokens_per_second, gain
        all tokens / wall_s; that divided by what one client had at this mode and gamma.
    requests_per_second
    tpot_ms_median, _p90, _p99, and the same of ttft_ms, itl_ms and total_latency_ms
        over requests.
    tpot_limit_ms, goodput_share, goodput_tokens_per_second, goodput_requests_per_second
        the limit; of the requests with an ITL, the share that kept it; tokens and requests of those / wall_s.
        Without a limit it is LIMIT_FACTOR times the median ITL of one client in the first rows: of the target alone,
        if that was measured.
    queue_share
        of the latency of all requests, the part in which a worker computed for others.
    matches_single
        share of requests with the text that one client alone got.
    failed_requests
        rows with status failed.
    """
    limit = tpot_limit_ms
    rows: list[dict[str, Any]] = []
    alone: dict[tuple[Any, Any], dict[str, Any]] = {}
    for (mode, gamma, clients), own in requests.groupby(list(LEVEL), sort=False):
        ended = own["started_ms"] + own["total_latency_ms"]
        wall_s = float(ended.max() - own["started_ms"].min()) / 1e3
        failed = own["status"] == FAILED
        own = own[~failed]
        tokens = own["generated_tokens"].sum()
        row: dict[str, Any] = {"mode": mode, "gamma": gamma, "clients": clients, "requests": len(own)}
        row |= {"generated_tokens": int(tokens), "wall_s": wall_s, "tokens_per_second": tokens / wall_s}
        base = alone.setdefault((mode, gamma), row)
        row["gain"] = row["tokens_per_second"] / base["tokens_per_second"]
        row["requests_per_second"] = len(own) / wall_s
        for metric in ("tpot_ms", "ttft_ms", "itl_ms", "total_latency_ms"):
            row |= quantiles(own[metric], metric, (50, 90, 99))
        limit = limit or LIMIT_FACTOR * row["itl_ms_median"]
        timed = own[own["itl_ms"].notna()]
        good = timed[timed["itl_ms"] <= limit]
        row["tpot_limit_ms"] = limit
        row["goodput_share"] = len(good) / len(timed) if len(timed) else math.nan
        row["goodput_tokens_per_second"] = good["generated_tokens"].sum() / wall_s
        row["goodput_requests_per_second"] = len(good) / wall_s
        row["queue_share"] = own["queue_ms"].sum() / own["total_latency_ms"].sum()
        row["matches_single"] = own["matches_single"].astype("Float64").mean()
        row["failed_requests"] = int(failed.sum())
        rows.append(row)
    return DataFrame(rows)


def write_capacity(results_dir: Path, tpot_limit_ms: float | None = None) -> list[Path]:
    """Summary and figure of `capacity_requests.csv`: `capacity.csv`, `figures/capacity.png` and .svg."""
    requests = read_records(results_dir / "capacity_requests.csv", CapacityRecord, "specsplit capacity")
    summary = summarize_capacity(requests, tpot_limit_ms)
    figures = draw_capacity(summary, results_dir / "figures" / "capacity.png")
    write_csv(summary, results_dir / "capacity.csv")
    return [results_dir / "capacity.csv", *figures]


def draw_capacity(summary: DataFrame, path: Path) -> list[Path]:
    """Draw tokens/s, ITL (median and p90) and goodput against clients, as `path` .png and .svg."""
    with house_style():
        figure = new_figure(WIDTH_IN, HEIGHT_IN)
        speed, latency, good = figure.subplots(1, 3)
        curves = list(summary.groupby(["mode", "gamma"], sort=False))
        for place, ((mode, gamma), own) in enumerate(curves):
            style = series_style(place)
            name = "target alone" if gamma == 0 else f"{mode}, γ = {gamma}"
            x = own["clients"]
            speed.plot(x, own["tokens_per_second"], label=name, **style)
            one = own["tokens_per_second"].iloc[0]
            speed.plot(x, one * x / x.iloc[0], color=style["color"], linestyle=":", linewidth=0.8)
            latency.plot(x, own["itl_ms_median"], **style)
            latency.plot(x, own["itl_ms_p90"], linestyle="--", markerfacecolor="white", **style)
            good.plot(x, own["goodput_tokens_per_second"], **style)
        top = 1.15 * max(summary["tokens_per_second"])
        speed.set(title="Throughput", ylabel="tokens/s", ylim=(0, top))
        latency.set(title="ITL: median, p90 (hollow)", ylabel="ms", ylim=(0, None))
        good.set(title="Goodput: ITL within its limit", ylabel="tokens/s", ylim=(0, top))
        latency.axhline(summary["tpot_limit_ms"].iloc[0], color="black", linestyle=":", linewidth=0.8)
        for axes in (speed, latency, good):
            doubling_axis(axes, summary["clients"], "clients")
        speed.plot([], [], color="black", linestyle=":", linewidth=0.8, label="ideal, or the ITL limit")
        figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        settle_layout(figure)
        return save_figure(figure, path, {"Title": "Capacity against the number of clients"})
