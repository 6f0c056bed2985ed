"""Throughput, latency and goodput against the load: clients of a closed loop, or requests that arrive at a rate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from pandas import DataFrame, Series

from specsplit.analysis.costs import with_price
from specsplit.analysis.drawing import doubling_axis, house_style, new_figure, save_figure, series_style, settle_layout
from specsplit.analysis.measures import paired_columns, quantiles, ratio
from specsplit.analysis.reading import read_records
from specsplit.experiment.capacity import GOOD_SHARE, LIMIT_FACTOR, CapacityRecord
from specsplit.experiment.columns import FAILED
from specsplit.io import write_csv
from specsplit.provenance.facts import beside_run, read_run
from specsplit.settings.measure import CLOSED, PriceSettings

LOAD = ("arrivals", "clients", "rate")
LEVEL = ("mode", "gamma", *LOAD)
TEXT = ["request_id", "repeat"]
WIDTH_IN, HEIGHT_IN = 6.8, 2.5


def summarize_capacity(
    requests: DataFrame,
    tpot_limit_ms: float | None = None,
    ttft_limit_ms: float | None = None,
    *,
    confidence: float = 0.95,
) -> DataFrame:
    """One row a mode, gamma and load.

    mode, gamma, arrivals, clients, rate
        clients: of a closed loop, 0 in an open one; rate: requests per second that arrive in an open loop.
    requests, generated_tokens, wall_s
        requests that did not fail and their tokens; from the first start to the last end, failed ones included.
    window_s, concurrency
        In a closed loop, the steady window: from when every client has ended its first request to when the first one
        has no more. In an open loop, all of wall_s. Concurrency: requests under way, on average over the window.
    tokens_per_second, requests_per_second
        of what was written in the window; a request that is partly in it counts by that part of its time.
    gain
        of a closed loop: how long one client alone takes for the same work, per second of the window, against the same
        of one client. N clients that do not disturb each other have N.
    tpot_ms_median, _p90, _p99, and the same of ttft_ms, itl_ms and total_latency_ms
        over requests. In an open loop ttft_ms and total_latency_ms are since the request was due.
    lag_ms_max
        in an open loop, how late a request started: the client was behind its own schedule.
    tpot_limit_ms, ttft_limit_ms, goodput_share, goodput_tokens_per_second, goodput_requests_per_second, kept_up
        limits of ITL and TTFT; the share of all requests that kept both, failed ones in the denominator; their tokens
        and number per second; whether the share is at least GOOD_SHARE. A limit that is not given is LIMIT_FACTOR
        times the median of one client in the first rows: of the target alone, if that was measured.
    speedup_at_load, _ci_low, _ci_high, _joint_low, _joint_high
        latency of the target alone (gamma 0, any mode) at the same load, divided by this one's, paired by prompt,
        over prompts that finished on both sides; empty where the target alone was not measured at this load. The joint
        interval holds for all rows at once.
    queue_share
        of the latency of all requests, the part in which a worker computed for others.
    matches_single
        share of requests with the text that one client alone got.
    failed_requests
        rows with status failed.
    """
    requests = requests.assign(
        arrivals=requests["arrivals"].fillna(CLOSED), due_ms=requests["due_ms"].fillna(requests["started_ms"])
    )
    lag = requests["started_ms"] - requests["due_ms"]
    requests = requests.assign(
        lag_ms=lag, ttft_ms=requests["ttft_ms"] + lag, total_latency_ms=requests["total_latency_ms"] + lag
    )
    levels: dict[Any, DataFrame] = {
        (mode, gamma, arrivals, clients, None if own["rate"].isna().all() else rate): own
        for (mode, gamma, arrivals, clients, rate), own in requests.groupby(list(LEVEL), sort=False, dropna=False)
    }
    first = next(iter(levels.values()))
    limits = {
        name: given or LIMIT_FACTOR * float(first[name].median())
        for name, given in (("itl_ms", tpot_limit_ms), ("ttft_ms", ttft_limit_ms))
    }
    targets = {level[2:]: own for level, own in levels.items() if level[1] == 0}
    drafted = sum(level[1] != 0 and level[2:] in targets for level in levels)
    rows = []
    singles: dict[Any, tuple[DataFrame, float]] = {}
    for level, own in levels.items():
        one = singles.setdefault(level[:2], (own, _work(own, own)))  # one client comes first
        target = targets.get(level[2:]) if level[1] != 0 else None
        fine = own["status"] != FAILED
        kept = fine.copy()
        for name, limit in limits.items():
            kept &= ~(own[name] > limit)  # a text of one burst has no ITL, and keeps its limit
        window_s, inside = _window(own)
        share = (inside / own["total_latency_ms"]).where(fine, 0.0)
        row = {
            **dict(zip(LEVEL, level, strict=True)),
            "requests": int(fine.sum()),
            "generated_tokens": int(own.loc[fine, "generated_tokens"].sum()),
            "wall_s": float((own["due_ms"] + own["total_latency_ms"]).max() - own["due_ms"].min()) / 1e3,
            "window_s": window_s,
            "concurrency": float(inside.sum()) / 1e3 / window_s,
            "tokens_per_second": float((share * own["generated_tokens"]).sum()) / window_s,
            "gain": math.nan if level[2] != CLOSED else _work(own, one[0]) / one[1],
            "requests_per_second": float(share.sum()) / window_s,
        }
        for metric in ("tpot_ms", "ttft_ms", "itl_ms", "total_latency_ms"):
            row |= quantiles(own.loc[fine, metric], metric, (50, 90, 99))
        row["lag_ms_max"] = float(own["lag_ms"].max()) if row["arrivals"] != CLOSED else math.nan
        row |= {"tpot_limit_ms": limits["itl_ms"], "ttft_limit_ms": limits["ttft_ms"]}
        row["goodput_share"] = float(kept.mean())
        row["goodput_tokens_per_second"] = float((share * own["generated_tokens"])[kept].sum()) / window_s
        row["goodput_requests_per_second"] = float(share[kept].sum()) / window_s
        row["kept_up"] = bool(row["goodput_share"] >= GOOD_SHARE)
        row |= _speedup(own, target, confidence, drafted)
        row["queue_share"] = ratio(*own.loc[fine, ["queue_ms", "total_latency_ms"]].sum())
        row["matches_single"] = own["matches_single"].astype("Float64").mean()
        row["failed_requests"] = int((~fine).sum())
        rows.append(row)
    return DataFrame(rows).astype({"rate": float})


def _window(own: DataFrame) -> tuple[float, Series]:
    """Seconds of the window of one load, and how many milliseconds of each request are in it."""
    begun, ended = own["due_ms"], own["due_ms"] + own["total_latency_ms"]
    start, end = float(begun.min()), float(ended.max())
    if own["arrivals"].iloc[0] == CLOSED:
        of_clients = ended.groupby(own["client"])
        steady = float(of_clients.min().max()), float(of_clients.max().min())
        # Tables of few requests a client may have no such time; then all of it counts.
        start, end = steady if steady[1] > steady[0] else (start, end)
    return (end - start) / 1e3, (ended.clip(upper=end) - begun.clip(lower=start)).clip(lower=0.0)


def _work(own: DataFrame, alone: DataFrame) -> float:
    """Seconds that one client needs for what was written in the window of a load, per second of it."""
    window_s, inside = _window(own)
    fine = (own["status"] != FAILED).to_numpy()
    weights = np.where(fine, inside / own["total_latency_ms"], 0.0)
    single = alone[alone["status"] != FAILED].set_index(TEXT)["total_latency_ms"]
    seconds = single.reindex(list(zip(own["request_id"], own["repeat"], strict=True))).to_numpy(float) / 1e3
    known = ~np.isnan(seconds)
    if not weights[known].sum():
        return math.nan
    # Requests that one client did not finish count as the others on average.
    return float((weights * seconds)[known].sum() / window_s * weights.sum() / weights[known].sum())


def _speedup(own: DataFrame, target: DataFrame | None, confidence: float, among: int) -> dict[str, float]:
    name = "speedup_at_load"
    if target is None:
        unknown = [math.nan]
        return paired_columns(name, unknown, unknown, unknown, unknown, confidence, among=1)
    sides = [table[table["status"] != FAILED].set_index(TEXT)["total_latency_ms"] for table in (target, own)]
    both = sides[0].index.intersection(sides[1].index)
    theirs, ours = (side.loc[both].groupby(level="request_id").sum() for side in sides)
    ones = np.ones(len(ours))
    return paired_columns(name, theirs, ones, ours, ones, confidence, among)


def capacity_sentences(summary: DataFrame) -> list[str]:
    """What the table says in words: up to which load speculation pays, and which rate the workers sustain.

    Nothing of a table of an earlier version, which lacks what they rest on.
    """
    if not {"speedup_at_load_joint_low", "kept_up", "rate"} <= set(summary.columns):
        return []
    return [*_crossings(summary), *_saturation(summary)]


def _crossings(summary: DataFrame) -> list[str]:
    said = []
    drafted = summary[summary["speedup_at_load"].notna()]
    for (mode, gamma), own in drafted.groupby(["mode", "gamma"], sort=False):
        for unit, loads in (("clients", own[own["rate"].isna()]), ("requests/s", own[own["rate"].notna()])):
            if loads.empty:
                continue
            axis = "clients" if unit == "clients" else "rate"
            verdicts: dict[str, list[str]] = {}
            rows: list[Any] = loads.sort_values(axis).to_dict("records")
            for row in rows:
                low, high = row["speedup_at_load_joint_low"], row["speedup_at_load_joint_high"]
                verdict = "pays" if low > 1 else "costs" if high < 1 else "makes no difference that can be told"
                verdict = "cannot be told from few prompts" if math.isnan(low) else verdict
                verdicts.setdefault(verdict, []).append(f"{row[axis]:.3g} ({row['speedup_at_load']:.2f})")
            parts = [f"{verdict} at {', '.join(at)}" for verdict, at in verdicts.items()]
            said.append(f"Drafting with gamma {gamma} ({mode}) {'; it '.join(parts)} {unit} (speedup at equal load).")
    return said


def _saturation(summary: DataFrame) -> list[str]:
    said = []
    for (mode, gamma), own in summary[summary["rate"].notna()].groupby(["mode", "gamma"], sort=False):
        kept, lost = own.loc[own["kept_up"], "rate"], own.loc[~own["kept_up"], "rate"]
        name = "The target alone" if gamma == 0 else f"Gamma {gamma} ({mode})"
        if (lost < kept.max()).any():
            rates = [", ".join(f"{rate:.3g}" for rate in sorted(some)) for some in (kept, lost)]
            said.append(f"{name} kept the limits at {rates[0]} requests/s and not at {rates[1]}: no rate bounds them.")
        elif kept.empty:
            said.append(f"{name} kept the limits at none of the rates, from {lost.min():.3g} requests/s on.")
        elif lost.empty:
            said.append(f"{name} kept the limits up to {kept.max():.3g} requests/s, the highest rate measured.")
        else:
            said.append(f"{name} sustains {kept.max():.3g} requests/s within the limits, and not {lost.min():.3g}.")
    return said


def write_capacity(
    results_dir: Path,
    tpot_limit_ms: float | None = None,
    ttft_limit_ms: float | None = None,
    *,
    confidence: float = 0.95,
    prices: PriceSettings | None = None,
) -> list[Path]:
    """Summary, with the price of `with_price`, and figure of `capacity_requests.csv`: `capacity.csv`,
    `figures/capacity.png` and .svg."""
    rows = results_dir / "capacity_requests.csv"
    requests = read_records(rows, CapacityRecord, "specsplit capacity")
    if beside_run(rows).is_file():
        read_run(beside_run(rows))
    summary = summarize_capacity(requests, tpot_limit_ms, ttft_limit_ms, confidence=confidence)
    summary = with_price(summary, prices or PriceSettings())
    figures = draw_capacity(summary, results_dir / "figures" / "capacity.png")
    write_csv(summary, results_dir / "capacity.csv")
    return [results_dir / "capacity.csv", *figures]


def draw_capacity(summary: DataFrame, path: Path) -> list[Path]:
    """Draw tokens/s, ITL (median and p90) and goodput against clients, and against the rate of requests where an open
    loop was measured, as `path` .png and .svg."""
    closed, opened = summary[summary["rate"].isna()], summary[summary["rate"].notna()]
    loads = [(closed, "clients")] + ([] if opened.empty else [(opened.sort_values("rate"), "rate")])
    with house_style():
        figure = new_figure(WIDTH_IN, HEIGHT_IN * len(loads))
        grid = figure.subplots(len(loads), 3, squeeze=False)
        top = 1.15 * max(summary["tokens_per_second"]) or 1  # nothing was written
        for (speed, latency, good), (rows, x) in zip(grid, loads, strict=True):
            for place, ((mode, gamma), own) in enumerate(rows.groupby(["mode", "gamma"], sort=False)):
                style = series_style(place)
                name = "target alone" if gamma == 0 else f"{mode}, γ = {gamma}"
                speed.plot(own[x], own["tokens_per_second"], label=name, **style)
                if x == "clients":
                    ideal = own["tokens_per_second"].iloc[0] * own[x] / own[x].iloc[0]
                    speed.plot(own[x], ideal, color=style["color"], linestyle=":", linewidth=0.8)
                latency.plot(own[x], own["itl_ms_median"], **style)
                latency.plot(own[x], own["itl_ms_p90"], linestyle="--", markerfacecolor="white", **style)
                good.plot(own[x], own["goodput_tokens_per_second"], **style)
            speed.set(title="Throughput", ylabel="tokens/s", ylim=(0, top))
            latency.set(title="ITL: median, p90 (hollow)", ylabel="ms", ylim=(0, None))
            good.set(title="Goodput: within the limits", ylabel="tokens/s", ylim=(0, top))
            latency.axhline(summary["tpot_limit_ms"].iloc[0], color="black", linestyle=":", linewidth=0.8)
            for axes in (speed, latency, good):
                if x == "clients":
                    doubling_axis(axes, rows[x], x)
                else:
                    axes.set(xlabel="requests/s", xlim=(0, None))
        first = grid[0][0]
        first.plot([], [], color="black", linestyle=":", linewidth=0.8, label="ideal, or the ITL limit")
        figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        settle_layout(figure)
        return save_figure(figure, path, {"Title": "Capacity against the load"})
