"""Where a round's time goes: models, queues, network, the rest of the workers, the orchestrator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from pandas import DataFrame, Series

from specsplit.analysis.configurations import configuration_of, keys_of, varied
from specsplit.analysis.drawing import house_style, new_figure, save_figure, settle_layout
from specsplit.analysis.measures import quantiles
from specsplit.analysis.merging import read_tables
from specsplit.analysis.tables import comparable
from specsplit.experiment.sweep import Point
from specsplit.io import write_csv

# Part of a round -> what a figure calls it, and its colour.
PARTS = {
    "verify_compute_ms": ("verify compute", "#0072B2"),
    "draft_compute_ms": ("draft compute", "#E69F00"),
    "verify_queue_ms": ("verify queue", "#56B4E9"),
    "draft_queue_ms": ("draft queue", "#F0E442"),
    "network_ms": ("network", "#D55E00"),
    "worker_ms": ("rest of the workers", "#CC79A7"),
    "orchestrator_ms": ("orchestrator", "#8C8C8C"),
}
_SHOWN = tuple(field.name for field in fields(Point))  # in the name of a run folder
WIDTH_IN, ROW_IN, MOST_BARS = 6.8, 0.24, 24


def round_parts(rounds: DataFrame, texts: list[str]) -> DataFrame:
    """Every round's time split up: round_ms and one column for each of PARTS, which add up to it.

    rounds: columns of `Round`, the rounds of a text in order. texts: columns that tell one text from another.

    round_ms is the time from the tokens of the round before to its own, in the first round from the start of the
    request. Of model time only what the round waited for counts: a draft made ahead costs it nothing, and
    hidden_ms says how long that was. worker_ms is what is left of the calls: work of the workers beside model and
    queue. orchestrator_ms is the time between the calls.
    """
    before = rounds.groupby(texts, sort=False)["arrived_ms"].shift().fillna(0.0)
    whole = rounds["arrived_ms"] - before
    parts: dict[str, Any] = {"round_ms": whole, "hidden_ms": 0.0}
    rest = Series(0.0, index=rounds.index)
    for role in ("draft", "verify"):
        wall, compute = rounds[f"{role}_wall_ms"], rounds[f"{role}_compute_ms"]
        waited = np.minimum(compute, wall)
        queued = np.minimum(rounds[f"{role}_queue_ms"], wall - waited)
        parts |= {f"{role}_compute_ms": waited, f"{role}_queue_ms": queued}
        parts["hidden_ms"] += compute - waited
        rest += wall - waited - queued
    parts["network_ms"] = np.minimum(rounds["network_ms"], rest)
    parts["worker_ms"] = rest - parts["network_ms"]
    parts["orchestrator_ms"] = np.maximum(0.0, whole - rounds["draft_wall_ms"] - rounds["verify_wall_ms"])
    return DataFrame(parts)


def profile(rounds: DataFrame) -> DataFrame:
    """Two rows a configuration: its first rounds (`phase` prefill) and all others (`phase` decode).

    rounds: as `merge_runs` or `read_tables` give them. Columns: those of a configuration, phase, rounds,
    tokens_per_round, round_ms_median, round_ms_p99, then means: round_ms, each of PARTS and hidden_ms (of a round), and
    ms_per_token (round_ms / tokens_per_round). A phase without a round has no row.
    """
    parts = round_parts(rounds, [*keys_of(rounds), "request_id", "repeat"])
    rows = []
    for _, own in rounds.groupby(configuration_of(rounds), sort=False):
        for phase, chosen in (("prefill", own["round"] == 1), ("decode", own["round"] > 1)):
            if not chosen.any():
                continue
            mine = parts.loc[own.index[chosen]]
            tokens = float((own.loc[chosen, "accepted"] + 1).mean())
            row: dict[str, Any] = {name: own[name].iloc[0] for name in keys_of(rounds)}
            row |= {"phase": phase, "rounds": len(mine), "tokens_per_round": tokens}
            row |= quantiles(mine["round_ms"], "round_ms", (50, 99))
            row |= {name: float(mine[name].mean()) for name in ("round_ms", *PARTS, "hidden_ms")}
            row["ms_per_token"] = row["round_ms"] / tokens
            rows.append(row)
    return DataFrame(rows)


def draw_profile(table: DataFrame, path: Path) -> list[Path]:
    """Draw the decode rows of `profile`, stacked bars of a round and of a token, as `path` .png and .svg."""
    table = table[table["phase"] == "decode"].reset_index(drop=True)
    told = [name for name in keys_of(table) if name in _SHOWN or table[name].nunique() > 1]
    names = [bar_label(row, told) for _, row in table.iterrows()][:MOST_BARS]
    shown = table.iloc[: len(names)]
    with house_style():
        figure = new_figure(WIDTH_IN, ROW_IN * len(names) + 1.3)
        by_round, by_token = figure.subplots(1, 2, sharey=True)
        for axes, scale in ((by_round, 1.0), (by_token, 1 / shown["tokens_per_round"])):
            left = np.zeros(len(shown))
            for part, (label, colour) in PARTS.items():
                width = (shown[part] * scale).to_numpy()
                axes.barh(range(len(shown)), width, left=left, height=0.72, color=colour, label=label, linewidth=0)
                left += width
            axes.set_xlim(0, None)
        by_round.set(title="Time of a round", xlabel="ms, mean over rounds but the first of each text")
        by_token.set(title="Time of a token", xlabel="ms, the same divided by tokens per round")
        by_round.set_yticks(range(len(names)), names)
        by_round.set_ylim(len(names) - 0.5, -0.5)
        more = f"{len(names)} of {len(table)} shown; all are in profile.csv" if len(table) > len(names) else None
        handles = by_round.get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4, title=more, title_fontsize=7)
        settle_layout(figure)
        return save_figure(figure, path, {"Title": "Where a round's time goes"})


def write_profile(results_dir: Path) -> tuple[list[Path], DataFrame]:
    """`profile.csv` and its figure from the tables of a sweep; the paths, and the means that a person reads first."""
    table = profile(comparable(*read_tables(results_dir))[1])
    figures = draw_profile(table, results_dir / "figures" / "profile.png")
    write_csv(table, results_dir / "profile.csv")
    shown = table.loc[table["phase"] == "decode", [*varied(table), "rounds", "round_ms", *PARTS, "ms_per_token"]]
    return [*figures, results_dir / "profile.csv"], shown


def bar_label(row: Series, told: Sequence[str]) -> str:
    """What a configuration is called: its run folder, with what else varies: no two configurations have one label."""
    others = [f"{name} {row[name]}" for name in told if name not in _SHOWN]
    return ", ".join([Point(**{name: row[name] for name in _SHOWN}).label, *others])


def summarize_overhead(rounds: DataFrame) -> DataFrame:
    """What a round costs beyond model time: one row a mode and gamma, from `measure_overhead`.

    rounds (number, without the first of each text), round_ms_median, _p99, model_ms_median, overhead_ms_median, _p90,
    _p99: round_ms, what of it a model computed, and the rest; network_ms_median, worker_ms_median,
    orchestrator_ms_median, queue_ms_median: of the rest; bare_grpc_ms: median of a bare gRPC message and its answer,
    of which a round has one at gamma 0 and two or more with a draft.
    """
    parts = round_parts(rounds, ["mode", "gamma", "text"])
    parts = parts.assign(
        model_ms=parts["draft_compute_ms"] + parts["verify_compute_ms"],
        queue_ms=parts["draft_queue_ms"] + parts["verify_queue_ms"],
    )
    parts["overhead_ms"] = parts["round_ms"] - parts["model_ms"]
    rows = []
    later = rounds["round"] > 1
    for (mode, gamma), own in rounds[later].groupby(["mode", "gamma"], sort=False):
        mine = parts.loc[own.index]
        row: dict[str, Any] = {"mode": mode, "gamma": gamma, "rounds": len(own)}
        for name, percents in (("round_ms", (50, 99)), ("model_ms", (50,)), ("overhead_ms", (50, 90, 99))):
            row |= quantiles(mine[name], name, percents)
        for name in ("network_ms", "worker_ms", "queue_ms", "orchestrator_ms"):
            row |= quantiles(mine[name], name, (50,))
        row["bare_grpc_ms"] = float(own["bare_grpc_ms"].iloc[0])
        rows.append(row)
    return DataFrame(rows)
