"""Results are joined when the facts that their runs recorded agree, and else refused, or kept apart where asked."""

from __future__ import annotations

import copy
import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from specsplit.analysis.merging import merge_runs, read_tables
from specsplit.analysis.series import check_beside
from specsplit.analysis.tables import summarize
from specsplit.errors import UserError
from specsplit.io import read_json, write_csv, write_json
from specsplit.provenance.facts import differences, run_facts, told_apart, told_facts
from specsplit.provenance.run_file import write_run as write_run_file
from specsplit.settings.run import OrchestratorConfig
from specsplit.workflow.plan import Plan

from experiments import NO_GPU, make_run, specsplit
from test_tables import a_request, a_round

CONFIG = Path(__file__).parents[2] / "config" / "config.yaml"
GPU = {"name": "H100", "uuid": "GPU-1", "driver_version": "550", "memory_total_mib": 81559.0}


def full_run(gamma: int = 2, draft: str = "draft", **settings: Any) -> dict[str, Any]:
    """A run.json with every fact."""
    run = make_run(gamma)
    run["orchestrator"] = OrchestratorConfig(gamma=gamma, draft_name=draft, **settings).model_dump(mode="json")
    run |= {"worker_code_sha256": "c" * 64, "repeats": 1, "warmup_requests": 1, "specsplit_version": "1"}
    run["inputs"] = {"prompts": {"path": "prompts.jsonl", "sha256": "d" * 64, "count": 2}}
    run["gpu"]["before"] = {**NO_GPU, "available": True, "gpus": [GPU], "cuda_version": "12.4"}
    run["software"] = {"packages": {"torch": "2.11", "numpy": "2.0", "pytest": "8"}}
    for worker in run["workers"].values():
        worker |= {"max_context": 128, "version": "1", "skip_layers": [], "packages": dict(run["software"]["packages"])}
        worker["runtime"] |= {"engine": "FusedLM", "gpu": "H100", "kernel": "Linux 6"}
    return copy.deepcopy(run)


# Where a fact is in run.json, another value, and what is said. One line a fact.
FACTS = [
    ("inputs.prompts.sha256", "e" * 64, "prompts: sha256"),
    ("inputs.prompts.count", 3, "prompts: count"),
    ("tokenizer_sha256", "e" * 64, "tokenizer"),
    ("run_code_sha256", "e" * 64, "code: run_code_sha256"),
    ("worker_code_sha256", "e" * 64, "code: worker_code_sha256"),
    ("specsplit_version", "2", "code: specsplit_version"),
    ("repeats", 3, "repeats"),
    ("warmup_requests", 0, "warmup_requests"),
    ("orchestrator.max_output_tokens", 64, "setting max_output_tokens"),
    ("orchestrator.max_rounds", 5, "setting max_rounds"),
    ("orchestrator.use_chat_template", False, "setting use_chat_template"),
    ("orchestrator.ignore_eos", True, "setting ignore_eos"),
    ("orchestrator.stop_token_ids", [7], "setting stop_token_ids"),
    ("orchestrator.max_context", 99, "setting max_context"),
    ("orchestrator.seed", 99, "setting seed"),
    ("machine.cpu_model", "another", "machine: cpu_model"),
    ("machine.cores_usable", 999, "machine: cores_usable"),
    ("machine.cores_logical", 999, "machine: cores_logical"),
    ("machine.architecture", "another", "machine: architecture"),
    ("machine.os", "another", "machine: os"),
    ("machine.python", "another", "machine: python"),
    ("gpu.before.gpus", [{**GPU, "name": "T4"}], "gpu: name"),
    ("gpu.before.gpus", [{**GPU, "driver_version": "560"}], "gpu: driver_version"),
    ("gpu.before.gpus", [{**GPU, "memory_total_mib": 1.0}], "gpu: memory"),
    ("gpu.before.gpus", [], "gpu: name"),
    ("gpu.before.cuda_version", "13", "gpu: cuda_version"),
    ("environment.PYTHONHASHSEED", "1", "variable PYTHONHASHSEED"),
    ("software.packages.torch", "2.12", "package torch"),
    ("workers.target.weights_sha256", "e" * 64, "target worker: weights_sha256"),
    ("workers.target.tokenizer_sha256", "e" * 64, "target worker: tokenizer_sha256"),
    ("workers.target.dtype", "bfloat16", "target worker: dtype"),
    ("workers.target.device", "cuda:0", "target worker: device"),
    ("workers.target.threads", 1, "target worker: threads in mode sync"),
    ("workers.target.max_context", 64, "target worker: max_context"),
    ("workers.target.version", "2", "target worker: version"),
    ("workers.target.runtime.engine", "CausalLM", "target worker: engine"),
    ("workers.target.runtime.torch", "3", "target worker: torch"),
    ("workers.target.runtime.cpu", "another", "target worker: cpu"),
    ("workers.target.runtime.gpu", "T4", "target worker: gpu"),
    ("workers.target.runtime.driver", "560", "target worker: driver"),
    ("workers.target.runtime.seed", "8", "target worker: seed"),
    ("workers.target.packages.numpy", "3.0", "target worker: package numpy"),
    ("workers.target.environment.CUBLAS_WORKSPACE_CONFIG", "", "target worker: CUBLAS_WORKSPACE_CONFIG"),
    ("workers.draft.weights_sha256", "e" * 64, "draft worker: weights_sha256"),
    ("workers.draft.skip_layers", [3], "draft worker: skip_layers"),
    ("workers.draft.dtype", "bfloat16", "draft worker: dtype"),
]
# What decides no row, and is nothing to refuse.
OPERATION = [
    ("started", "2026-01-31T12:00:00Z"),
    ("command", "another"),
    ("machine.hostname", "node-7"),
    ("machine.kernel", "Linux 7"),
    ("machine.memory_bytes", 1),
    ("orchestrator.draft_address", "b:1"),
    ("orchestrator.rpc_timeout_s", 1.0),
    ("orchestrator.gamma", 5),
    ("orchestrator.mode", "overlap"),
    ("orchestrator.tree", "3x2"),
    ("orchestrator.temperature", 0.7),
    ("orchestrator.rtt_ms", 14.0),
    ("workers.target.pid", 5),
    ("workers.target.address", "a:2"),
    ("workers.target.runtime.host", "node-7"),
    ("software.packages.pytest", "9"),
    ("gpu.before.gpus", [{**GPU, "uuid": "GPU-2"}]),
]


