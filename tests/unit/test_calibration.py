"""Prompts to choose layers on, none of them measured, and the file of layers that a worker is started with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from specsplit.cli.main import main
from specsplit.errors import UserError
from specsplit.experiment.dataset import load_prompts, prepare_dataset, write_calibration_prompts


def write_prompts(path: Path, prompts: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twelve prompts in three categories; the last one has the text of the first."""
    prompts = [{"id": f"p{i}", "category": "abc"[i % 3], "prompt": f"text {i % 11}"} for i in range(12)]
    return write_prompts(tmp_path / "source.jsonl", prompts)


def test_calibration_takes_what_is_not_measured_by_id_or_text(source, tmp_path):
    measured, output = tmp_path / "measured.jsonl", tmp_path / "new" / "calibration.jsonl"
    prepare_dataset(source, measured, tmp_path / "manifest.json", limit=3, on_bad_line="stop")
    write_calibration_prompts(source, measured, output, limit=6, on_bad_line="stop")
    taken, chosen = load_prompts(measured)[0], load_prompts(output)[0]
    assert len(chosen) == 6
    assert {prompt.category for prompt in chosen} == {"a", "b", "c"}
    assert not {prompt.prompt for prompt in chosen} & {prompt.prompt for prompt in taken}
    assert "p11" not in {prompt.id for prompt in chosen}  # p0, which is measured, has the same text


def test_too_few_prompts_say_what_to_change(source, tmp_path):
    measured = tmp_path / "measured.jsonl"
    prepare_dataset(source, measured, tmp_path / "manifest.json", limit=9, on_bad_line="stop")
    with pytest.raises(UserError, match=r"12 prompts, 10 measured and 2 left.*asks for 3.*dataset.limit"):
        write_calibration_prompts(source, measured, tmp_path / "out.jsonl", limit=3, on_bad_line="stop")
    assert not (tmp_path / "out.jsonl").exists()


def test_bad_lines_are_skipped_where_the_dataset_skips_them(source, tmp_path):
    measured = write_prompts(tmp_path / "measured.jsonl", [{"id": "p0", "prompt": "text 0"}])
    with source.open("a") as file:
        file.write("not JSON\n")
    with pytest.raises(UserError, match=r"source\.jsonl:13: not valid JSON"):
        write_calibration_prompts(source, measured, tmp_path / "out.jsonl", limit=2, on_bad_line="stop")
    write_calibration_prompts(source, measured, tmp_path / "out.jsonl", limit=2, on_bad_line="skip")
    assert len(load_prompts(tmp_path / "out.jsonl")[0]) == 2


# specsplit start-worker draft --skip-layers-file


def started_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *flags: str) -> list[str]:
    """The flags that the worker itself would get."""
    given: list[list[str]] = []

    def start(role: str, arguments: list[str], **_: Any) -> argparse.Namespace:
        given.append(arguments)
        return argparse.Namespace(pid=1, address="127.0.0.1:1", attached=False)

    monkeypatch.setattr("specsplit.launch.start.start_worker", start)
    command = ["start-worker", "draft", "--model", str(tmp_path), "--endpoint-file", "e.json", "--worker-log", "w.log"]
    main([*command, *flags])
    return given[0]


def test_layers_come_from_the_file(monkeypatch, tmp_path):
    path = tmp_path / "layers.json"
    path.write_text(json.dumps({"layers": [3, 7], "agreement": 0.9}))
    arguments = started_with(monkeypatch, tmp_path, "--skip-layers-file", str(path))
    at = arguments.index("--skip-layers")
    assert arguments[at : at + 3] == ["--skip-layers", "3", "7"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layers": "3"}, "holds no `layers`"),
        ({"layers": [1.5]}, "holds no `layers`"),
        ({}, "holds no `layers`"),
        ([3], "wanted a JSON object"),
    ],
)
def test_a_file_without_layers_is_refused(monkeypatch, tmp_path, capsys, content, message):
    path = tmp_path / "layers.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        started_with(monkeypatch, tmp_path, "--skip-layers-file", str(path))
    assert f"{path}: " in (err := capsys.readouterr().err)
    assert message in err


def test_layers_are_given_once(monkeypatch, tmp_path, capsys):
    path = tmp_path / "layers.json"
    path.write_text(json.dumps({"layers": [3]}))
    with pytest.raises(SystemExit):
        started_with(monkeypatch, tmp_path, "--skip-layers-file", str(path), "--skip-layers", "3")
    assert "--skip-layers and --skip-layers-file: give one of them" in capsys.readouterr().err
