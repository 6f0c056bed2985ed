"""The notebook of examples/ runs from its first cell to its last, as in Jupyter."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]


@pytest.mark.model
def test_the_quickstart_runs(embedded_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache" / "specsplit" / "models"
    cache.mkdir(parents=True)
    (cache / embedded_model.name).symlink_to(embedded_model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    written, figures, speeds, plot = outputs[1:5]
    assert len("".join(output.text for output in written)) > 50
    assert "32 tokens in " in figures[0].text
    assert "tokens/s alone" in speeds[0].text
    assert any("image/png" in output.get("data", {}) for output in plot)


def test_the_notebook_is_committed_without_outputs() -> None:
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
