"""The main job, run by Snakemake: outputs, what reruns, the archive and the commands that repeat it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM

from specsplit.analysis.captions import FIGURES
from specsplit.experiment.columns import REQUEST_COLUMNS
from specsplit.io import sha256_file
from tiny_heads import make_tiny_head, save_tiny_head

from tiny_models import make_tokenizer

ARCHIVE = "results/archive.zip"
ANALYSIS = {"merge": 1, "figures": 1, "provenance": 1, "summary": 1}


def test_tables_figures_and_record(finished):
    results = finished.folder / "results"
    requests = pd.read_csv(results / "requests.csv")
    assert tuple(requests.columns[:10]) == REQUEST_COLUMNS[:10]
    assert sorted(requests.groupby("gamma").size().items()) == [(0, 3), (3, 3)]
    assert requests["matches_gamma0"].all()
    every = pd.read_csv(results / "summary.csv")
    assert (every["lossless"] == 1).all()
    summary = every[every["setup"] == "workers"]
    assert list(every.loc[every["setup"] == "target_streamed", "gamma"]) == [0]
    assert list(every.loc[every["setup"] == "colocated", "gamma"]) == [0, 3]
    assert every[["speedup_over_streamed", "speedup"]].notna().all(axis=None)
    reference = pd.read_csv(results / "reference.csv")
    assert reference["matches_gamma0"].all()
    assert reference.groupby(["run_gamma", "setup"]).size().to_list() == [3] * 5
    assert list(summary["gamma"]) == [0, 3]
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


def also(*row):
    """A row of a table for `make test-all`."""
    return pytest.param(*row, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"gammas": [0, 2, 3]},
            {"start_worker": 2, "benchmark": 1, "settings": 3, "operation": 1, **ANALYSIS},
        ),
        also({"gammas": [0]}, {"settings": 2, **ANALYSIS}),
        also(
            {"gammas": [0, 3, "auto"]},
            {"start_worker": 2, "benchmark": 1, "settings": 3, "operation": 1, **ANALYSIS},
        ),
        also(
            {"mode": ["sync", "lookahead"]},
            {"start_worker": 2, "benchmark": 1, "settings": 3, "operation": 1, **ANALYSIS},
        ),
        also(
            {"tree": ["chain", "2x2"]},
            {"start_worker": 2, "benchmark": 1, "settings": 3, "operation": 1, **ANALYSIS},
        ),
        also(
            {"sampling": {"temperature": [0, 1]}},
            {"start_worker": 3, "benchmark": 2, "settings": 4, "operation": 2, **ANALYSIS},
        ),
        (
            {"network": {"rtt_ms": [0, 5]}},
            {"start_worker": 3, "benchmark": 2, "settings": 4, "operation": 2, **ANALYSIS},
        ),
        also(
            {"network": {"jitter_ms": 1}},
            {"start_worker": 3, "benchmark": 2, "settings": 3, **ANALYSIS},
        ),
        ({"lookahead": {"fan_out": 2}}, {"settings": 1, "provenance": 1, "summary": 1}),
        also({"sampling": {"top_k": 5}}, {"settings": 1, "provenance": 1, "summary": 1}),
        also({"keep_apart": True}, {"settings": 2, **ANALYSIS}),
        ({"statistics": {"confidence": 0.9}}, {"settings": 3, **ANALYSIS} | {"merge": 0}),
        (
            {"draft": {"skip_layers": [0]}},
            {"start_worker": 2, "benchmark": 1, "settings": 2, **ANALYSIS},
        ),
        also(
            {"target": {"dtype": "bfloat16"}},
            {"start_worker": 3, "benchmark": 2, "settings": 3, **ANALYSIS},
        ),
        also({"workers": {"max_sessions": 2}}, {"operation": 2, "settings": 1, "provenance": 1, "summary": 1}),
        (
            {"workers": {"gpus": 1, "token_file": "secrets/token", "tls_ca": "ca.pem", "cache_memory_mb": 99}},
            {"operation": 2, "settings": 1, "provenance": 1, "summary": 1},
        ),
        also(
            {"faults": {"on_draft_failure": "fail"}},
            {"operation": 2, "settings": 1, "provenance": 1, "summary": 1},
        ),
        also(
            {"drafts": {"draft": {}, "less": {"skip_layers": [0]}}},
            {"start_worker": 2, "benchmark": 1, "settings": 3, "operation": 1, **ANALYSIS},
        ),
        also(
            {"models": {"tiny": {"source": "huggingface", "repo": "a/b", "revision": "c"}}},
            {
                **{"prepare_model": 1, "prepare_dataset": 1, "start_worker": 3, "benchmark": 2, "settings": 2},
                **ANALYSIS,
            },
        ),
        also(
            {"dataset": {"limit": 2}},
            {"prepare_dataset": 1, "start_worker": 3, "benchmark": 2, "settings": 2, **ANALYSIS},
        ),
        (  # the job says that it is not there
            {"dataset": {"path": "misspelt.jsonl"}},
            {"prepare_dataset": 1, "start_worker": 3, "benchmark": 2, "settings": 2, **ANALYSIS},
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
        ("decoding/verification.py", {"settings": 1, "start_worker": 3, "benchmark": 2, **ANALYSIS}),
        ("analysis/figures.py", {"settings": 2, "figures": 1, "summary": 1}),
        (
            "experiment/dataset.py",
            {"settings": 2, "prepare_dataset": 1, "start_worker": 3, "benchmark": 2, **ANALYSIS},
        ),
        ("cli/generate.py", {}),
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


@pytest.mark.slow
@pytest.mark.parametrize("lifecycle", ["workflow", "job"])
def test_workers_that_want_a_token_and_no_trace_of_it(workspace, lifecycle):
    """The workers that the workflow starts ask for it, its clients have it, and it is in no file that is left."""
    token = "0123456789abcdef-of-this-test"
    (workspace.folder / "token").write_text(token)
    (workspace.folder / "token").chmod(0o600)
    workspace.config |= {"gammas": [0, 1]}
    workspace.config["workers"] |= {"token_file": "token", "lifecycle": lifecycle}
    workspace.run(target="results/summary.csv results/report.html")
    (workspace.folder / "token").rename(workspace.folder.parent / f"token-{lifecycle}")
    found = [path for path in workspace.folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert found == []
    run = json.loads((workspace.folder / "results/runs/gamma_1/run.json").read_text())
    assert run["orchestrator"]["token_file"] == "token"
    logs = list((workspace.folder / "results/logs/workers").glob("*.log"))
    assert logs
    assert not any("UNAUTHENTICATED" in log.read_text() for log in logs)


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
    assert "Yes: each of the 3 texts written with a draft" in text
    assert "--settings results/settings/gamma_3/settings.json" in text
    assert finished.planned(target=page) == {}
    template = finished.folder / "src" / "specsplit" / "analysis" / "report.html.j2"
    original, times = template.read_bytes(), (template.stat().st_atime, template.stat().st_mtime)
    template.write_bytes(original + b"<!-- changed -->\n")
    assert finished.planned(target=page) == {"settings": 1, "report": 1}
    template.write_bytes(original)
    os.utime(template, times)
    finished.run("--report", "snakemake.html", target=page)
    made = (finished.folder / "snakemake.html").read_text("utf-8")
    for shown in (FIGURES["tpot"], "Figures", "Tables", "so the curve has a minimum where one more costs"):
        assert shown in made, shown


def test_gammas_on_the_command_line(finished):
    assert "point=gamma_2" in finished.run("--dry-run", "--config", "gammas=[1,2,3]")


def test_timing_runs_take_every_core(finished):
    text = finished.run("--dry-run", "--forceall")
    benchmarks = text.split("rule benchmark:")[1:]
    assert len(benchmarks) == 2
    assert all("threads: 2" in job for job in benchmarks)


NAMES = ("peers", "capacity", "openai_load", "context_curve", "hidden_states", "profile")
BESIDE = " ".join(f"results/{name}.csv" for name in NAMES)


def settings_of(workspace, *names):
    """What is in files of results/settings, which are removed again."""
    paths = [f"results/settings/{name}.json" for name in names]
    workspace.run("--notemp", target=" ".join(paths))
    told = [json.loads((workspace.folder / path).read_text()) for path in paths]
    for path in paths:
        (workspace.folder / path).unlink()
    return told


def test_measurements_beside_the_sweep_are_planned(finished):
    # Raced: gamma 0 and 3, 5 in two modes; many clients and contexts: gamma 0 and 3; hidden states: draft and head.
    workers = 7 + 3 + 3 + 4
    assert finished.planned(target=BESIDE) == {
        **{"race_peers": 1, "peers": 1, "benchmark_capacity": 1, "capacity": 1, "context_curve": 1, "profile": 1},
        **{"openai_load": 1, "hidden_states": 1},
        "start_worker": workers + 2,
        "settings": 23,
        "operation": 15,
    }
    capacity, context, race, states = settings_of(
        finished,
        *("capacity/gamma_3/operation", "context/gamma_0/settings"),
        *("race/gamma_3/operation", "states_cost/draft-head_gamma_3/settings"),
    )
    assert capacity["target"]["max_sessions"] == 16
    assert context["target"]["max_context"] == 4192
    assert states["target"]["hidden_states_draft"] == "resources/models/tiny/model.json"
    assert race["draft"]["max_sessions"] == 8
    assert finished.planned() == {}  # none of it is part of the main job
    specsplit(finished, "seal", "--output", "results/provenance/SHA256SUMS")  # without what `settings_of` has removed


@pytest.mark.slow
def test_measurements_beside_the_sweep(workspace, tmp_path_factory):
    target = AutoModelForCausalLM.from_pretrained(workspace.config["models"]["tiny"]["path"], dtype="float32")
    head = save_tiny_head(make_tiny_head(target), tmp_path_factory.mktemp("head"), make_tokenizer())
    workspace.config["models"]["head"] = {"source": "local", "path": str(head)}
    workspace.config |= {
        "baselines": {"peers": ["generate", "assisted"], "gammas": [2], "mode": "overlap"},
        "capacity": {"clients": [3], "gammas": [2], "requests": 12},
        "context": {"lengths": [16, 64], "gammas": [0], "output_tokens": 8, "texts": 1},
        "states_cost": {"draft": "tiny", "head": "head", "rtt_ms": [0], "bandwidth_mbit": [0, 10]},
        "repeats": 2,
    }
    workspace.run(target=BESIDE)
    results = workspace.folder / "results"
    peers = pd.read_csv(results / "peers.csv")
    assert list(peers["contender"]) == ["gamma_0", "overlap_gamma_2", "hf_assisted", "hf_generate"]
    assert (peers["identical"] == 1).all()
    assert (pd.read_csv(results / "capacity.csv")["matches_single"] == 1).all()
    assert list(pd.read_csv(results / "openai_load.csv")["gamma"]) == [0, 0, 2, 2]
    assert list(pd.read_csv(results / "context_curve.csv")["context_tokens"]) == [16, 64]
    shipped = pd.read_csv(results / "hidden_states.csv")
    assert list(shipped["draft"]) == (["draft"] + ["head"] * 4) * 2
    assert (shipped["lossless"] == 1).all()
    assert set(pd.read_csv(results / "profile.csv")["phase"]) == {"prefill", "decode"}
    for name in ("peers", "capacity", "context_curve", "hidden_states", "profile"):
        assert (results / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert workspace.planned(target=BESIDE) == {}


# ---- the archive


def run(workspace, *command):
    done = subprocess.run(
        command, cwd=workspace.folder, env=workspace.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def specsplit(workspace, *arguments):
    return run(workspace, sys.executable, "-m", "specsplit", "provenance", *arguments)


def test_archive(finished):
    run(finished, *finished.command(target=ARCHIVE))
    archive = finished.folder / ARCHIVE
    for where in (ARCHIVE, "results"):
        assert " files as recorded, 0 not" in specsplit(finished, "verify", where)
    with zipfile.ZipFile(archive) as packed:
        assert {"my.yaml", "results/report.html"} <= set(packed.namelist())
        record = json.loads(packed.read("results/provenance/provenance.json"))
        crate = json.loads(packed.read("ro-crate-metadata.json"))
    assert record["workflow"]["command"].startswith("snakemake --cores 2 --configfile my.yaml")
    assert record["workflow"]["cores"] == 2
    for label in ("gamma_0", "gamma_3"):
        (item,) = (made for made in record["runs"] if label in made["file"])
        # Snakemake gives each run its threads, and they decide the last bits of a result.
        assert item["environment"]["OMP_NUM_THREADS"] == "2"
        for role, worker in item["workers"].items():
            assert worker["log"] == f"results/logs/workers/{role}.log"
            assert worker["runtime"]["deterministic_algorithms"] == "warn only"
            assert item["seeds"][f"{role}_worker"] == 0
    # Every job has its command or script, and its times.
    jobs = {entity["@id"]: entity for entity in crate["@graph"] if entity["@id"].startswith("#job/")}
    rules = {identifier.split("/")[1] for identifier in jobs}
    assert rules == {
        *("prepare_dataset", "prepare_model", "settings", "benchmark"),
        *("merge", "figures", "provenance", "summary", "report"),
    }
    assert all(job["startTime"] < job["endTime"] for job in jobs.values())
    assert "specsplit bench --only" in jobs["#job/benchmark/results/runs/gamma_3/outputs.jsonl"]["description"]
    assert finished.planned() == {}


@pytest.mark.slow
def test_what_reproduce_prints_gives_the_same_results(finished, tmp_path):
    """Same seed, same machine: only times differ. All is run but the installation."""
    run(finished, *finished.command(target=ARCHIVE))
    script = specsplit(finished, "reproduce", ARCHIVE)
    lines = ['export PYTHONPATH="$PWD/src"' if line.startswith("make ") else line for line in script.splitlines()]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=tmp_path,
        env=finished.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "Only times differ."
