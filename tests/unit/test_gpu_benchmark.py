"""The script that checks and times the engine on a GPU, rehearsed with tiny models on the CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def test_every_check_passes_and_every_table_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_benchmark", module)  # its dataclasses look there
    spec.loader.exec_module(module)
    assert module.main(["--device", "cpu", "--tiny", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["tables"].keys() == {"machine", "pass", "draft chain", "round", "end to end"}
    assert len(result["checks"]) == 29
    assert all(check["passed"] for check in result["checks"])
    assert {row["pair"] for row in result["tables"]["end to end"]} == {"0.5B + itself", "7B + 0.5B"}
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    assert sum(line.startswith("| 7B |") for line in lines) == 8  # passes and drafts
    assert sum(line.startswith("| 7B head |") for line in lines) == 4  # drafts
    assert module.main(["--device", "cpu", "--tiny", "--seconds", "0", "--output", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "gpu.json").read_text())["tables"].keys() == {"machine", "left out"}