def changed(run: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    run = copy.deepcopy(run)
    *folders, key = place.split(".")
    part = run
    for folder in folders:
        part = part[folder]
    assert key in part
    part[key] = value
    return run


@pytest.mark.parametrize(("place", "value", "fact"), FACTS)
def test_a_fact_that_differs(place: str, value: Any, fact: str) -> None:
    runs = {"a": full_run(), "b": full_run(), "c": changed(full_run(), place, value)}
    facts = {name: run_facts(run) for name, run in runs.items()}
    found = {each.fact: each for each in differences(facts)}
    assert fact in found
    assert list(found[fact].values.values()) == [["a", "b"], ["c"]]
    assert told_apart(facts) == {"a": 1, "b": 1, "c": 2}


@pytest.mark.parametrize(("place", "value"), OPERATION)
def test_what_is_no_fact(place: str, value: Any) -> None:
    runs = {"a": full_run(), "b": changed(full_run(), place, value)}
    assert differences({name: run_facts(run) for name, run in runs.items()}) == []


def test_every_setting_of_a_run_is_an_axis_a_fact_or_operates() -> None:
    """The next setting is a fact, unless somebody says that it is not."""
    facts = run_facts(full_run(mode="lookahead"))
    axes = {"gamma", "mode", "tree", "draft_name", "sampling", "temperature", "top_k", "top_p"}
    axes |= {"rtt_ms", "jitter_ms", "bandwidth_mbit"}
    named = {fact.removeprefix("setting ") for fact in facts if fact.startswith("setting ")}
    assert named | axes | OrchestratorConfig.operating() == set(OrchestratorConfig.model_fields)
    assert not named & axes


def test_facts_of_the_axes() -> None:
    """Drafts have models of their own, modes threads of their own, and fan_out is nothing outside lookahead."""
    small = changed(full_run(draft="small"), "workers.draft.weights_sha256", "e" * 64)
    overlap = changed(full_run(mode="overlap"), "workers.target.threads", 1)
    others = {"plain": full_run(fan_out=4), "small": small, "overlap": overlap, "alone": full_run(0)}
    others["forced"] = full_run(draft="forced", draft_acceptance=0.5)
    others["looks up"] = full_run(draft="draft-lookup2", lookup=2)
    others["is sure"] = full_run(draft="sure", p_min=0.3)
    assert differences({name: run_facts(run) for name, run in others.items()}) == []
    looking = {str(n): run_facts(full_run(mode="lookahead", fan_out=n)) for n in (4, 8)}
    assert [each.fact for each in differences(looking)] == ["setting fan_out"]


def test_all_runs_of_a_sweep_over_every_axis_belong_together() -> None:
    """Of the shipped configuration with more values: what the workflow asks of its runs differs in axes alone."""
    config = yaml.safe_load(CONFIG.read_text())
    config |= {"gammas": [0, 2], "mode": ["sync", "lookahead"], "tree": ["chain", "3x2"]}
    config["drafts"] = {"draft": {}, "forced": {"acceptance": 0.5}, "int8": {"dtype": "int8", "lookup": [3]}}
    config["sampling"]["temperature"] = [0, 0.7]
    config["network"] |= {"rtt_ms": [0], "bandwidth_mbit": [0, 100]}
    plan = Plan(config)
    facts = {}
    for label in plan.points:
        settings = json.loads(plan.settings(label, operates=False))["run"]
        known = {key: value for key, value in settings.items() if key in OrchestratorConfig.model_fields}
        run = full_run(known["gamma"])
        run["orchestrator"] = OrchestratorConfig(**known).model_dump(mode="json")
        facts[label] = run_facts(run)
    assert len(facts) > 50
    assert [str(each) for each in differences(facts)] == []


def test_what_is_told_of_hosts_and_packages() -> None:
    runs = {"a": full_run(), "b": changed(full_run(), "machine.hostname", "node-7")}
    runs["c"] = changed(full_run(), "workers.target.packages.pytest", "9")
    told = {each.fact for each in differences({name: told_facts(run) for name, run in runs.items()})}
    assert told == {"host", "target worker: package pytest"}


# ---- folders


def write_run(folder: Path, gamma: int, run: dict[str, Any], ms: float, **cells: Any) -> Path:
    folder.mkdir(parents=True)
    rows = {
        "requests.csv": [a_request(name, gamma, total_latency_ms=ms, **cells) for name in ("a", "b")],
        "per_round.csv": [a_round(name, gamma, number, 0) for name in ("a", "b") for number in (1, 2)],
    }
    for name, records in rows.items():
        with (folder / name).open("w", newline="") as file:
            table = csv.DictWriter(file, list(asdict(records[0])))
            table.writeheader()
            table.writerows(map(asdict, records))
    write_run_file(folder / "run.json", run, [])
    return folder


@pytest.fixture
def two_experiments(tmp_path: Path) -> Path:
    """Gamma 0 on a slow machine, and gamma 2 on it and on one that is ten times as fast."""
    fast = changed(full_run(), "machine.cpu_model", "ten times as fast")
    write_run(tmp_path / "runs" / "gamma_0", 0, full_run(0), 1000)
    write_run(tmp_path / "runs" / "gamma_2", 2, full_run(), 900)
    write_run(tmp_path / "runs" / "fast_gamma_2", 2, fast, 100)
    return tmp_path


def without(run: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key not in keys}


# An edit of a run folder, and what is said of it. One line an edit.
EDITS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("requests.csv", lambda file: file.write_text(file.read_text().replace("900", "90")), "is not what was measured"),
    ("per_round.csv", lambda file: file.write_text(file.read_text() + "\n"), "is not what was measured"),
    ("outputs.jsonl", Path.unlink, "no such file"),
    ("run.json", lambda file: write_json(file, changed(read_json(file), "started", "1999")), "was edited after"),
    ("run.json", lambda file: write_json(file, {**read_json(file), "files": {}}), "was edited after"),
    ("run.json", lambda file: write_json(file, without(read_json(file), "files", "sha256")), "was edited after"),
]


