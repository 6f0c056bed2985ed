"""Provenance capture: with and without a GPU, git or a checkout; the record and its checklist; JSON files."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

import specsplit
from specsplit.errors import UserError
from specsplit.io import combined_sha256, json_sha256, read_json, read_json_object, write_json
from specsplit.provenance.capture import (
    capture_environment,
    capture_lock,
    capture_machine,
    capture_software,
    hash_tree,
    utc_now,
)
from specsplit.provenance.git import LARGEST_NEW_FILE, capture_diff, capture_git
from specsplit.provenance.gpu import GpuSampler, capture_gpu
from specsplit.provenance.redaction import find_secret, is_secret_name, redact, redact_arguments

from experiments import NO_GIT, SMI_FULL, git, nvidia_smi

# ---- GPU


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
            "reason": None,
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
            "reason": "nvidia-smi: power.draw is [N/A]",
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


def test_samples_while_something_runs(fake_command: Callable[[str, str], None]) -> None:
    line = "GPU-1, 2025/01/31 13:00:00.123, 118.27, 1980, 97, [N/A]"
    fake_command("nvidia-smi", f"echo '{line}'; echo '{line}'; echo 'GPU-1, 2025/01/31 13'; exec sleep 60")
    with GpuSampler(period_s=0.5) as sampler:
        time.sleep(0.3)
    samples = sampler.samples
    assert (samples["available"], samples["reason"], samples["period_s"]) == (True, None, 0.5)
    (gpu,) = samples["gpus"]
    assert (gpu["uuid"], gpu["power_draw_w"], gpu["clocks_sm_mhz"]) == ("GPU-1", [118.27] * 2, [1980.0] * 2)
    assert (gpu["utilization_percent"], gpu["temperature_c"]) == ([97.0] * 2, [None] * 2)
    local = datetime(2025, 1, 31, 13, 0, 0, 123000).astimezone()
    assert datetime.fromisoformat(gpu["time"][0]) == local


@pytest.mark.parametrize(
    ("script", "reason"),
    [(None, "nvidia-smi: command not found"), ("echo broken; exit 9", "nvidia-smi: no sample: broken")],
)
def test_no_samples_are_explained(
    fake_command: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, script: str | None, reason: str
) -> None:
    if script is None:
        monkeypatch.setenv("PATH", "/nonexistent")
    else:
        fake_command("nvidia-smi", script)
    with GpuSampler() as sampler:
        time.sleep(0.2)
    assert sampler.samples == {"available": False, "reason": reason, "period_s": 1.0, "gpus": []}


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
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 4 if logical else None)
    machine = capture_machine()
    assert machine["hostname"]
    assert machine["kernel"].split()[0] in ("Linux", "Darwin", "Windows")
    assert machine["cores_usable"] >= 1
    assert machine["memory_bytes"] > 2**28
    assert machine["python"] == sys.version
    assert machine["cores_physical"] is None
    assert machine["reason"] == "cores_physical: the system does not say"
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
        "CUDA_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
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


def test_git_of_a_clean_checkout(checkout: Path) -> None:
    assert capture_git(checkout) == {
        "commit": git(checkout, "rev-parse", "HEAD"),
        "branch": "trunk",
        "dirty": False,
        "remote": None,
        "reason": "git: no remote origin",
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
    assert "git: detached head" in state["reason"]


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
    assert capture_git(checkout) == {**NO_GIT, "reason": "git: command not found"}
    assert capture_diff(checkout)["reason"] == "git: command not found"


def test_source_hash_follows_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "sub" / "b.py").write_text("2")
    first = combined_sha256(hash_tree(tmp_path))
    lines = "".join(
        f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n" for name, text in (("a.py", "1"), ("sub/b.py", "2"))
    )
    assert first == hashlib.sha256(lines.encode()).hexdigest()

    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_text("compiled")
    assert combined_sha256(hash_tree(tmp_path)) == first
    (tmp_path / "a.py").write_text("12")
    changed = combined_sha256(hash_tree(tmp_path))
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "sub" / "b.py").rename(tmp_path / "b.py")
    assert len({first, changed, combined_sha256(hash_tree(tmp_path))}) == 3


def test_what_differs_from_the_lock(tmp_path: Path) -> None:
    installed = {"torch": "2.13.0+cpu", "ruamel-yaml": "1.0", "new": "3"}
    missing = capture_lock(tmp_path, installed)
    assert missing["sha256"] is None
    assert missing["reason"].startswith("envs/constraints.txt: ")
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "constraints.txt").write_text("# pins\ntorch==2.13.0\nruamel.yaml==0.9\nabsent==1\n")
    lock = capture_lock(tmp_path, installed)
    assert lock["differs"] == {"ruamel-yaml": {"installed": "1.0", "locked": "0.9"}}
    assert len(lock["sha256"]) == 64


# ---- uncommitted changes


def test_no_changes(checkout: Path) -> None:
    empty = hashlib.sha256(b"").hexdigest()
    assert capture_diff(checkout) == {"diff": "", "sha256": empty, "redacted": False, "new_files": [], "reason": None}


def test_the_changes_make_the_files_again(checkout: Path, tmp_path: Path) -> None:
    (checkout / "a.txt").write_text("changed\n")
    (checkout / "sub").mkdir()
    (checkout / "sub" / "new.bin").write_bytes(bytes(range(256)))
    (checkout / "results").mkdir()
    (checkout / "results" / "ignored").write_text("x")
    changes = capture_diff(checkout)
    assert [(file["path"], file["in_diff"]) for file in changes["new_files"]] == [("sub/new.bin", True)]
    assert changes["sha256"] == hashlib.sha256(changes["diff"].encode()).hexdigest()
    git(tmp_path, "clone", "-q", str(checkout), "again")
    (tmp_path / "patch").write_text(changes["diff"])
    git(tmp_path / "again", "apply", str(tmp_path / "patch"))
    assert (tmp_path / "again" / "a.txt").read_text() == "changed\n"
    assert (tmp_path / "again" / "sub" / "new.bin").read_bytes() == bytes(range(256))
    assert not (tmp_path / "again" / "results").exists()
    assert git(checkout, "diff", "--cached") == ""  # the index is as it was


def test_secrets_and_large_files_stay_out_of_the_changes(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    (checkout / "a.txt").write_text("login correct-horse-battery\n")
    (checkout / ".env").write_text("PASSWORD=hunter2\n")
    (checkout / "large").write_bytes(b"x" * (LARGEST_NEW_FILE + 1))
    changes = capture_diff(checkout)
    assert "horse" not in changes["diff"]
    assert "hunter2" not in changes["diff"]
    assert changes["redacted"] is True
    assert {file["path"]: file["in_diff"] for file in changes["new_files"]} == {".env": False, "large": False}


def test_the_remote_without_its_password(checkout: Path) -> None:
    git(checkout, "remote", "add", "origin", "https://me:hunter2@example.org/x.git")
    assert capture_git(checkout)["remote"] == "https://[redacted]@example.org/x.git"


# ---- secrets


@pytest.mark.parametrize("name", ["HF_TOKEN", "--hf-token", "db_password", "AWS_SECRET_ACCESS_KEY", "openai.api-key"])
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["max_output_tokens", "tokenizer_sha256", "TOKENIZERS_PARALLELISM", "key", "path", "token_file", "HF_TOKEN_PATH"],
)
def test_names_of_no_secrets(name: str) -> None:
    assert not is_secret_name(name)


def test_what_is_in_a_file_of_tokens_is_a_secret_and_its_name_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "tokens"
    file.write_text("0123456789abcdef\n fedcba9876543210\n")
    monkeypatch.setenv("SPECSPLIT_ORCH_TOKEN_FILE", str(file))
    monkeypatch.setenv("SPECSPLIT_DRAFT_TOKEN_FILE", str(tmp_path / "none"))
    told = {"token_file": str(file), "log": "sent 0123456789abcdef, then fedcba9876543210"}
    assert redact(told) == {"token_file": str(file), "log": "sent [redacted], then [redacted]"}
    assert redact_arguments(["--token-file", str(file)]) == ["--token-file", str(file)]
    assert find_secret("a fedcba9876543210") == 2


def test_redaction(monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "a" * 34
    monkeypatch.setenv("SOME_PASSWORD", "open sesame!")
    monkeypatch.setenv("SHORT_TOKEN", "1")
    value = {"api_key": "k", "n": [1, None, f"say open sesame! and {token}."], "eos_token": 2, "url": "http://u:p@h/"}
    assert redact(value) == {
        "api_key": "[redacted]",
        "n": [1, None, "say [redacted] and [redacted]."],
        "eos_token": 2,
        "url": "http://[redacted]@h/",
    }
    line = ["run", "--token", "x", "--hf-token=y", "password=z", "--max-output-tokens", "64", token]
    assert redact_arguments(line) == [
        *("run", "--token", "[redacted]", "--hf-token=[redacted]", "password=[redacted]"),
        *("--max-output-tokens", "64", "[redacted]"),
    ]
    assert find_secret("a " + token) == 2
    assert find_secret("nothing here: task-force-of-many-words, 1 of 2") is None


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
    with pytest.raises(UserError, match="a folder, where a file is wanted"):
        read_json(tmp_path)


def test_a_json_object_is_wanted(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(UserError, match=r"a\.json: holds \[1\]; wanted a JSON object"):
        read_json_object(tmp_path / "a.json")


def test_json_hash_ignores_the_order_of_keys() -> None:
    assert json_sha256({"b": 1, "a": "é"}) == json_sha256({"a": "é", "b": 1})
    assert json_sha256({"a": "é"}) == hashlib.sha256('{"a":"é"}'.encode()).hexdigest()
