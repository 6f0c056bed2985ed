"""Provenance capture: with and without a GPU, git or a checkout; the record and its checklist; JSON files."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import specsplit
from specsplit.errors import UserError
from specsplit.jsonio import json_sha256, read_json, read_json_object, write_json
from specsplit.provenance.capture import (
    capture_environment,
    capture_machine,
    capture_software,
    hash_source_tree,
    utc_now,
)
from specsplit.provenance.git import capture_git
from specsplit.provenance.gpu import capture_gpu
from specsplit.provenance.record import build_record

# ---- GPU


SMI_TABLE = """\
NVIDIA H100 80GB HBM3, GPU-11111111-aaaa, 550.54.15, 81559, P0, 1980, 2619, 118.27
"Tesla T4, rev 2", GPU-22222222-bbbb, 550.54.15, 15360, P8, 300, 405, [N/A]
"""
SMI_FULL = """\
==============NVSMI LOG==============

Driver Version                            : 550.54.15
CUDA Version                              : 12.4
Attached GPUs                             : 2
"""


@pytest.fixture
def fake_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a shell script of that name first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return make


def nvidia_smi(table: str = SMI_TABLE, full: str = SMI_FULL, full_status: int = 0) -> str:
    return (
        f"case \"$1\" in\n-q) cat <<'END'\n{full}END\nexit {full_status};;\n"
        f"--query-gpu=name,uuid,*) cat <<'END'\n{table}END\nexit 0;;\nesac\nexit 9"
    )


def test_gpus_are_read_from_nvidia_smi(fake_command: Callable[[str, str], None]) -> None:
    fake_command("nvidia-smi", nvidia_smi())
    state = capture_gpu()
    assert state["available"] is True
    assert state["reason"] is None
    assert state["cuda_version"] == "12.4"
    assert state["raw"] == SMI_FULL
    assert state["gpus"] == [
        {
            "name": "NVIDIA H100 80GB HBM3",
            "uuid": "GPU-11111111-aaaa",
            "driver_version": "550.54.15",
            "memory_total_mib": 81559.0,
            "pstate": "P0",
            "clocks_sm_mhz": 1980.0,
            "clocks_mem_mhz": 2619.0,
            "power_draw_w": 118.27,
        },
        {
            "name": "Tesla T4, rev 2",
            "uuid": "GPU-22222222-bbbb",
            "driver_version": "550.54.15",
            "memory_total_mib": 15360.0,
            "pstate": "P8",
            "clocks_sm_mhz": 300.0,
            "clocks_mem_mhz": 405.0,
            "power_draw_w": None,
        },
    ]


def test_gpus_stay_recorded_when_the_long_report_fails(fake_command: Callable[[str, str], None]) -> None:
    fake_command("nvidia-smi", nvidia_smi(full="broken\n", full_status=3))
    state = capture_gpu()
    assert len(state["gpus"]) == 2
    assert state["raw"] is None
    assert state["cuda_version"] is None
    assert state["reason"] == "nvidia-smi: exit status 3: broken"


def test_a_report_without_the_cuda_version_says_so(fake_command: Callable[[str, str], None]) -> None:
    fake_command("nvidia-smi", nvidia_smi(full="Driver Version : 1\n"))
    state = capture_gpu()
    assert (state["cuda_version"], state["raw"]) == (None, "Driver Version : 1\n")
    assert "CUDA version" in state["reason"]


@pytest.mark.parametrize(
    ("script", "timeout_s", "reason"),
    [
        ("echo 'No devices were found'", 30, "nvidia-smi: lists no GPU: No devices were found"),
        ("true", 30, "nvidia-smi: lists no GPU: no output"),
        ("echo 'driver mismatch' >&2; exit 18", 30, "nvidia-smi: exit status 18: driver mismatch"),
        ("exec sleep 60", 0.3, "nvidia-smi: no answer within 0.3 s"),
    ],
)
def test_a_gpu_that_cannot_be_read_is_explained(
    fake_command: Callable[[str, str], None], script: str, timeout_s: float, reason: str
) -> None:
    fake_command("nvidia-smi", script)
    assert capture_gpu(timeout_s) == {
        "available": False,
        "reason": reason,
        "cuda_version": None,
        "gpus": [],
        "raw": None,
    }


def test_no_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert capture_gpu()["reason"] == "nvidia-smi: command not found"


def test_an_nvidia_smi_that_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_bytes(b"\x00not a program")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    state = capture_gpu()
    assert state["available"] is False
    assert state["reason"].startswith("nvidia-smi: ")


# ---- machine, software, environment


def test_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    machine = capture_machine()
    assert machine["hostname"]
    assert machine["kernel"].split()[0] in ("Linux", "Darwin", "Windows")
    assert 1 <= machine["cores_usable"] <= machine["cores_logical"]
    assert machine["memory_bytes"] > 2**28
    assert machine["python"] == sys.version
    assert machine["OMP_NUM_THREADS"] == "3"
    assert machine["torch"]["available"]
    assert machine["torch"]["threads"] >= 1
    assert "ATen" in machine["torch"]["parallel"]
    assert "PyTorch built with" in machine["torch"]["build"]
    json.dumps(machine, allow_nan=False)


def test_machine_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    torch = capture_machine()["torch"]
    assert torch["available"] is False
    assert torch["reason"].startswith("torch cannot be imported")


def test_software_lists_every_package() -> None:
    software = capture_software()
    assert software["packages"]["jsonschema"]
    assert software["snakemake"] == software["packages"].get("snakemake")
    assert software["specsplit"] == specsplit.__version__
    assert list(software["packages"]) == sorted(software["packages"])
    assert software["sha256"] == json_sha256(software["packages"])
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in software["packages"])


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    environment = capture_environment()
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert environment["MKL_NUM_THREADS"] is None
    assert set(environment) == {
        "PYTHONHASHSEED",
        "CUBLAS_WORKSPACE_CONFIG",
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "TOKENIZERS_PARALLELISM",
        "HF_HUB_OFFLINE",
        "hash_randomization",
    }


def test_hash_randomization_is_what_the_interpreter_does() -> None:
    code = "from specsplit.provenance.capture import *; print(capture_environment()['hash_randomization'])"
    path = str(Path(specsplit.__file__).parents[1])
    for seed, expected in (("0", "False"), ("random", "True")):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == expected


def test_utc_now() -> None:
    text = utc_now()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", text)
    time = datetime.fromisoformat(text)
    assert abs(datetime.now(time.tzinfo) - time) < timedelta(minutes=1)


# ---- git and source


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(root), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    root.mkdir()
    git(root, "init", "-q", "-b", "trunk")
    (root / "a.txt").write_text("a")
    (root / ".gitignore").write_text("/results/\n")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    return root


def test_git_of_a_clean_checkout(checkout: Path) -> None:
    assert capture_git(checkout) == {
        "commit": git(checkout, "rev-parse", "HEAD"),
        "branch": "trunk",
        "dirty": False,
        "reason": None,
    }


def test_git_sees_changes_and_new_files_but_not_results(checkout: Path) -> None:
    (checkout / "results").mkdir()
    (checkout / "results" / "x.csv").write_text("1")
    assert capture_git(checkout)["dirty"] is False
    (checkout / "my.yaml").write_text("x")
    assert capture_git(checkout)["dirty"] is True
    (checkout / "my.yaml").unlink()
    (checkout / "a.txt").write_text("b")
    assert capture_git(checkout)["dirty"] is True


def test_git_on_a_detached_head(checkout: Path) -> None:
    git(checkout, "checkout", "-q", "--detach")
    state = capture_git(checkout)
    assert state["commit"]
    assert state["branch"] is None


def test_git_of_a_folder_that_an_outer_checkout_does_not_track(checkout: Path) -> None:
    inner = checkout / "results" / "unpacked"
    inner.mkdir(parents=True)
    (inner / "code.py").write_text("x")
    state = capture_git(inner)
    assert state["commit"] is None
    assert "is tracked" in state["reason"]


def test_git_before_the_first_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("a")
    git(tmp_path, "add", "a")
    state = capture_git(tmp_path)
    assert state["commit"] is None
    assert state["reason"].startswith("git: exit status")


def test_git_without_a_checkout_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "not a git repository" in capture_git(tmp_path)["reason"]
    assert capture_git(tmp_path / "gone")["commit"] is None


def test_git_missing(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    expected = {"commit": None, "branch": None, "dirty": None, "reason": "git: command not found"}
    assert capture_git(checkout) == expected


def test_source_hash_follows_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "sub" / "b.py").write_text("2")
    first = hash_source_tree(tmp_path)
    lines = "".join(
        f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n" for name, text in (("a.py", "1"), ("sub/b.py", "2"))
    )
    assert first == hashlib.sha256(lines.encode()).hexdigest()

    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_text("compiled")
    assert hash_source_tree(tmp_path) == first
    (tmp_path / "a.py").write_text("12")
    changed = hash_source_tree(tmp_path)
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "sub" / "b.py").rename(tmp_path / "b.py")
    assert len({first, changed, hash_source_tree(tmp_path)}) == 3


# ---- the record


CONFIG = {"seed": 7, "gammas": [0, 2]}


class Experiment:
    """A finished experiment on disk; `record` builds its provenance record."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config: dict[str, Any] = dict(CONFIG)
        results = root / "results"
        self.runs = [results / f"gamma-{gamma}" / "run.json" for gamma in (0, 2)]
        self.model = results / "model.json"
        self.manifest = results / "dataset" / "manifest.json"
        self.summary = results / "summary.csv"
        for path in self.runs:
            write_json(path, self.run())
        write_json(self.model, {"name": "tiny", "fingerprint": {"weights_sha256": "a" * 64}})
        self.dataset = self.manifest.parent / "prompts.jsonl"
        self.manifest.parent.mkdir()
        self.dataset.write_bytes(b'{"prompt": "hi"}\n')
        digest = hashlib.sha256(self.dataset.read_bytes()).hexdigest()
        write_json(self.manifest, {"output_sha256": digest, "prompts": 1})
        self.summary.write_bytes(b"gamma,tpot\n0,1.5\n")

    @staticmethod
    def run(**changes: Any) -> dict[str, Any]:
        return {
            "argv": ["specsplit", "bench", "--gamma", "2"],
            "started": "2025-01-31T12:00:00Z",
            "finished": "2025-01-31T12:01:00.5+00:00",
            "exit_code": 0,
            "seed": 7,
            "environment": {"PYTHONHASHSEED": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
            **changes,
        }

    def record(self) -> dict[str, Any]:
        return build_record(
            config=self.config,
            run_files=self.runs,
            model_files=[self.model] if self.model else [],
            dataset_manifest=self.manifest,
            result_files=[self.summary],
            root=self.root,
        )

    def failures(self) -> dict[str, str]:
        """item -> detail of what the checklist refuses."""
        record = self.record()
        failed = {item["item"]: item["detail"] for item in record["checklist"] if not item["ok"]}
        assert record["complete"] is (not failed)
        return failed


@pytest.fixture
def experiment(checkout: Path) -> Experiment:
    return Experiment(checkout)


def test_a_complete_record(experiment: Experiment, tmp_path: Path) -> None:
    record = experiment.record()
    assert record["complete"] is True
    assert [item["item"] for item in record["checklist"] if item["ok"]] == [
        "seeds recorded",
        "PYTHONHASHSEED=0 in every run and its workers",
        "CUBLAS_WORKSPACE_CONFIG=:4096:8 in every run and its workers",
        "command, UTC times and exit code 0 of every run",
        "models pinned by the hash of their weights",
        "dataset matches the hash in its manifest",
        "GPU state recorded or its absence explained",
        "git commit known",
    ]
    assert all(item["detail"] for item in record["checklist"])
    assert record["schema_version"] == 1
    assert record["config"] == CONFIG
    canonical = b'{"gammas":[0,2],"seed":7}'
    assert record["config_sha256"] == hashlib.sha256(canonical).hexdigest()
    assert record["runs"] == [Experiment.run(), Experiment.run()]
    assert record["models"] == [read_json(experiment.model)]
    assert record["dataset"] == read_json(experiment.manifest)
    assert record["results"] == [
        {
            "path": "results/summary.csv",
            "sha256": hashlib.sha256(b"gamma,tpot\n0,1.5\n").hexdigest(),
            "bytes": 17,
        }
    ]
    assert [entry["path"] for entry in record["inputs"]] == [
        "results/gamma-0/run.json",
        "results/gamma-2/run.json",
        "results/model.json",
        "results/dataset/manifest.json",
    ]
    assert record["source_sha256"] == hash_source_tree(Path(specsplit.__file__).parent)
    assert record["git"]["commit"] == git(experiment.root, "rev-parse", "HEAD")
    write_json(tmp_path / "record.json", record)
    assert read_json(tmp_path / "record.json") == record


@pytest.mark.parametrize(
    ("change", "item", "said"),
    [
        ({"exit_code": 1}, "command, UTC times", "gamma-2/run.json: exit code 1"),
        ({"exit_code": False}, "command, UTC times", "exit code False"),
        ({"argv": []}, "command, UTC times", "no command"),
        ({"started": "2025-01-31T12:00:00"}, "command, UTC times", "not a UTC time"),
        ({"started": "2025-01-31T12:00:00+02:00"}, "command, UTC times", "not a UTC time"),
        ({"finished": None}, "command, UTC times", "not a UTC time"),
        ({"finished": "2025-01-31T11:00:00Z"}, "command, UTC times", "finished before it started"),
        ({"seed": 8}, "seeds recorded", "gamma-2/run.json: seed 8, but the configuration has 7"),
    ],
)
def test_a_run_that_lacks_something(experiment: Experiment, change: dict[str, Any], item: str, said: str) -> None:
    write_json(experiment.runs[1], Experiment.run(**change))
    ((failed, detail),) = experiment.failures().items()
    assert failed.startswith(item)
    assert said in detail
    assert "gamma-0" not in detail


@pytest.mark.parametrize("environment", [None, {}, {"PYTHONHASHSEED": "1"}])
def test_a_run_in_another_environment(experiment: Experiment, environment: Any) -> None:
    write_json(experiment.runs[0], Experiment.run(environment=environment))
    failed = experiment.failures()
    assert set(failed) == {
        "PYTHONHASHSEED=0 in every run and its workers",
        "CUBLAS_WORKSPACE_CONFIG=:4096:8 in every run and its workers",
    }
    expected = "1" if environment and "PYTHONHASHSEED" in environment else "not set"
    assert failed["PYTHONHASHSEED=0 in every run and its workers"] == f"results/gamma-0/run.json: {expected}"


def test_a_worker_in_another_environment(experiment: Experiment) -> None:
    workers = {"draft": {"environment": {"PYTHONHASHSEED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}}}
    write_json(experiment.runs[0], Experiment.run(workers=workers))
    assert experiment.failures() == {
        "PYTHONHASHSEED=0 in every run and its workers": "results/gamma-0/run.json, draft worker: 1"
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
        "models pinned by the hash of their weights",
    ]


@pytest.mark.parametrize("fingerprint", [None, {}, {"weights_sha256": None}, {"weights_sha256": "abc"}])
def test_a_model_without_a_hash(experiment: Experiment, fingerprint: Any) -> None:
    write_json(experiment.model, {"name": "tiny", "fingerprint": fingerprint})
    expected = {"models pinned by the hash of their weights": "results/model.json: no weights_sha256"}
    assert experiment.failures() == expected


def test_a_dataset_that_changed_after_its_manifest(experiment: Experiment) -> None:
    experiment.dataset.write_bytes(b'{"prompt": "other"}\n')
    (detail,) = experiment.failures().values()
    assert detail.startswith("no file beside manifest.json has sha256 ")
    write_json(experiment.manifest, {})
    (detail,) = experiment.failures().values()
    assert detail == "manifest.json: no output_sha256"


def test_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    root = tmp_path / "archive"
    root.mkdir()
    failed = Experiment(root).failures()
    assert list(failed) == ["git commit known"]
    assert "not a git repository" in failed["git commit known"]


def test_uncommitted_changes_are_told(experiment: Experiment) -> None:
    (experiment.root / "a.txt").write_text("changed")
    detail = experiment.record()["checklist"][-1]["detail"]
    assert detail.endswith(" with uncommitted changes")


def test_the_gpu_is_in_the_record(experiment: Experiment, fake_command: Callable[[str, str], None]) -> None:
    fake_command("nvidia-smi", nvidia_smi())
    record = experiment.record()
    assert record["gpu"]["gpus"][0]["name"] == "NVIDIA H100 80GB HBM3"
    assert "2 GPU(s)" in [item["detail"] for item in record["checklist"]]


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


# ---- JSON files


def test_json_is_written_as_given_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"b": [1, None], "a": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "b": [\n    1,\n    null\n  ],\n  "a": "é"\n}\n'
    assert read_json(path) == {"b": [1, None], "a": "é"}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("bad", [{"x": math.nan}, {"x": object()}])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, bad: Any) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises((ValueError, TypeError)):
        write_json(path, bad)
    assert read_json(path) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, 2)
    assert read_json(path) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{\n  "a": 1,\n  "b" 2\n}', "line 3, column 7: not valid JSON"),
        (b"", "line 1, column 1: not valid JSON"),
        (b'{"a": NaN}', "JSON has no NaN"),
        (b"\xff", "not UTF-8 text"),
    ],
)
def test_malformed_json_names_the_file_and_the_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)


def test_unreadable_json_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.json: no such file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)


def test_a_json_object_is_wanted(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(UserError, match=r"a\.json: holds \[1\]; wanted a JSON object"):
        read_json_object(tmp_path / "a.json")


def test_json_hash_ignores_the_order_of_keys() -> None:
    assert json_sha256({"b": 1, "a": "é"}) == json_sha256({"a": "é", "b": 1})
    assert json_sha256({"a": "é"}) == hashlib.sha256('{"a":"é"}'.encode()).hexdigest()
