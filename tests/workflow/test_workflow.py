"""The main job, run by Snakemake: outputs, reruns, faults, clear errors."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pandas as pd
import pytest

from specsplit.bench.metrics import REQUEST_COLUMNS
from specsplit.hashing import sha256_file
from specsplit.workers.environment import threads_beside_another

ANALYSIS = {"merge": 1, "figures": 1, "provenance": 1, "summary": 1}


def test_tables_figures_and_record(finished):
    results = finished.folder / "results"
    requests = pd.read_csv(results / "requests.csv")
    assert tuple(requests.columns[:10]) == REQUEST_COLUMNS[:10]
    assert sorted(requests.groupby("gamma").size().items()) == [(0, 3), (1, 3), (3, 3)]
    assert requests["matches_gamma0"].all()
    summary = pd.read_csv(results / "summary.csv")
    assert list(summary["gamma"]) == [0, 1, 3]
    assert summary["speedup"].iloc[0] == 1
    assert (summary["lossless"] == 1).all()
    rounds = pd.read_csv(results / "per_round.csv")
    assert rounds.groupby(["gamma", "request_id"]).size().to_dict() == {
        (row.gamma, row.request_id): row.num_rounds for row in requests.itertuples()
    }
    for name in ("tpot", "acceptance_rate", "ttft", "network_idle", "speculation"):
        assert (results / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (results / "figures" / f"{name}.svg").read_text()
    record = json.loads((results / "provenance" / "provenance.json").read_text())
    not_ok = [item["item"] for item in record["checklist"] if not item["ok"]]
    assert not_ok == ["git commit known"]  # the copy is not a git checkout
    assert {r["path"]: r["sha256"] for r in record["results"]}["results/requests.csv"] == sha256_file(
        results / "requests.csv"
    )
    for run in record["runs"]:
        assert run["argv"][:2] == ["specsplit", "bench"]
        for worker in run["workers"].values():
            assert worker["environment"]["PYTHONHASHSEED"] == "0"
            assert worker["environment"]["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_workers_stop_after_the_last_run(finished):
    assert finished.wait_until(lambda: not finished.processes(), 10), finished.processes()
    assert not list((finished.folder / "results" / "workers").glob("*/*.json"))


def test_nothing_to_do_afterwards(finished):
    assert finished.planned() == {}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"gammas": [0, 1, 2, 3]}, {"start_worker": 2, "benchmark": 1, "resolved_config": 1, **ANALYSIS}),
        ({"gammas": [0, 1]}, {"resolved_config": 1, **ANALYSIS}),
        ({"gammas": [0, 1, 3, "auto"]}, {"start_worker": 2, "benchmark": 1, "resolved_config": 1, **ANALYSIS}),
        ({"mode": ["sync", "lookahead"]}, {"start_worker": 4, "benchmark": 2, "resolved_config": 1, **ANALYSIS}),
        ({"tree": ["chain", "2x2"]}, {"start_worker": 4, "benchmark": 2, "resolved_config": 1, **ANALYSIS}),
        ({"sampling": {"temperature": [0, 1]}}, {"start_worker": 5, "benchmark": 3, "resolved_config": 1, **ANALYSIS}),
        ({"network": {"rtt_ms": [0, 5]}}, {"start_worker": 5, "benchmark": 3, "resolved_config": 1, **ANALYSIS}),
        ({"network": {"jitter_ms": 1}}, {"start_worker": 5, "benchmark": 3, "resolved_config": 1, **ANALYSIS}),
        ({"lookahead": {"fan_out": 2}}, {"resolved_config": 1, "provenance": 1, "summary": 1}),
        ({"sampling": {"top_k": 5}}, {"resolved_config": 1, "provenance": 1, "summary": 1}),
        ({"statistics": {"confidence": 0.9}}, {"resolved_config": 1, **ANALYSIS} | {"merge": 0}),
        ({"draft": {"skip_layers": [0]}}, {"start_worker": 4, "benchmark": 2, "resolved_config": 1, **ANALYSIS}),
        ({"target": {"dtype": "bfloat16"}}, {"start_worker": 5, "benchmark": 3, "resolved_config": 1, **ANALYSIS}),
        ({"workers": {"max_sessions": 2}}, {"resolved_config": 1, "provenance": 1, "summary": 1}),
        ({"faults": {"on_draft_failure": "fail"}}, {"resolved_config": 1, "provenance": 1, "summary": 1}),
        ({"workers": {"gpus": 1}}, {"resolved_config": 1, "provenance": 1, "summary": 1}),
        (
            {"drafts": {"draft": {}, "less": {"skip_layers": [0]}}},
            {"start_worker": 4, "benchmark": 2, "resolved_config": 1, **ANALYSIS},
        ),
        (
            {"models": {"tiny": {"source": "huggingface", "repo": "a/b", "revision": "c"}}},
            {"prepare_model": 1, "start_worker": 5, "benchmark": 3, "resolved_config": 1, **ANALYSIS},
        ),
        (
            {"dataset": {"limit": 2}},
            {"prepare_dataset": 1, "start_worker": 5, "benchmark": 3, "resolved_config": 1, **ANALYSIS},
        ),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_what_a_changed_key_reruns(finished, change, expected):
    kept = finished.config
    finished.config = {
        **kept,
        **{k: {**kept.get(k, {}), **v} if isinstance(v, dict) else v for k, v in change.items()},
    }
    try:
        assert finished.planned() == {rule: count for rule, count in expected.items() if count}
    finally:
        finished.config = kept


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("decoding/verification.py", {"start_worker": 5, "benchmark": 3, **ANALYSIS}),
        ("analysis/figures.py", {"figures": 1, "summary": 1}),
        ("bench/dataset.py", {"prepare_dataset": 1, "start_worker": 5, "benchmark": 3, **ANALYSIS}),
        ("commands/decode.py", {}),
    ],
)
def test_what_changed_code_reruns(finished, file, expected):
    path = finished.folder / "src" / "specsplit" / file
    original, times = path.read_bytes(), (path.stat().st_atime, path.stat().st_mtime)
    path.write_bytes(original + b"\n# changed\n")
    try:
        assert finished.planned() == expected
    finally:
        path.write_bytes(original)
        os.utime(path, times)


def test_a_comment_in_the_configuration_reruns_nothing(finished):
    path = finished.folder / "config" / "config.yaml"
    original = path.read_text()
    path.write_text(f"# A remark.\n{original}\n# Another one.\n")
    try:
        assert finished.planned() == {}
    finally:
        path.write_text(original)


def test_the_report_of_the_experiment_and_that_of_snakemake(finished):
    """One page of our own, whose template decides it alone, and what `snakemake --report` makes of the same results."""
    page = "results/report.html"
    finished.run(target=page)
    text = (finished.folder / page).read_text("utf-8")
    assert "Yes: each of the 6 texts written with a draft" in text
    assert "--gamma 3" in text
    assert finished.planned(target=page) == {}
    template = finished.folder / "src" / "specsplit" / "analysis" / "report.html.j2"
    original, times = template.read_bytes(), (template.stat().st_atime, template.stat().st_mtime)
    template.write_bytes(original + b"<!-- changed -->\n")
    assert finished.planned(target=page) == {"report": 1}
    template.write_bytes(original)
    os.utime(template, times)
    finished.run("--report", "snakemake.html", target=page)
    made = (finished.folder / "snakemake.html").read_text("utf-8")
    for shown in ("Time per output token", "Figures", "Tables", "so the curve has a minimum where one more costs"):
        assert shown in made, shown


def test_gammas_on_the_command_line(finished):
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "-n", "--configfile", "my.yaml"]
    done = subprocess.run(
        [*command, "--config", "gammas=[1,2,3]", "--", "results/summary.csv"],
        cwd=finished.folder,
        env=finished.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "point=gamma_2" in done.stdout + done.stderr


def test_timing_runs_take_every_core(finished):
    text = finished.run("--dry-run", "--forceall")
    benchmarks = text.split("rule benchmark:")[1:]
    assert len(benchmarks) == 3
    assert all("threads: 2" in job for job in benchmarks)


BESIDE = "results/peers.csv results/capacity.csv results/context_curve.csv results/profile.csv"


def test_measurements_beside_the_sweep_are_planned(finished):
    workers = 7 + 3 + 3  # raced: gamma 0 and 3, 5 in two modes; many clients and contexts: gamma 0 and 3
    assert finished.planned(target=BESIDE) == {
        **{"race_peers": 1, "peers": 1, "benchmark_capacity": 1, "capacity": 1, "context_curve": 1, "profile": 1},
        "start_worker": workers + 2,
    }
    text = finished.run("--dry-run", "--printshellcmds", target=BESIDE)
    started = {
        line.split("--endpoint-file ")[1].split()[0]: line for line in text.splitlines() if "start-worker" in line
    }
    assert "--max-sessions 16" in started["results/workers/capacity/gamma_3/target.json"]
    assert "--max-context 4192" in started["results/workers/context/gamma_0/target.json"]
    assert "--max-sessions 8" in started["results/workers/race/gamma_3/draft.json"]
    assert finished.planned() == {}  # none of it is part of the main job


@pytest.mark.slow
def test_measurements_beside_the_sweep(workspace):
    workspace.config |= {
        "baselines": {"peers": ["generate", "assisted"], "gammas": [2], "mode": "overlap"},
        "capacity": {"clients": [3], "gammas": [2], "requests": 4},
        "context": {"lengths": [16, 64], "gammas": [0], "output_tokens": 8, "texts": 1},
        "repeats": 2,
    }
    workspace.run(target=BESIDE)
    results = workspace.folder / "results"
    peers = pd.read_csv(results / "peers.csv")
    assert list(peers["contender"]) == ["gamma_0", "overlap_gamma_2", "hf_assisted", "hf_generate"]
    assert (peers["identical"] == 1).all()
    assert (pd.read_csv(results / "capacity.csv")["matches_single"] == 1).all()
    assert list(pd.read_csv(results / "context_curve.csv")["context_tokens"]) == [16, 64]
    assert set(pd.read_csv(results / "profile.csv")["phase"]) == {"prefill", "decode"}
    for name in ("peers", "capacity", "context_curve", "profile"):
        assert (results / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert workspace.planned(target=BESIDE) == {}


def test_workers_that_compute_at_once_share_the_cores(workspace):
    workspace.config |= {"gammas": [0, 2], "mode": ["sync", "lookahead"]}
    del workspace.config["workers"]["threads"]

    def threads() -> dict[str, list[str]]:
        text = workspace.run("--dry-run", "--printshellcmds")
        commands = [line for line in text.splitlines() if "specsplit start-worker" in line]
        found = {
            re.search(r"workers/(\w+/\w+)\.json", line)[1]: re.findall(r"--threads (\d+)", line) for line in commands
        }
        assert len(found) == 5
        return found

    half = [str(threads_beside_another())]
    pair = {"lookahead_gamma_2/draft", "lookahead_gamma_2/target"}
    assert {worker: half if worker in pair else [] for worker in threads()} == threads()
    workspace.config["workers"]["device"] = "cuda"
    assert not any(threads().values())
    workspace.config["workers"] |= {"device": "cpu", "threads": 3}
    assert all(found == ["3"] for found in threads().values())


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_killed_run_leaves_nothing_and_the_next_finishes(workspace, how):
    workspace.config["generation"] = {"max_output_tokens": 100, "ignore_eos": True}
    process = workspace.start()
    try:
        benchmark = "results/runs/gamma_*/requests.csv.part"
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
    workspace.run()
    requests = pd.read_csv(workspace.folder / "results" / "requests.csv")
    assert not requests.duplicated(["gamma", "request_id"]).any()
    assert len(requests) == 9


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
    assert "prompts.jsonl:4: the prompt is empty" in failure(workspace)
    workspace.config["dataset"]["on_bad_line"] = "skip"
    workspace.run("--until", "prepare_dataset")
    manifest = json.loads((workspace.folder / "results" / "dataset" / "manifest.json").read_text())
    assert [bad["line"] for bad in manifest["skipped"]] == [4]


def test_dead_worker_address(workspace):
    workspace.config["workers"]["target_address"] = "127.0.0.1:1"
    text = failure(workspace)
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


def test_runs_that_own_their_workers(workspace):
    """workers.lifecycle job: no worker outlives its run; another draft; the record says which process and log."""
    workspace.config |= {"gammas": [1], "drafts": {"less": {"skip_layers": [0]}}}
    workspace.config["workers"]["lifecycle"] = "job"
    workspace.run()
    results = workspace.folder / "results"
    assert not workspace.processes()
    assert not (results / "logs" / "start_worker").exists()
    summary = pd.read_csv(results / "summary.csv")
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


def test_flags_of_own_workers_are_quoted_twice(workspace):
    """Once for the shell, once for bench: an address file may have a space in its name."""
    workspace.config["workers"] |= {"lifecycle": "job", "target_address": "my target.json"}
    text = workspace.run("--dry-run", "--printshellcmds")
    commands = [shlex.split(line) for line in text.splitlines() if "specsplit bench" in line]
    assert len(commands) == 3
    for command in commands:
        target = shlex.split(command[command.index("--start-target") + 1])
        assert target[target.index("--attach") + 1] == "my target.json"
        assert target[target.index("--model") + 1] == "resources/models/tiny/model.json"


@pytest.mark.slow
def test_one_failed_gamma_keeps_the_others(workspace):
    """With --keep-going a run that fails loses nothing of the runs that worked, and the next call makes it."""
    marker = workspace.folder / "fail"
    runner = workspace.folder / "src" / "specsplit" / "bench" / "runner.py"
    code = runner.read_text()
    condition = f"config.max_draft_tokens == 3 and Path({str(marker)!r}).exists()"
    guard = f"    if {condition}:\n        raise UserError('on purpose')\n"
    body = "    run_dir.mkdir(parents=True, exist_ok=True)\n"
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
    workspace.config["draft"] |= {"skip_layers": "auto", "skip_count": 1, "calibration_prompts": 1}
    workspace.run()
    results = workspace.folder / "results"
    points = {"t1_gamma_0", *(f"{m}_2x2_t1_gamma_{g}" for m in ("overlap", "lookahead") for g in (2, "auto"))}
    assert {folder.name for folder in (results / "runs").iterdir()} == points
    summary = pd.read_csv(results / "summary.csv", dtype={"gamma": str})
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
    layers = json.loads((results / "skip_layers" / "draft.json").read_text())["layers"]
    assert len(layers) == 1
    run = json.loads((results / "runs" / "lookahead_2x2_t1_gamma_2" / "run.json").read_text())
    assert run["workers"]["draft"]["skip_layers"] == layers
    assert workspace.planned() == {}


def test_layers_are_not_looked_for_on_measured_prompts(workspace):
    workspace.config["draft"]["skip_layers"] = "auto"
    text = failure(workspace)
    assert "prompts.jsonl has 3 prompts, 3 of them measured: 0 are left" in text
    assert "draft.calibration_prompts asks for 8" in text
