"""Workspaces (tests/workspace.py) with a tiny model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from specsplit.engines.numba import FusedLM
from specsplit.engines.transformers import CausalLM

from workspace import Workspace


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Callable[[str], Path], compiled_kernels: None
) -> Workspace:
    """A workspace in which the main job has run, with a model of its own; tests leave both as they are."""
    model = tmp_path_factory.mktemp("models") / "llama"
    shutil.copytree(tiny_model_folder("llama"), model)
    workspace = Workspace(tmp_path_factory.mktemp("workflow"), model)
    workspace.config["gammas"] = [0, 3]
    workspace.run()
    return workspace


@pytest.fixture(scope="session")
def compiled_kernels(tiny_model: Callable[[str], Any]) -> None:
    """They lie beside the sources, so a workspace that is made from now on need not compile them again."""
    engine = FusedLM(CausalLM(tiny_model("llama")), 1)
    engine.step(engine.new_cache(8), [1, 2, 3])


@pytest.fixture
def workspace(tmp_path: Path, tiny_model_folder: Callable[[str], Path]) -> Iterator[Workspace]:
    """A fresh workspace; nothing may be left running in it."""
    workspace = Workspace(tmp_path, tiny_model_folder("llama"))
    yield workspace
    assert workspace.wait_until(lambda: not workspace.processes(), 10), workspace.processes()