@pytest.mark.parametrize(("name", "edit", "said"), EDITS)
def test_a_run_that_was_edited_is_joined_nowhere(
    two_experiments: Path, name: str, edit: Callable[[Path], Any], said: str
) -> None:
    shutil.rmtree(two_experiments / "runs" / "fast_gamma_2")
    run = two_experiments / "runs" / "gamma_2"
    (run / "outputs.jsonl").write_text("{}\n")
    write_run_file(run / "run.json", full_run(), [run / f for f in ("requests.csv", "per_round.csv", "outputs.jsonl")])
    assert merge(two_experiments)[0] == 0
    edit(run / name)
    for command in ("merge", "analyze", "report"):
        status, printed = specsplit(command, "--results-dir", two_experiments)
        assert (status, said in printed, name in printed) == (2, True, True), printed


# Where a fact is in what a measurement beside the sweep tells, and another value. None: it may differ.
BESIDE = [
    ("machine.cpu_model", "another", "machine: cpu_model"),
    ("inputs.prompts.sha256", "e" * 64, "prompts: sha256"),
    ("tokenizer_sha256", "e" * 64, "tokenizer"),
    ("worker_code_sha256", "e" * 64, "code: worker_code_sha256"),
    ("orchestrator.max_output_tokens", 7, "setting max_output_tokens"),
    ("workers.target.weights_sha256", "e" * 64, "target worker: weights_sha256"),
    ("workers.target.runtime.engine", "CausalLM", "target worker: engine"),
    ("workers.draft.dtype", "bfloat16", "draft worker: dtype"),
    ("workers.target.threads", 1, None),
    ("workers.target.max_context", 64, None),
    ("inputs.prompts.count", 1, None),
    ("run_code_sha256", "e" * 64, None),
    ("orchestrator.max_rounds", 5, None),
]


