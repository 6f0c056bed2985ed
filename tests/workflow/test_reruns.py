"""What reruns when: the table of docs/workflow.md, line by line, as dry runs without the notes of Snakemake.

With them: test_workflow.py."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workspace import ROOT, Workspace

ANALYSIS = {"merge": 1, "figures": 1, "provenance": 1, "summary": 1}
RUNS = {"start_worker": 3, "benchmark": 2, **ANALYSIS}
RECORD = {"settings": 1, "provenance": 1, "summary": 1}
MODEL = {"settings": 1, "prepare_model": 1, "prepare_dataset": 1, **RUNS}  # the prompts have its token ids
PROMPTS = {"settings": 1, "prepare_dataset": 1, **RUNS}
ONE_RUN = {"start_worker": 2, "benchmark": 1, **ANALYSIS}
Change = Callable[[Workspace, pytest.MonkeyPatch], None]


def model(workspace: Workspace) -> Path:
    return Path(workspace.config["models"]["tiny"]["path"])


def edit(path: Path, *, old: bool = False) -> None:
    """Another content of the same length, now or, as by `cp -p`, with an old date."""
    content = path.read_bytes() if path.exists() else b"{}"
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if old:
        os.utime(path, (1e9, 1e9))


def model_file(name: str, *, old: bool = False) -> Change:
    return lambda workspace, _: edit(model(workspace) / name, old=old)


def prompts(change: Callable[[str], str], *, old: bool = False) -> Change:
    def apply(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
        path = workspace.folder / "prompts.jsonl"
        path.write_text(change(path.read_text()))
        if old:
            os.utime(path, (1e9, 1e9))

    return apply


def key(**changes: Any) -> Change:
    def apply(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
        for name, value in changes.items():
            kept = workspace.config.get(name)
            workspace.config[name] = {**kept, **value} if isinstance(kept, dict) else value

    return apply


def told(change: Callable[[Path], None]) -> Change:
    return lambda workspace, _: change(workspace.folder / "results/settings/gamma_3/settings.json")


def variable(name: str, value: str) -> Change:
    def apply(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
        environment = {**workspace.environment(), name: value}
        monkeypatch.setattr(workspace, "environment", lambda: environment)

    return apply


def at_home(*, new_weights: bool) -> Change:
    def apply(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = model(workspace)
        monkeypatch.setenv("HOME", str(folder.parent))
        workspace.config["models"] = {"tiny": {"source": "local", "path": f"~/{folder.name}"}}
        if new_weights:
            edit(folder / "model.safetensors", old=True)

    return apply


def source(file: str) -> Change:
    return lambda workspace, _: edit_source(workspace.folder / "src" / "specsplit" / file)


def edit_source(path: Path) -> None:
    path.write_text(path.read_text() + "\n# changed\n")


# Line of the table -> the change, and what it plans.
LINES: dict[str, tuple[Change, dict[str, int]]] = {
    "nothing": (lambda *_: None, {}),
    "a prompt edited": (prompts(lambda text: text.replace("four", "five")), PROMPTS),
    "... by `cp -p`, with an old date": (prompts(lambda text: text.replace("four", "five"), old=True), PROMPTS),
    "a prompt added": (prompts(lambda text: text + '{"prompt": "ten"}\n'), PROMPTS),
    "generation": (key(generation={"max_output_tokens": 13}), {"settings": 3, **RUNS}),
    "one of them less": (key(gammas=[0]), {"settings": 2, **ANALYSIS}),
    "`statistics`": (key(statistics={"confidence": 0.9}), {"settings": 3, "figures": 1, "provenance": 1, "summary": 1}),
    "a file of `results/settings` edited": (told(edit), {"settings": 1, **ONE_RUN}),
    "... or deleted": (told(Path.unlink), {"settings": 1, **ONE_RUN}),
    "a gamma added": (key(gammas=[0, 2, 3]), {"settings": 3, "operation": 1, **ONE_RUN}),
    "weights of a local model": (model_file("model.safetensors"), MODEL),
    **{
        f"`{name}` of a local model": (model_file(name.replace("*", "more")), MODEL)
        for name in (
            *("chat_template.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "spiece.model", "*.tiktoken"),
            *("generation_config.json", "tokenizer.json", "config.json"),
        )
    },
    "... any of these by `cp -p`, with an old date": (model_file("model.safetensors", old=True), MODEL),
    "other files of its folder": (model_file("README.md"), {}),
    "the same folder written as `~/...`": (at_home(new_weights=False), RECORD),
    "... with other weights": (at_home(new_weights=True), {**MODEL, "settings": 2}),
    "a variable that only operates, as an address": (
        variable("SPECSPLIT_ORCH_TARGET_ADDRESS", "127.0.0.1:1"),
        {"operation": 2},
    ),
    "any other variable": (variable("HF_HOME", "/somewhere/else"), {}),
    "a source file that runs import": (source("decoding/verification.py"), {"settings": 1, **RUNS}),
    "a source file that nothing of it imports": (source("cli/generate.py"), {}),
    "`workers.max_sessions`": (key(workers={"max_sessions": 2}), {"operation": 2, **RECORD}),
    "`workers.threads`": (key(workers={"threads": 2}), {**RUNS, "settings": 3}),
    "`workers.target_address`": (key(workers={"target_address": "h:1"}), {"operation": 2, **RECORD}),
}
OFTEN = ("... by `cp -p`, with an old date", "generation", "... with other weights")


@pytest.mark.parametrize("line", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in LINES])
def test_what_reruns(finished: Workspace, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    change, expected = LINES[line]
    config, folder = {**finished.config}, model(finished)
    places = [folder, *(finished.folder / name for name in ("src", "prompts.jsonl", "results/settings", ".snakemake"))]
    for index, place in enumerate(places):
        (shutil.copytree if place.is_dir() else shutil.copy2)(place, tmp_path / str(index))
    try:
        change(finished, monkeypatch)
        shutil.rmtree(finished.folder / ".snakemake")  # what decides a result is in its files
        assert finished.planned() == expected
    finally:
        finished.config = config
        for index, place in enumerate(places):
            shutil.rmtree(place) if place.is_dir() else place.unlink()
            (shutil.copytree if (tmp_path / str(index)).is_dir() else shutil.copy2)(tmp_path / str(index), place)


def test_a_copy_without_dates_is_told(finished: Workspace) -> None:
    """`cp -r` of the results: dates no longer tell what is still to be made."""
    dated = finished.folder / "results/.dated"
    assert "copied without its dates" not in finished.run("--dry-run")
    times = (dated.stat().st_atime, dated.stat().st_mtime)
    dated.touch()
    try:
        assert "results was copied without its dates" in finished.run("--dry-run")
    finally:
        os.utime(dated, times)


@pytest.mark.slow
def test_a_variable_that_decides_is_refused(finished: Workspace) -> None:
    done = finished.snakemake("--dry-run", SPECSPLIT_TARGET_DTYPE="bfloat16")
    assert (
        "SPECSPLIT_TARGET_DTYPE: would change results behind the back of the configuration" in done.stdout + done.stderr
    )


def test_the_table_in_the_documentation_has_these_lines() -> None:
    text = (ROOT / "docs" / "workflow.md").read_text()
    table = text.partition("## What reruns when")[2].partition("\n## ")[0]
    told = " ".join(re.findall(r"^\| ([^|]*)\|", table, flags=re.MULTILINE))
    for line in LINES:
        name = line.removeprefix("... ").removesuffix(" of a local model")
        assert name in told, line
