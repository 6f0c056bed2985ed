"""What each run measured beside its own configuration (`reference.csv`), and comparisons with it.

A run measures the target alone and other baselines in turn with its own requests. So a speedup is a ratio of times that
were taken side by side: what drifts on the machine between the runs of a sweep is in neither. How much the target alone
differs between runs says how much that was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame, Series

from specsplit.analysis.configurations import NETWORK, conditions_of, configuration_of, row_of, sort_rows, tuples
from specsplit.analysis.measures import interval_columns, paired_columns, ratio
from specsplit.analysis.reading import read_csv_file
from specsplit.analysis.series import series_of
from specsplit.errors import UserError, listed
from specsplit.experiment.columns import COLOCATED, OK, STREAMED, WORKERS, ReferenceRecord
from specsplit.settings.axes import SERIES

REFERENCE = "reference.csv"
GAMMA0, STREAM, PAIR = "gamma0", "streamed", "colocated"
# What is compared with -> the speedup against it in the summary. In tables of requests <name>_ms and <name>_tokens are
# its milliseconds and tokens on each request.
BASES = {GAMMA0: "speedup", STREAM: "speedup_over_streamed", PAIR: "speedup_over_colocated"}
_SETUPS = {GAMMA0: WORKERS, STREAM: STREAMED, PAIR: COLOCATED}
_TURN = ["run", "request_id", "repeat"]
MOST_DRIFT = 0.1  # of the target alone between the runs of a sweep; above it a reader is warned

_TYPES = {field.name: str(field.type) for field in fields(ReferenceRecord)}
_RUN = {
    f"run_{name}": name for name in ("gamma", "mode", "tree", "draft")
}  # what a baseline may not share with its run
_MERGED_TYPES = {
    **_TYPES,
    **{column: _TYPES[name] for column, name in _RUN.items()},
    "matches_gamma0": "bool | None",
    SERIES: "int | None",
}
_MADE_BY = "`specsplit bench` or the workflow's benchmark rule writes it"


def merge_references(run_dirs: Sequence[Path], series: Mapping[str, int] | None = None) -> DataFrame:
    """The rows of `reference.csv` of the runs that have one, each with the configuration of its run (`run_gamma`, ...).

    series: of each run folder, where they were kept apart.

    Raises UserError when a file is malformed, or does not hold each setup once for each request of its run.
    """
    tables = []
    for run in run_dirs:
        path = Path(run) / REFERENCE
        if not path.exists():  # of an earlier version
            continue
        table = read_csv_file(path, _TYPES, _MADE_BY)
        own = read_csv_file(
            path.with_name("requests.csv"), {name: _TYPES[name] for name in _TYPES if name != "setup"}, ""
        )
        wanted = set(tuples(own[["request_id", "repeat"]]))
        for setup, rows in table.groupby("setup", sort=False):
            keys = list(tuples(rows[["request_id", "repeat"]]))
            if setup not in _SETUPS.values() or len(keys) != len(wanted) or set(keys) != wanted:
                raise UserError(
                    f"{path}: its rows of {setup} are not those of the requests in requests.csv, each once: the two "
                    "files are of different runs; make that run again"
                )
        for column, name in _RUN.items():
            table[column] = Series([own[name].iloc[0]] * len(table), index=table.index, dtype=own[name].dtype)
        if series:
            table[SERIES] = series[str(run)]
        tables.append(table)
    empty = DataFrame({name: [] for name in _MERGED_TYPES if name not in ("matches_gamma0", SERIES)})
    return sort_rows(pd.concat(tables)) if any(len(table) for table in tables) else empty


def merged_references(run_dirs: Sequence[Path], requests: DataFrame) -> DataFrame | None:
    """What `results/reference.csv` holds; None when no run has such a file. requests: of `merge_runs`."""
    if not any((Path(run) / REFERENCE).exists() for run in run_dirs):
        return None
    series = series_of(run_dirs, keep_apart=True) if SERIES in requests else None
    reference = merge_references(run_dirs, series)
    return reference.assign(matches_gamma0=matches_alone(reference, texts_alone(requests, reference)))


def read_references(results_dir: Path) -> DataFrame:
    """The merged `reference.csv` of a results folder; without rows when there is none. Raises UserError."""
    path = results_dir / REFERENCE
    if not path.exists():
        return DataFrame({name: [] for name in _MERGED_TYPES if name != SERIES})
    table = read_csv_file(path, _MERGED_TYPES, "`specsplit merge` or the workflow makes it")
    return table.drop(columns=SERIES) if table[SERIES].isna().all() else table


def texts_alone(*tables: DataFrame) -> dict[Any, str]:
    """The hash of the text of the target alone, by request and way to choose tokens; that of an earlier table first.

    The network does not change a text: where several networks have a gamma 0, the first one counts.
    """
    alone: dict[Any, str] = {}
    for table in tables:
        setups = table["setup"] if "setup" in table else Series(WORKERS, index=table.index)
        rows = table[(table["gamma"] == 0) & (table["status"] == OK) & (setups == WORKERS)]
        for text, found in zip(_texts(rows), rows["output_sha256"], strict=True):
            alone.setdefault(text, found)
    return alone


def matches_alone(table: DataFrame, alone: dict[Any, str]) -> Series:
    """Whether each text is that of the target alone; unknown where `merge_runs` says."""
    expected = _texts(table).map(lambda text: alone.get(text))
    matches = (table["output_sha256"] == expected).astype("boolean")
    random = (table["sampling"] == "rejection") & (table["temperature"] > 0)
    return matches.mask(expected.isna() | random | (table["status"] != OK))


def _texts(table: DataFrame) -> Series:
    return tuples(table[["request_id"]].assign(conditions=conditions_of(table)))


def with_references(requests: DataFrame, reference: DataFrame | None = None) -> DataFrame:
    """The requests with what was measured beside each, and the baselines as rows of their own (`setup`).

    reference: of `read_references`. Columns <base>_ms and <base>_tokens for each of BASES: of the same request and
    repeat in the same `run`; empty where that failed or was not measured. A run that measured no gamma 0 (`paired` is
    False) has that of the sweep, on the same network. Baselines: `colocated` of each configuration; `target_streamed`
    of the run of gamma 0 of each network and choice of tokens, or of the first run. A table with these columns is
    returned as it is.
    """
    if "setup" in requests:
        return requests
    requests = requests.assign(setup=WORKERS, run=configuration_of(requests))
    measured = {GAMMA0: requests[requests["gamma"] == 0]}
    if reference is not None and len(reference):
        own = reference.drop(columns=list(_RUN.values())).rename(columns=_RUN)
        reference = reference.assign(run=configuration_of(own))
        if stray := set(tuples(reference[_TURN])) - set(tuples(requests[_TURN])):
            names = listed(sorted(str(key[1]) for key in stray))
            raise UserError(f"{REFERENCE}: has requests that requests.csv lacks: {names}; merge the runs again")
        for base, setup in _SETUPS.items():
            beside = reference[reference["setup"] == setup]
            measured[base] = pd.concat([measured[base], beside]) if base in measured else beside
        requests = pd.concat([requests, _baseline_rows(requests, reference)])
    requests = requests.reset_index(drop=True)
    turns = tuples(requests[_TURN])
    measured = {base: rows[rows["status"] == OK] for base, rows in measured.items()}
    requests["paired"] = requests["run"].isin(set(measured[GAMMA0]["run"]))
    # Of a run without a gamma 0 of its own, that of the sweep.
    places = tuples(requests[_TURN[1:]].assign(conditions=conditions_of(requests, *NETWORK)))
    alone = requests[(requests["gamma"] == 0) & (requests["setup"] == WORKERS)]
    elsewhere = dict(zip(places[alone.index], turns[alone.index], strict=True))
    for base in BASES:
        rows = measured.get(base, requests[:0])
        turn = turns.where(requests["paired"], places.map(elsewhere)) if base == GAMMA0 else turns
        for unit, column in (("ms", "total_latency_ms"), ("tokens", "generated_tokens")):
            values = dict(zip(tuples(rows[_TURN]), rows[column], strict=True))
            requests[f"{base}_{unit}"] = turn.map(values).astype(float)
    texts = requests[:0] if reference is None else reference
    matches = texts["matches_gamma0"].astype("boolean")
    counts = {"compared": matches.notna(), "same": matches.fillna(False), "failed": texts["status"] != OK}
    ours = requests["setup"] == WORKERS
    for name, counted in counts.items():
        found = dict(counted.astype(int).groupby(tuples(texts[_TURN])).sum()) if len(texts) else {}
        requests[f"beside_{name}"] = turns.where(ours).map(found).fillna(0).astype(int)
    return requests


def _baseline_rows(requests: DataFrame, reference: DataFrame) -> DataFrame:
    """The rows of the reference that stand for themselves, with the columns of requests."""
    chosen = reference["setup"] == COLOCATED
    streamed = reference[reference["setup"] == STREAMED]
    for _, own in streamed.groupby(conditions_of(streamed, *NETWORK), sort=False):
        of_gamma0 = own[own["run_gamma"] == 0]
        run = (of_gamma0 if len(of_gamma0) else own)["run"].iloc[0]
        chosen |= (reference["setup"] == STREAMED) & reference["run"].isin([run])
    rows = reference[chosen]
    ok = (rows["status"] == OK).groupby(configuration_of(rows, row_of(rows)), sort=False).transform("any")
    return rows.loc[ok.astype(bool), list(requests)]


def lacks_reference(requests: DataFrame) -> Series:
    """Where something failed that was measured beside other requests of the same configuration."""
    lacking = Series(False, index=requests.index)
    configurations = configuration_of(requests, row_of(requests))
    for base in BASES:
        has = requests[f"{base}_ms"].notna()
        lacking |= ~has & has.groupby(configurations, sort=False).transform("any").astype(bool)
    return lacking


def is_base(row: tuple[Any, ...], base: str) -> bool:
    """Whether a row (its tuple of row_of) is what a speedup is against."""
    return row[-1] == _SETUPS[base] and (row[0] == 0 or base == PAIR)


def speedup_columns(
    own: DataFrame, base: str, confidence: float, joint: Mapping[str, tuple[float, float]], itself: bool
) -> dict[str, float]:
    """The speedup of one row against `base`, measured beside it, and its intervals.

    joint: base -> the interval that holds for all rows at once. itself: the row is the base, so its speedup is 1.
    """
    name, times, tokens = BASES[base], own[f"{base}_ms"], own[f"{base}_tokens"]
    if itself and times.notna().all() and len(own):
        row = {name: 1.0, **interval_columns(name, (1.0, 1.0))}
    else:
        row = paired_columns(name, times, tokens, own["total_latency_ms"], own["generated_tokens"], confidence)
    held = joint.get(base) if own["setup"].eq(WORKERS).all() else None
    return row | interval_columns(name, held or (math.nan, math.nan), "joint")


def reference_columns(all_own: DataFrame, own: DataFrame, drifted: bool | None) -> dict[str, Any]:
    """Of one row: the target alone of its run, and whether the texts measured beside it are those of gamma 0."""
    alone = own[own["paired"]] if own["setup"].eq(WORKERS).all() else own[:0]
    compared = all_own["beside_compared"].sum()
    return {
        "reference_ms_per_token": ratio(alone[f"{GAMMA0}_ms"].sum(), alone[f"{GAMMA0}_tokens"].sum()),
        "reference_drift": math.nan,
        "reference_drifted": drifted,
        "baselines_lossless": ratio(all_own["beside_same"].sum(), compared),
        "baselines_compared": int(compared),
        "baselines_failed": int(all_own["beside_failed"].sum()),
    }


def with_drift(summary: DataFrame) -> DataFrame:
    """The summary with `reference_drift`: each run's target alone over the median of those on the same network, -1."""
    times = summary["reference_ms_per_token"]
    usual = times.groupby(conditions_of(summary, *NETWORK), sort=False).transform("median")
    return summary.assign(reference_drift=times / usual - 1)
