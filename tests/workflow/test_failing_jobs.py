"""A job that fails says why on the terminal, at its end, and its log holds all of it. Every rule, once."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from workspace import ROOT, Workspace

# A command that fails as Python does, with a traceback that is longer than a screen.
FAILS = """#!/usr/bin/env python
import sys

def deeper(n):
    if n == 0:
        raise RuntimeError(f"the cause of {' '.join(sys.argv[1:3])}")
    deeper(n - 1 if n % 2 else n - 1)

print("a line on the other channel", flush=True)
deeper(40)
"""
# Rules -> a file that they make. `settings` and `operation` run printf alone.
TARGETS = {
    "fetch_dataset": "resources/datasets/gsm8k.jsonl",
    "prepare_model": "resources/models/tiny/model.json",
    "prepare_dataset": "results/dataset/prompts.jsonl",
    "calibration_prompts": "results/dataset/calibration.jsonl",
    "pick_layers": "results/skip_layers/draft.json",
    "start_worker": "results/workers/gamma_1/draft.json",
    "benchmark": "results/runs/gamma_1/run.json",
    "merge": "results/requests.csv",
    "figures": "results/figures/tpot.svg",
    "summary": "results/summary.csv",
    "report": "results/report.html",
    "provenance": "results/provenance/provenance.json",
    "archive": "results/archive.zip",
    "theory_check": "results/theory_check.csv",
    "race_peers": "results/peers_requests.csv",
    "peers": "results/peers.csv",
    "benchmark_capacity": "results/capacity_requests.csv",
    "capacity": "results/capacity.csv",
    "openai_load": "results/openai_load.csv",
    "profile": "results/profile.csv",
    "overhead": "results/overhead.csv",
    "context_curve": "results/context_curve.csv",
    "hidden_states": "results/hidden_states.csv",
    "distill_write_data": "results/distill/default/data/manifest.json",
    "distill_train": "results/distill/default/loss.csv",
    "distill_measure": "results/distill/default/acceptance.csv",
    "distill_card": "results/distill/default/draft/MODEL_CARD.md",
}
WITHOUT_A_COMMAND = {"all", "everything", "distill", "settings", "operation"}
OFTEN = {"benchmark"}


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("failing"), tiny_model_folder("llama"))
    command = workspace.folder / "bin" / "specsplit"
    command.parent.mkdir()
    command.write_text(FAILS)
    command.chmod(0o755)
    return workspace


def test_every_rule_is_here() -> None:
    text = "".join(path.read_text() for path in [ROOT / "Snakefile", *sorted(ROOT.glob("workflow/**/*.smk"))])
    assert set(re.findall(r"^ *rule (\w+):", text, flags=re.MULTILINE)) == {*TARGETS, *WITHOUT_A_COMMAND} - {
        "everything"
    }


@pytest.mark.parametrize("rule", [r if r in OFTEN else pytest.param(r, marks=pytest.mark.slow) for r in TARGETS])
def test_a_job_that_fails_says_why_and_where(failing: Workspace, rule: str) -> None:
    variables = {"PATH": f"{failing.folder / 'bin'}{os.pathsep}{failing.environment()['PATH']}"}
    failing.config["dataset"] = (
        {"name": "gsm8k"} if rule == "fetch_dataset" else {"path": "prompts.jsonl", "limit": None}
    )
    arguments = ("--allowed-rules", rule, "--force")
    # The files that the job reads are there, empty; the command does not come so far as to read them.
    done = failing.snakemake(*arguments, target=TARGETS[rule], **variables)
    while "affected files:" in done.stderr:
        for line in done.stderr.partition("affected files:")[2].splitlines()[1:]:
            if line.startswith(" " * 8):
                path = failing.folder / line.strip()
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        done = failing.snakemake(*arguments, target=TARGETS[rule], **variables)
    assert done.returncode != 0
    shown = done.stderr.splitlines()
    (index,) = (i for i, line in enumerate(shown) if line.startswith(f"Rule {rule} failed; results/logs/"))
    assert index > len(shown) - 22
    assert any("RuntimeError: the cause of " in line for line in shown[index:])
    log = failing.folder / re.match(r"Rule \w+ failed; (\S+) ends with", shown[index])[1]
    text = Path(log).read_text()
    assert "a line on the other channel" in text
    assert "Traceback (most recent call last)" in text
    assert text.count("in deeper") >= 3
