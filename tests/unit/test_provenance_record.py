"""The provenance record and its checklist."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import specsplit
from specsplit.errors import UserError
from specsplit.io import combined_sha256, read_json, sha256_file, write_json
from specsplit.provenance.capture import hash_tree
from specsplit.provenance.record import check_record

from experiments import CONFIG, Experiment, git, make_run, nvidia_smi


def test_a_complete_record(experiment: Experiment, tmp_path: Path) -> None:
    record = experiment.record()
    assert record["complete"] is True
    assert [item["item"] for item in record["checklist"] if item["ok"]] == [
        "seeds recorded",
        "PYTHONHASHSEED=0 in every run and its workers",
        "CUBLAS_WORKSPACE_CONFIG=:4096:8 in every run and its workers",
        "command, UTC times and exit code 0 of every run",
        "source code of every run known",
        "host, processor, GPU, driver and packages of every run and worker",
        "runs agree on models, data, settings, machine and packages",
        "models pinned by the hash of their weights",
        "dataset matches the hash in its manifest",
        "GPU state recorded or its absence explained",
        "git commit known",
        "uncommitted changes recorded",
        "what is unavailable is explained",
    ]
    assert all(item["detail"] for item in record["checklist"])
    assert record["schema_version"] == 2
    assert record["config"] == CONFIG
    canonical = b'{"gammas":[0,2],"seed":7,"statistics":{"confidence":0.95}}'
    assert record["config_sha256"] == hashlib.sha256(canonical).hexdigest()
    files = ["results/runs/gamma_0/run.json", "results/runs/gamma_2/run.json"]
    assert record["runs"] == [{"file": file, **make_run(gamma)} for file, gamma in zip(files, (0, 2), strict=True)]
    (model,) = record["models"]
    assert model["reason"] == "revision: only a repository has revisions"
    assert model["fingerprint"].pop("reason") == "max_context: the model sets no limit"
    del model["reason"]
    assert model == read_json(experiment.model)
    assert record["dataset"] == read_json(experiment.manifest)
    assert record["seeds"]["runs"][files[1]] == {"orchestrator": 7, "target_worker": 7}
    assert record["results"] == [
        {
            "path": "results/summary.csv",
            "sha256": hashlib.sha256(b"gamma,tpot\n0,1.5\n").hexdigest(),
            "bytes": 17,
        }
    ]
    assert [entry["path"] for entry in record["inputs"]] == [
        *files,
        "resources/models/tiny/model.json",
        "results/dataset/manifest.json",
    ]
    assert record["source_sha256"] == combined_sha256(hash_tree(Path(specsplit.__file__).parent))
    assert record["workflow_files"]["Snakefile"] == sha256_file(experiment.root / "Snakefile")
    assert record["lock"]["differs"]["numpy"]["locked"] == "0.0.1"
    assert record["git"]["commit"] == git(experiment.root, "rev-parse", "HEAD")
    write_json(tmp_path / "record.json", record)
    assert read_json(tmp_path / "record.json") == record


@pytest.mark.parametrize(
    ("change", "item", "said"),
    [
        ({"exit_code": 1}, "command, UTC times", "gamma_2/run.json: exit code 1"),
        ({"exit_code": False}, "command, UTC times", "exit code False"),
        ({"argv": []}, "command, UTC times", "no command"),
        ({"started": "2025-01-31T12:00:00"}, "command, UTC times", "not a UTC time"),
        ({"started": "2025-01-31T12:00:00+02:00"}, "command, UTC times", "not a UTC time"),
        ({"finished": None}, "command, UTC times", "not a UTC time"),
        ({"finished": "2025-01-31T11:00:00Z"}, "command, UTC times", "finished before it started"),
        ({"seed": 8}, "seeds recorded", "gamma_2/run.json: seed 8, but the configuration has 7"),
    ],
)
def test_a_run_that_lacks_something(experiment: Experiment, change: dict[str, Any], item: str, said: str) -> None:
    write_json(experiment.runs[1], make_run(**change))
    failed, detail = next(iter(experiment.failures().items()))
    assert failed.startswith(item)
    assert said in detail
    assert "gamma_0" not in detail


@pytest.mark.parametrize("environment", [None, {}, {"PYTHONHASHSEED": "1"}])
def test_a_run_in_another_environment(experiment: Experiment, environment: Any) -> None:
    write_json(experiment.runs[0], make_run(environment=environment))
    failed = experiment.failures()
    assert set(failed) == {
        "PYTHONHASHSEED=0 in every run and its workers",
        "CUBLAS_WORKSPACE_CONFIG=:4096:8 in every run and its workers",
    }
    expected = "1" if environment and "PYTHONHASHSEED" in environment else "not set"
    assert failed["PYTHONHASHSEED=0 in every run and its workers"] == f"results/runs/gamma_0/run.json: {expected}"


def test_a_worker_in_another_environment(experiment: Experiment) -> None:
    run = make_run()
    run["workers"]["draft"]["environment"] = {**run["environment"], "PYTHONHASHSEED": "1"}
    write_json(experiment.runs[0], run)
    assert experiment.failures() == {
        "PYTHONHASHSEED=0 in every run and its workers": "results/runs/gamma_0/run.json, draft worker: 1"
    }


def test_nothing_recorded_is_not_complete(experiment: Experiment) -> None:
    experiment.runs = []
    experiment.model = None  # type: ignore[assignment]
    experiment.config = {}
    assert list(experiment.failures()) == [
        "seeds recorded",
        "PYTHONHASHSEED=0 in every run and its workers",
        "CUBLAS_WORKSPACE_CONFIG=:4096:8 in every run and its workers",
        "command, UTC times and exit code 0 of every run",
        "source code of every run known",
        "models pinned by the hash of their weights",
    ]


@pytest.mark.parametrize("fingerprint", [None, {}, {"weights_sha256": None}, {"weights_sha256": "abc"}])
def test_a_model_without_a_hash(experiment: Experiment, fingerprint: Any) -> None:
    write_json(experiment.model, {**read_json(experiment.model), "fingerprint": fingerprint})
    detail = "resources/models/tiny/model.json: no weights_sha256"
    assert experiment.failures()["models pinned by the hash of their weights"] == detail


def test_a_dataset_that_changed_after_its_manifest(experiment: Experiment) -> None:
    experiment.dataset.write_bytes(b'{"prompt": "other"}\n')
    (detail,) = experiment.failures().values()
    assert detail.startswith("no file beside the manifest has sha256 ")
    write_json(experiment.manifest, {})
    (detail,) = experiment.failures().values()
    assert detail == "the manifest has no output_sha256"


def test_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    root = tmp_path / "archive"
    root.mkdir()
    failed = Experiment(root).failures()
    assert list(failed) == ["git commit known"]
    assert "not a git repository" in failed["git commit known"]


def test_uncommitted_changes_are_in_the_record(experiment: Experiment) -> None:
    (experiment.root / "a.txt").write_text("changed")
    record = experiment.record()
    details = {item["item"]: item["detail"] for item in record["checklist"]}
    assert details["git commit known"].endswith(" with uncommitted changes")
    assert details["uncommitted changes recorded"] == "9 lines"
    assert record["complete"] is True
    assert "+changed" in record["git"]["changes"]["diff"]


def test_a_run_of_code_that_is_gone(experiment: Experiment) -> None:
    """It is known when it was committed; uncommitted code that was changed since is not."""
    known = {"commit": "d" * 40, "branch": "main", "dirty": False, "remote": None, "reason": "git: no remote origin"}
    write_json(experiment.runs[1], make_run(run_code_sha256="e" * 64, git=known))
    assert experiment.failures() == {}
    details = {item["item"]: item["detail"] for item in experiment.record()["checklist"]}
    assert details["source code of every run known"] == f"results/runs/gamma_2/run.json by commit {'d' * 40}"
    write_json(experiment.runs[1], make_run(run_code_sha256="e" * 64, git={**known, "dirty": True}))
    (detail,) = experiment.failures().values()
    assert "gamma_2/run.json: made by other code than there is now" in detail


def test_a_null_without_a_reason_is_named(experiment: Experiment) -> None:
    run = make_run()
    run["workers"]["draft"] |= {"log": None, "reason": None}
    write_json(experiment.runs[1], run)
    assert experiment.failures() == {"what is unavailable is explained": "runs.1.workers.draft.log"}


def test_no_secret_gets_into_a_record(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "correct-horse-battery")
    experiment.config["note"] = "correct-horse-battery"
    experiment.config["password"] = "hunter2!"
    run = make_run()
    run["command"] += " correct-horse-battery"
    write_json(experiment.runs[1], run)
    (experiment.root / "a.txt").write_text("correct-horse-battery")
    text = json.dumps(experiment.record())
    assert "horse" not in text
    assert "hunter2" not in text
    assert text.count("[redacted]") == 4


# ---- its schema


def test_a_complete_record_needs_complete_runs(experiment: Experiment) -> None:
    record = experiment.record()
    check_record(record)
    del record["runs"][1]["machine"]
    with pytest.raises(UserError, match=r"version 2:\nruns\.1: 'machine' is a required property"):
        check_record(record)
    record["complete"] = False
    check_record(record)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("config_sha256", "abc", "config_sha256: 'abc' does not match"),
        ("created", "yesterday", "created: 'yesterday' does not match"),
        ("machine", {}, "machine: 'hostname' is a required property"),
        ("checklist", [], r"checklist: \[\] should be non-empty"),
        ("unheard", 1, r"the record: Additional properties are not allowed \('unheard' was unexpected\)"),
    ],
)
def test_what_the_schema_refuses(experiment: Experiment, key: str, value: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_record({**experiment.record(), key: value})


def test_the_gpu_is_in_the_record(experiment: Experiment, fake_command: Callable[[str, str], None]) -> None:
    fake_command("nvidia-smi", nvidia_smi())
    record = experiment.record()
    assert record["gpu"]["gpus"][0]["name"] == "NVIDIA H100 80GB HBM3"
    assert "2 GPUs" in [item["detail"] for item in record["checklist"]]


@pytest.mark.parametrize("what", ["run", "model", "manifest", "result"])
def test_a_missing_file_is_named(experiment: Experiment, what: str) -> None:
    paths = {
        "run": experiment.runs[1],
        "model": experiment.model,
        "manifest": experiment.manifest,
        "result": experiment.summary,
    }
    paths[what].unlink()
    with pytest.raises(UserError, match=re.escape(str(paths[what]))):
        experiment.record()


@pytest.mark.parametrize("content", ["{", "[]", "", "null"])
def test_a_malformed_file_is_named(experiment: Experiment, content: str) -> None:
    experiment.runs[0].write_text(content)
    with pytest.raises(UserError, match=re.escape(str(experiment.runs[0]))):
        experiment.record()
