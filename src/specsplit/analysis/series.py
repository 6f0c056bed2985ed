"""Which runs may stand in one table: those whose recorded facts agree. Others are refused, or kept apart as series."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pandas import DataFrame

from specsplit.analysis.configurations import configuration_of
from specsplit.io import read_json_object
from specsplit.provenance.facts import read_facts, refuse_differences, told_apart
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
    if SERIES in requests:
        return
    wanted = set(configuration_of(requests))
    facts = {}
    for run in sorted((results_dir / "runs").glob("*/run.json")):
        settings = read_json_object(run).get("orchestrator") or {}
        if tuple(settings.get(field) for field in SWEPT) in wanted:
            facts[str(run.parent)] = read_facts(run.parent)
    refuse_differences(facts, KEEP_APART)
