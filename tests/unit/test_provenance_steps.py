"""The steps of the workflow: what is logged of each job that Snakemake starts, and read back for the record."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specsplit.errors import UserError
from specsplit.provenance.seal import seal_results
from specsplit.provenance.steps import COMMAND, STEPS, StepLog, read_steps

Say = Callable[..., None]


@pytest.fixture
def say(tmp_path: Path) -> Say:
    """Send an event as Snakemake does. The log is in `tmp_path`, the project's folder."""
    logger = logging.Logger("test")
    logger.addHandler(StepLog(tmp_path / STEPS))

    def send(event: str, **fields: Any) -> None:
        logger.info("said", extra={"event": event, **fields})

    return send


def job(rule: str, *outputs: str, command: str | None = "true", inputs: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"rule_name": rule, "shellcmd": command, "input": inputs, "output": outputs, "log": [f"{rule}.log"]}


def test_each_job_with_its_command_and_times(say: Say, tmp_path: Path) -> None:
    say("job_started", jobs=[1])
    say(
        "job_info", **job("merge", "a.csv", "b.csv", command="specsplit merge", inputs=("src/specsplit/io.py", "r.csv"))
    )
    say("job_info", **job("figures", "a.png", command=None))
    for name in ("a.csv", "b.csv", "a.png"):
        (tmp_path / name).write_text(name)
    os.utime(tmp_path / "a.png", (4e9, 4e9))
    merge, figures, unknown = read_steps(["a.png", "b.csv", "a.csv", "c.csv"], tmp_path)
    assert (merge["rule"], merge["command"], merge["exit_code"]) == ("merge", "specsplit merge", 0)
    assert (merge["inputs"], merge["outputs"], merge["log"]) == (["r.csv"], ["b.csv", "a.csv"], ["merge.log"])
    assert merge["started"] <= merge["finished"] < figures["finished"] == "2096-10-02T07:06:40.000Z"
    assert figures["command"] is None
    assert figures["reason"] == "command: the rule runs a script of the workflow"
    assert unknown["outputs"] == ["c.csv"]
    assert unknown["reason"] == "the workflow did not log how these files were made"
    assert unknown["rule"] is unknown["command"] is unknown["started"] is unknown["exit_code"] is None


def test_the_last_job_that_made_a_file_counts(say: Say, tmp_path: Path) -> None:
    say("job_started", jobs=[1])
    say("job_info", **job("merge", "a.csv", "b.csv", command="specsplit merge --old"))
    say("job_info", **job("merge", "a.csv", command="specsplit merge --new"))
    with (tmp_path / STEPS).open("a") as file:
        file.write('{"rule": "merge", "outp')  # Snakemake was killed
    first, second = sorted(read_steps(["a.csv", "b.csv"], tmp_path), key=lambda step: step["outputs"])
    assert first["command"] == "specsplit merge --new"
    assert second["command"] == "specsplit merge --old"


def test_a_file_that_was_edited_since_its_job_is_not_sealed(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an output nor a log; what another job makes anew is, and whoever seals by hand seals all."""
    table, log = tmp_path / "results" / "a.csv", tmp_path / "results" / "a.log"
    table.parent.mkdir()
    say("job_started", jobs=[1])
    made = {**job("merge", "results/a.csv"), "log": ["results/a.log"], "jobid": 3}
    say("job_info", **made)
    for file in (table, log):
        file.write_text("made")
    say("job_finished", job_id=3)
    monkeypatch.setenv(COMMAND, json.dumps({"started": 1.0}))
    assert seal_results(table.parent) == 2
    for file in (table, log):
        file.write_text("edited")
        with pytest.raises(UserError, match=rf"results/{file.name} \(rule merge\). Put back"):
            seal_results(table.parent)
        file.write_text("made")
    say("job_info", **made)
    table.write_text("made anew")
    assert seal_results(table.parent) == 2  # by a job that has not ended, as that of the seal itself
    say("job_finished", job_id=3)
    table.write_text("edited")
    with pytest.raises(UserError, match="not sealed"):
        seal_results(table.parent)
    monkeypatch.delenv(COMMAND)
    assert seal_results(table.parent) == 2


def test_a_dry_run_leaves_nothing(say: Say, tmp_path: Path) -> None:
    say("job_info", **job("merge", "a.csv"))
    assert not (tmp_path / STEPS).exists()
    assert [step["outputs"] for step in read_steps(["a.csv"], tmp_path)] == [["a.csv"]]


def test_no_secret_and_files_in_remote_storage(say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-mine")
    say("job_started", jobs=[1])
    say("job_info", **job("merge", "s3://bucket/a.csv (send to storage)", command="x --password a-secret-of-mine"))
    (step,) = read_steps([".snakemake/storage/s3/bucket/a.csv"], tmp_path)
    assert step["command"] == "x --password [redacted]"
    assert "a-secret" not in (tmp_path / STEPS).read_text()
    assert json.loads((tmp_path / STEPS).read_text())["outputs"] == ["s3/bucket/a.csv"]
