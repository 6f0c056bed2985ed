"""Workspaces (tests/workspace.py) with a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from workspace import Workspace


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Callable[[str], Path]) -> Workspace:
    """A workspace in which the main job has run; tests copy it or leave it as it is."""
    workspace = Workspace(tmp_path_factory.mktemp("workflow"), tiny_model_folder("llama"))
    workspace.run()
    return workspace


@pytest.fixture
def workspace(tmp_path: Path, tiny_model_folder: Callable[[str], Path]) -> Iterator[Workspace]:
    """A fresh workspace; nothing may be left running in it."""
    workspace = Workspace(tmp_path, tiny_model_folder("llama"))
    yield workspace
    assert workspace.wait_until(lambda: not workspace.processes(), 10), workspace.processes()
