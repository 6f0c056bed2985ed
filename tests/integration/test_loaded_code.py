"""The modules that the workflow's commands really load are among those that their results are said to depend on.

Each command runs as a process of its own on tiny input, and so do its workers; a hook notes every module of the
package that one of them imports. The libraries of others are there before.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from specsplit.io import write_json
from specsplit.launch.environment import REQUIRED
from specsplit.launch.heartbeat import hold_lease
from specsplit.provenance.closure import PACKAGE, command_files
from specsplit.settings.configuration import load_pipeline_config

from forked import LIBRARIES, run_module
from grpc_fixtures import noisy_copy

CONFIG = Path(__file__).parents[2] / "config" / "config.yaml"
# Python imports it at the start of every process. Killed processes have written what they loaded, too.
HOOK = """\
import os, sys

class Noted:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "specsplit":
            with open(os.path.join(os.environ["LOADED_MODULES"], str(os.getpid())), "a") as file:
                print(name, file=file)

sys.meta_path.insert(0, Noted())
"""
# Every command looks for misspelt variables first: the names of all settings, which decide nothing of its result.
CHECKED_ALWAYS = set(command_files(scripts=[PACKAGE / "settings" / "environment.py"]))


class Shop:
    """A folder to run commands in, and what each of their processes loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "hook").mkdir()
        (folder / "hook" / "sitecustomize.py").write_text(HOOK)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("SPECSPLIT_")}
        threads = {f"SPECSPLIT_{role}_THREADS": "1" for role in ("DRAFT", "TARGET")}
        self.environment = {**kept, **REQUIRED, **threads, "PYTHONPATH": f"{folder / 'hook'}:{PACKAGE.parent}"}

    def run(self, command: str, *arguments: object, also: str = "") -> set[str]:
        """Run a command; returns the files of the package that it loaded, all of which `command_files` must list.

        also: another command whose files are allowed, as the rule says.
        """
        words = [*command.split(), *map(str, arguments)]
        loaded = self._loaded(words, command.replace(" ", "-"))
        names = [command, *([also] if also else [])]
        assert loaded - set(command_files(*names)) - CHECKED_ALWAYS == set(), command
        assert f"cli/{command.replace('-', '_').replace(' ', '/')}.py" in loaded
        return loaded

    def _loaded(self, words: list[str], name: str) -> set[str]:
        notes = self.folder / "loaded" / name
        notes.mkdir(parents=True, exist_ok=True)
        environment = {**self.environment, "LOADED_MODULES": str(notes)}
        done = run_module("specsplit", words, folder=self.folder, environment=environment, libraries=LIBRARIES)
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
        return self.loaded(name)

    def loaded(self, name: str) -> set[str]:
        """Files that the processes of a command have loaded by now; workers may outlive the command."""
        modules = {line for file in (self.folder / "loaded" / name).iterdir() for line in file.read_text().split()}
        paths = (PACKAGE.joinpath(*module.split(".")[1:]) for module in modules)
        files = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in paths)
        return {file.relative_to(PACKAGE).as_posix() for file in files}


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    monkeypatch.delenv("SPECSPLIT_LEASE_PID", raising=False)
    hold_lease()  # workers end with this process
    shop = Shop(tmp_path)
    shop.environment["SPECSPLIT_LEASE_PID"] = os.environ["SPECSPLIT_LEASE_PID"]
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "hello"}\n{"id": "b", "prompt": "one two one"}\n')
    return shop