@pytest.mark.parametrize(("place", "value", "fact"), BESIDE)
def test_a_table_beside_the_sweep_that_is_of_another_experiment(
    two_experiments: Path, place: str, value: Any, fact: str | None
) -> None:
    shutil.rmtree(two_experiments / "runs" / "fast_gamma_2")
    assert merge(two_experiments)[0] == 0
    requests, _ = read_tables(two_experiments)
    table = two_experiments / "capacity.csv"
    table.write_text("a\n1\n")
    check_beside(two_experiments, requests, "capacity")  # of an earlier version: it tells nothing
    run = changed(full_run(), place, value)
    run["ours"] = {"0": {"workers": run.pop("workers")}}
    write_run_file(two_experiments / "capacity_run.json", run, [table])
    if fact is None:
        check_beside(two_experiments, requests, "capacity")
        return
    with pytest.raises(UserError, match=rf"(?s){fact}.*runs/gamma_2.*capacity\.csv.*Delete"):
        check_beside(two_experiments, requests, "capacity")
    table.write_text("a\n2\n")
    with pytest.raises(UserError, match="is not what was measured"):
        check_beside(two_experiments, requests, "capacity")


def merge(folder: Path, *flags: str) -> tuple[int, str]:
    return specsplit("merge", "--results-dir", folder, *flags)


def test_two_experiments_in_one_folder_are_refused(two_experiments: Path) -> None:
    status, printed = merge(two_experiments)
    assert status == 2
    own = full_run()["machine"]["cpu_model"]
    for part in (
        "do not belong together",
        "machine: cpu_model",
        own,
        "ten times as fast",
        "fast_gamma_2",
        "runs/gamma_0",
    ):
        assert part in printed
    assert "--keep-apart" in printed
    assert not (two_experiments / "requests.csv").exists()


def test_two_experiments_that_are_kept_apart(two_experiments: Path) -> None:
    status, printed = merge(two_experiments, "--keep-apart")
    assert status == 0, printed
    requests, rounds = read_tables(two_experiments)
    assert sorted(requests["series"].value_counts()) == [2, 4]
    summary = summarize(requests, rounds, bootstrap_samples=100)
    assert len(summary) == 3
    speedups = {(row["series"], row["gamma"]): row["speedup"] for _, row in summary.iterrows()}
    (alone,) = (series for series, gamma in speedups if gamma == 0)
    assert speedups[alone, 2] == pytest.approx(1000 / 900)  # and not 10
    assert sum(speedup != speedup for speedup in speedups.values()) == 1  # none without a gamma 0 of its own
    status, printed = specsplit("analyze", "--results-dir", two_experiments, "--bootstrap-samples", "100")
    assert status == 0, printed
    assert "series" in (two_experiments / "summary.csv").read_text().splitlines()[0]
    assert specsplit("profile", "--results-dir", two_experiments)[0] == 0


@pytest.mark.parametrize("command", ["analyze", "report", "profile"])
def test_tables_whose_runs_changed_since(two_experiments: Path, command: str) -> None:
    shutil.rmtree(two_experiments / "runs" / "fast_gamma_2")
    assert merge(two_experiments)[0] == 0
    run = two_experiments / "runs" / "gamma_2" / "run.json"
    edited = changed(read_json(run), "workers.target.weights_sha256", "e" * 64)
    write_run_file(run, without(edited, "sha256"), [])
    status, printed = specsplit(command, "--results-dir", two_experiments)
    assert status == 2
    assert "target worker: weights_sha256" in printed
    # A folder of a configuration that the tables do not have is not of this sweep.
    run.parent.rename(run.parents[1] / "gamma_9")
    write_run_file(run.parents[1] / "gamma_9" / "run.json", changed(full_run(9), "machine.cpu_model", "another"), [])
    assert read_tables(two_experiments)[0]["gamma"].nunique() == 2


@pytest.mark.parametrize(("name", "value"), [("prompt_length", 99), ("seed", 99), ("category", "another")])
def test_requests_of_one_name_that_are_not_the_same(tmp_path: Path, name: str, value: Any) -> None:
    """What the tables tell themselves, without a run.json."""
    runs = [write_run(tmp_path / "a", 0, {}, 5), write_run(tmp_path / "b", 2, {}, 5, **{name: value})]
    with pytest.raises(
        UserError, match=rf"request a has {name} .* in .*a/requests\.csv and {value} in .*b/requests\.csv"
    ):
        merge_runs(runs)


def test_a_plain_sweep_has_no_series(two_experiments: Path) -> None:
    shutil.rmtree(two_experiments / "runs" / "fast_gamma_2")
    requests, rounds = merge_runs(sorted((two_experiments / "runs").iterdir()), keep_apart=True)
    assert "series" not in requests
    write_csv(requests, two_experiments / "requests.csv")
    write_csv(rounds, two_experiments / "per_round.csv")
    assert "series" not in summarize(*read_tables(two_experiments), bootstrap_samples=100)
