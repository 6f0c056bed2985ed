"""Which runs may stand in one table: those whose recorded facts agree. Others are refused, or kept apart as series."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pandas import DataFrame

from specsplit.analysis.configurations import configuration_of
from specsplit.io import read_json_object
from specsplit.provenance.facts import (
    beside_facts,
    beside_run,
    differences,
    read_facts,
    read_run,
    refuse_differences,
    told_apart,
)
from specsplit.settings.axes import SERIES, SWEPT

KEEP_APART = (
    "Run again what does not belong, or take its folder out; to have them in one table as series that are never "
    "compared: specsplit merge --keep-apart, or keep_apart in the configuration"
)


def series_of(run_dirs: Sequence[Path], keep_apart: bool) -> dict[str, int]:
    """The series of each run folder, from 1; empty when all runs agree. Raises UserError when they do not and are not
    to be kept apart."""
    facts = {str(run): read_facts(Path(run)) for run in run_dirs}
    if not keep_apart:
        refuse_differences(facts, KEEP_APART)
    series = told_apart(facts)
    return series if len(set(series.values())) > 1 else {}


def check_joined(results_dir: Path, requests: DataFrame) -> None:
    """Refuse merged tables whose runs, in `results_dir`/runs, do not agree and were not kept apart.

    Folders of configurations that the tables do not have are not of this sweep.
    """
    facts = _facts_of_runs(results_dir, requests)
    if SERIES not in requests:
        refuse_differences(facts, KEEP_APART)


def check_beside(results_dir: Path, requests: DataFrame, name: str) -> None:
    """Refuse a table beside the sweep, `results_dir`/NAME.csv, that was measured on something else than the runs.

    With series that were kept apart it must fit one of their runs. Without a NAME_run.json nothing is known of it.
    """
    table = results_dir / f"{name}.csv"
    path = beside_run(table)
    if not path.is_file():
        return
    own, runs = beside_facts(read_run(path)), _facts_of_runs(results_dir, requests)
    if SERIES in requests and any(not differences({"": own, run: facts}) for run, facts in runs.items()):
        return
    shared = {run: {fact: facts[fact] for fact in facts if fact in own} for run, facts in runs.items()}
    mend = f"Delete {path} and {table}: the workflow measures again what it is asked for, and a report goes without it"
    refuse_differences({**shared, str(table): own}, mend)


def _facts_of_runs(results_dir: Path, requests: DataFrame) -> dict[str, dict[str, Any]]:
    """The facts of the runs of merged tables, by their folders."""
    wanted = set(configuration_of(requests))
    facts = {}
    for run in sorted((results_dir / "runs").glob("*/run.json")):
        settings = read_json_object(run).get("orchestrator") or {}
        if tuple(settings.get(field) for field in SWEPT) in wanted:
            facts[str(run.parent)] = read_facts(run.parent)
    return facts