@pytest.fixture(scope="module")
def models(tiny_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    target = tiny_model_folder("llama")
    return target, noisy_copy(target, tmp_path_factory.mktemp("draft"), noise=0.03)


def test_what_runs_and_their_analysis_load(shop: Shop, models: tuple[Path, Path]) -> None:
    results = shop.folder / "results"
    prompts, model = results / "dataset/prompts.jsonl", shop.folder / "resources/models/tiny"
    shop.run("prepare-model", "--local", models[0], "--output", model)
    shop.run(
        "prepare-dataset",
        "--source",
        "prompts.jsonl",
        "--output",
        prompts,
        "--manifest",
        results / "dataset/manifest.json",
        "--limit",
        1,
    )
    shop.run(
        "calibration-prompts",
        *("--source", "prompts.jsonl", "--measured", prompts, "--output", "calibration.jsonl", "--limit", 1),
    )
    addresses = []
    for role, folder in zip(("target", "draft"), models, strict=True):
        file = shop.folder / f"{role}.json"
        flags = ("--model", folder, "--dtype", "float32", "--max-context", 128, "--endpoint-file", file)
        shop.run("start-worker", role, *flags, "--worker-log", f"{role}.log", "--pool", "pool")
        addresses += [f"--{role}-addr", file]
    clients = ("--prompts", prompts, "--tokenizer", models[0], *addresses)
    short = ("--results-dir", results, "--max-output-tokens", 8, "--ignore-eos", "--only", "--gamma")
    shop.run("bench", *clients, *short, 0, 2, "--mode", "sync", "lookahead")
    shop.run("capacity", *clients, *short, 2, "--clients", 1, "--requests", 4)
    shop.run(
        "context-curve",
        *clients,
        "--output",
        "curve.csv",
        "--figure",
        "curve.png",
        "--length",
        16,
        "--gamma",
        2,
        "--output-tokens",
        8,
        "--texts",
        1,
    )
    race = ("--baseline", "generate", "--target-model", models[0], "--draft-model", models[1])
    loaded = shop.run("bench", *clients, *short, 2, *race, also="race")
    assert {"cli/race.py", "experiment/peer_race.py"} <= loaded
    for role in ("target", "draft"):
        shop.run("stop-worker", shop.folder / f"{role}.json")
    workers = shop.loaded("start-worker")
    assert "worker/server.py" in workers
    for commands in (["bench"], ["worker", "start-worker"]):
        assert workers - set(command_files(*commands)) - CHECKED_ALWAYS == set()

    shop.run("merge", "--results-dir", results)
    settings = {"confidence": 0.9, "bootstrap_samples": 50, "seed": 1}
    flags = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", value)]
    shop.run("figures", "--results-dir", results, *flags)
    shop.run("peers-table", "--results-dir", results, *flags)
    shop.run("capacity-table", "--results-dir", results)
    shop.run("profile", "--results-dir", results)
    write_json(results / "provenance/config.json", load_pipeline_config(yaml.safe_load(CONFIG.read_text())))
    record = (
        "--dataset",
        results / "dataset/manifest.json",
        "--output",
        results / "provenance/provenance.json",
        "--patch",
        results / "provenance/changes.patch",
    )
    runs = sorted(results.glob("runs/*/run.json"))
    shop.run(
        "provenance record",
        "--config",
        results / "provenance/config.json",
        "--runs",
        *runs,
        "--models",
        model / "model.json",
        "--results",
        results / "requests.csv",
        *record,
    )
    shop.run("analyze", "--no-figures", "--results-dir", results, *flags)
    shop.run("provenance seal", "--output", results / "provenance/SHA256SUMS", results / "summary.csv")
    loaded = shop.run("report", "--results-dir", results, "--output", "report.html", *flags)
    assert not {file for file in loaded if file.startswith(("engines/", "worker/"))}


@pytest.mark.slow
def test_what_measurements_with_simulated_models_load(shop: Shop) -> None:
    short = ("--gamma", 2, "--tokens", 6, "--texts", 1)
    for command, flags in (
        ("overhead", ("--mode", "sync")),
        ("theory-check", ("--rtt-ms", 0, "--figure", "theory.png")),
    ):
        loaded = shop.run(command, "--output", f"{command}.csv", *short, *flags)
        assert {"worker/server.py", "engines/synthetic.py"} <= loaded


@pytest.mark.slow
def test_what_the_making_of_drafts_loads(shop: Shop, models: tuple[Path, Path]) -> None:
    target = ("--target", models[0])
    draft = ("--draft", "draft")
    shop.run("pick-layers", "--model", models[0], "--prompts", "prompts.jsonl", "--count", 1, "--max-tokens", 4)
    shop.run(
        "distill write-data",
        *target,
        "--output",
        "data",
        "--held-out",
        "prompts.jsonl",
        "--tokens",
        200,
        "--max-user-tokens",
        3,
        "--max-answer-tokens",
        8,
        "--write-batch",
        32,
        "--user-temperature",
        4,
    )
    report = ("--losses", "loss.csv", "--report", "training.json")
    shop.run(
        "distill train",
        *target,
        "--data",
        "data/manifest.json",
        "--output",
        "draft",
        *report,
        "--vocab-size",
        64,
        "--epochs",
        1,
        "--batch-size",
        8,
        "--validation-texts",
        4,
        "--layers",
        1,
    )
    tables = ("--output", "acceptance.csv", "--rounds", "rounds.csv", "--report", "measured.json")
    shop.run(
        "distill measure",
        *target,
        *draft,
        "--prompts",
        "prompts.jsonl",
        *tables,
        "--max-output-tokens",
        8,
        "--gamma",
        2,
    )
    shop.run(
        "distill card",
        *draft,
        "--training",
        "training.json",
        "--losses",
        "loss.csv",
        "--acceptance",
        "acceptance.csv",
        "--measured",
        "measured.json",
        "--figure",
        "curves.png",
    )
