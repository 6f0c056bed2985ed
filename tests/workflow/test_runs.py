"""Workflows of their own: faults, clear errors, workers of every kind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pandas as pd
import pytest

from specsplit.launch.environment import threads_beside_another


@pytest.mark.slow
def test_workers_that_compute_at_once_share_the_cores(workspace):
    workspace.config |= {"gammas": [0, 2], "mode": ["sync", "lookahead"]}
    del workspace.config["workers"]["threads"]

    def threads() -> dict[str, int | None]:
        shutil.rmtree(workspace.folder / "results" / "settings", ignore_errors=True)
        points = ("gamma_0", "gamma_2", "lookahead_gamma_2")
        files = [f"results/settings/{point}/settings.json" for point in points]
        workspace.run(target=" ".join(files))
        told = {
            point: json.loads((workspace.folder / file).read_text()) for point, file in zip(points, files, strict=True)
        }
        return {f"{p}/{role}": parts[role]["threads"] for p, parts in told.items() for role in parts if role != "run"}

    half = threads_beside_another()
    pair = {"lookahead_gamma_2/draft", "lookahead_gamma_2/target"}
    assert {worker: half if worker in pair else None for worker in threads()} == threads()
    workspace.config["workers"]["device"] = "cuda"
    assert not any(threads().values())
    workspace.config["workers"] |= {"device": "cpu", "threads": 3}
    assert all(found == 3 for found in threads().values())


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_run_leaves_nothing_and_the_next_finishes(workspace, how):
    workspace.config |= {"gammas": [0, 1], "generation": {"max_output_tokens": 100, "ignore_eos": True}}
    process = workspace.start()
    try:
        benchmark = "results/runs/gamma_*/unfinished.jsonl"
        assert workspace.wait_until(lambda: any(workspace.folder.glob(benchmark)), 120), workspace.logs()
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # Ctrl-C reaches the whole group
        else:
            process.kill()
        process.wait(30)
        assert workspace.wait_until(lambda: not workspace.processes(), 5), workspace.processes()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    workspace.run(target="results/requests.csv")
    requests = pd.read_csv(workspace.folder / "results" / "requests.csv")
    assert not requests.duplicated(["gamma", "request_id"]).any()
    assert len(requests) == 6


def failure(workspace, *arguments, **variables):
    """The whole output of a run that must fail; no traceback may be in it."""
    done = workspace.snakemake(*arguments, **variables)
    text = done.stdout + done.stderr + workspace.logs()
    assert done.returncode != 0
    assert "Traceback" not in text
    return text


def test_bad_configuration(workspace):
    workspace.config["gamas"] = [1]
    workspace.config["dataset"]["limit"] = 0
    text = failure(workspace)
    assert "gamas: unknown key; did you mean gammas?" in text
    assert "dataset.limit: 0; wanted an integer >= 1 or null" in text


def test_bad_prompt_line(workspace):
    with (workspace.folder / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": ""}\n')
    assert "prompts.jsonl:4: the prompt is empty" in failure(workspace, target="results/dataset/prompts.jsonl")
    workspace.config["dataset"]["on_bad_line"] = "skip"
    workspace.run("--until", "prepare_dataset")
    manifest = json.loads((workspace.folder / "results" / "dataset" / "manifest.json").read_text())
    assert [bad["line"] for bad in manifest["skipped"]] == [4]


def test_dead_worker_address(workspace):
    workspace.config["workers"]["target_address"] = "127.0.0.1:1"
    text = failure(workspace, target="results/workers/gamma_0/target.json")
    assert "no target worker answers at 127.0.0.1:1" in text


@pytest.mark.slow
def test_attach_to_a_running_worker(workspace):
    """The address in the environment is used, the worker is checked and left running."""
    workspace.run("--until", "prepare_model")
    command = [sys.executable, "-m", "specsplit", "start-worker", "target"]
    flags = ["--model", "resources/models/tiny/model.json", "--endpoint-file", "mine.json", "--worker-log", "mine.log"]
    start = subprocess.run(
        [*command, *flags, "--threads", "1", "--max-context", "128"],
        cwd=workspace.folder,
        env=workspace.environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    assert "serves at" in start.stdout
    endpoint = json.loads((workspace.folder / "mine.json").read_text())
    try:
        done = workspace.snakemake(SPECSPLIT_ORCH_TARGET_ADDRESS=endpoint["address"])
        assert done.returncode == 0, done.stdout + done.stderr + workspace.logs()
        runs = sorted(workspace.folder.glob("results/runs/*/run.json"))
        pids = {json.loads(run.read_text())["workers"]["target"]["pid"] for run in runs}
        assert pids == {endpoint["pid"]}
        assert (workspace.folder / "mine.json").exists()
        assert any("worker target" in line for line in workspace.processes())
    finally:
        (workspace.folder / "mine.json").unlink()


@pytest.mark.slow
def test_runs_that_own_their_workers(workspace):
    """workers.lifecycle job: no worker outlives its run; another draft; the record says which process and log."""
    workspace.config |= {"gammas": [1], "drafts": {"less": {"skip_layers": [0]}}}
    workspace.config["workers"]["lifecycle"] = "job"
    workspace.run()
    results = workspace.folder / "results"
    assert not workspace.processes()
    assert not (results / "logs" / "start_worker").exists()
    summary = pd.read_csv(results / "summary.csv")
    summary = summary[summary["setup"] == "workers"]
    assert list(zip(summary["draft"], summary["gamma"], strict=True)) == [("draft", 0), ("less", 1)]
    assert (summary["lossless"] == 1).all()
    run = json.loads((results / "runs" / "draft-less_gamma_1" / "run.json").read_text())
    assert run["workers"]["draft"]["skip_layers"] == [0]
    for role, worker in run["workers"].items():
        assert not worker["attached"]
        assert worker["log"] == f"results/logs/workers/draft-less_gamma_1_{role}.log"
        assert worker["process_started"] is not None
        assert (workspace.folder / worker["log"]).stat().st_size
    assert workspace.planned() == {}


def test_settings_are_data_and_no_code(workspace):
    """An address file may have a space, a quote, a brace or a dollar in its name."""
    name = "my {target} 'of' $HOME.json"
    workspace.config["workers"] |= {"lifecycle": "job", "target_address": name}
    file = "results/settings/gamma_1/operation.json"
    workspace.run("--notemp", target=file)
    told = json.loads((workspace.folder / file).read_text())
    assert told["target"]["attach"] == name
    assert told["run"]["start_workers"] is True
    decides = "results/settings/gamma_1/settings.json"
    workspace.run(target=decides)
    told = json.loads((workspace.folder / decides).read_text())
    assert told["run"]["gamma"] == 1
    assert told["target"]["model"] == "resources/models/tiny/model.json"
    assert "attach" not in told["target"]


@pytest.mark.slow
def test_one_failed_gamma_keeps_the_others(workspace):
    """With --keep-going a run that fails loses nothing of the runs that worked, and the next call makes it."""
    marker = workspace.folder / "fail"
    runner = workspace.folder / "src" / "specsplit" / "experiment" / "runner.py"
    code = runner.read_text()
    condition = f"config.gamma == 3 and Path({str(marker)!r}).exists()"
    guard = f"    if {condition}:\n        raise UserError('on purpose')\n"
    body = "    gpu_before = capture_gpu()\n"
    assert body in code
    runner.write_text(code.replace(body, guard + body))
    marker.touch()
    text = failure(workspace, "--keep-going")
    assert "on purpose" in text
    assert sorted(p.parent.name for p in workspace.folder.glob("results/runs/*/requests.csv")) == ["gamma_0", "gamma_1"]
    marker.unlink()
    assert workspace.planned()["benchmark"] == 1
    workspace.run()


@pytest.mark.slow
def test_a_sweep_of_other_axes_with_layers_that_are_looked_for(workspace):
    """Modes, a tree, auto and a temperature, and a draft made by rule pick_layers, in real runs."""
    workspace.config |= {
        "gammas": [0, 2, "auto"],
        "mode": ["overlap", "lookahead"],
        "tree": "2x2",
        "sampling": {"temperature": 1},
        "dataset": {"path": "prompts.jsonl", "limit": 2},
    }
    workspace.config["draft"] |= {"dtype": "auto", "skip_layers": "auto", "skip_count": 1, "calibration_prompts": 1}
    workspace.run()
    results = workspace.folder / "results"
    points = {"t1_gamma_0", *(f"{m}_2x2_t1_gamma_{g}" for m in ("overlap", "lookahead") for g in (2, "auto"))}
    assert {folder.name for folder in (results / "runs").iterdir()} == points
    summary = pd.read_csv(results / "summary.csv", dtype={"gamma": str})
    summary = summary[summary["setup"] == "workers"]
    assert list(zip(summary["mode"], summary["gamma"], strict=True)) == [
        ("sync", "0"),
        ("overlap", "2"),
        ("overlap", "auto"),
        ("lookahead", "2"),
        ("lookahead", "auto"),
    ]
    assert (summary["lossless"] == 1).all()
    assert summary["speedup"].notna().all()
    assert summary["hit_rate"].notna().tolist() == [False, True, True, True, True]
    rounds = pd.read_csv(results / "per_round.csv", dtype={"gamma": str})
    per_run = rounds.groupby(["mode", "gamma"]).size().to_dict()
    requests = pd.read_csv(results / "requests.csv", dtype={"gamma": str})
    assert per_run == requests.groupby(["mode", "gamma"])["num_rounds"].sum().to_dict()

    measured = (results / "dataset" / "prompts.jsonl").read_text().splitlines()
    calibration = (results / "dataset" / "calibration.jsonl").read_text().splitlines()
    assert (len(measured), len(calibration)) == (2, 1)
    assert not set(measured) & set(calibration)
    search = json.loads((results / "skip_layers" / "draft.json").read_text())
    layers = search["layers"]
    assert len(layers) == 1
    run = json.loads((results / "runs" / "lookahead_2x2_t1_gamma_2" / "run.json").read_text())
    assert run["workers"]["draft"]["skip_layers"] == layers
    assert run["workers"]["draft"]["dtype"] == search["dtype"] == "int8"
    assert workspace.planned() == {}


@pytest.mark.slow
def test_layers_are_not_looked_for_on_measured_prompts(workspace):
    workspace.config["draft"]["skip_layers"] = "auto"
    text = failure(workspace)
    assert "prompts.jsonl has 3 prompts, 3 measured and 0 left" in text
    assert "draft.calibration_prompts asks for 8" in text
