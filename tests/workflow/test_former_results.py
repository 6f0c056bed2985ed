"""Results that were made when what a run depends on was a list: verified as before, and run again, not misread.

tests/data/results_before_computed_code.zip: what the main job of commit 23dde94 left in the workspace of these tests
with a synthetic model, my.yaml and prompts.jsonl of the archive; without logs, and sealed without the figures.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest

from specsplit.provenance.closure import code_sha256
from specsplit.provenance.folder import RECORD, SEAL, open_experiment
from specsplit.provenance.verify import verify

from experiments import specsplit
from workspace import Workspace

FORMER = Path(__file__).parents[1] / "data" / "results_before_computed_code.zip"


def unpack(folder: Path) -> Path:
    with zipfile.ZipFile(FORMER) as archive:
        archive.extractall(folder)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            os.utime(path, (1.7e9, 1.7e9))  # of one age: no file is out of date by its date
    return folder


@pytest.fixture
def former(tmp_path: Path) -> Path:
    return unpack(tmp_path)


def test_they_are_as_recorded(former: Path) -> None:
    record = json.loads((former / RECORD).read_text())
    assert "run_code_files" not in record
    assert "workers/target/engine.py" in record["source_files"]
    status, printed = specsplit("provenance", "verify", former)
    assert status == 0, printed
    assert "0 not" in printed
    assert "note: the source code is not here" in printed


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"run_code_sha256": "0" * 64}, "run_code_sha256 is 000000000000..., but its content gives"),
        # A list that was not there, or not this one, gives another hash.
        ({"run_code_files": ["decoding/tree.py"]}, "run_code_sha256 is"),
        ({"run_code_files": ["none.py"]}, "run_code_sha256 is"),
        ({"run_code_files": []}, "run_code_files: [] should be non-empty"),
    ],
)
def test_a_record_that_was_changed_is_noticed(former: Path, change: dict[str, object], named: str) -> None:
    (former / SEAL).unlink()
    record = json.loads((former / RECORD).read_text())
    (former / RECORD).write_text(json.dumps({**record, **change}))
    with open_experiment(former) as experiment:
        assert named in verify(experiment).differing[RECORD]


def test_their_runs_are_run_again(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, {"source": "synthetic", "step_ms": 0, "token_ms": 0})
    unpack(tmp_path)
    workspace.config |= {"gammas": [0, 2], "generation": {"max_output_tokens": 6}}
    planned = workspace.planned()
    assert planned["benchmark"] == 2
    assert planned["merge"] == planned["provenance"] == planned["summary"] == 1
    # Nor is it for want of a file or for its date: what is left out of the plan here counts as it stands.
    arguments = ("--dry-run", "--rerun-triggers", "params", "--allowed-rules")
    arguments += ("benchmark", "start_worker", "settings", "operation")
    shown = workspace.run(*arguments, target="results/runs/gamma_2/run.json")
    runs = shown.partition("rule benchmark:")[2].partition("resources:")[0]
    # They have no file of settings, as results of today have: with it comes the run, whose code is another as well.
    assert "Input files updated by another job" in runs
    assert "results/settings/gamma_2/settings.json" in runs
    assert "Missing output files" not in runs
    kept = json.loads((tmp_path / "results/runs/gamma_2/run.json").read_text())["run_code_sha256"]
    assert kept != code_sha256("bench")
