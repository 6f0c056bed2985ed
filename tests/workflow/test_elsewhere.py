"""The workflow where only Snakemake is installed, from another workflow, and as the catalog tries it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from workspace import ROOT, SNAKEMAKE, Workspace

# Runs Snakemake with nothing importable that `pip install snakemake` would not bring.
ONLY_SNAKEMAKE = """
import re, sys
from importlib import metadata

def name(text):
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", text)[0]).lower()

# Plugins are imported wherever they are installed.
plugins = [name(found.name) for found in metadata.distributions() if found.name.startswith("snakemake-executor")]
wanted, brought = ["snakemake", *plugins], {"pip", "setuptools"}
while wanted:
    package = wanted.pop()
    if package not in brought:
        brought.add(package)
        try:
            needed = metadata.requires(package) or []
        except metadata.PackageNotFoundError:
            continue
        wanted += [name(text) for text in needed if "extra ==" not in text]
modules = metadata.packages_distributions()
refused = {module for module, owners in modules.items() if not {name(owner) for owner in owners} & brought}

class Refuse:
    def find_spec(self, module, path=None, target=None):
        if module.partition(".")[0] in refused - {"specsplit"}:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)

assert {"torch", "numba", "grpc", "filelock"} <= refused
sys.meta_path.insert(0, Refuse())
from snakemake.cli import main
sys.argv[0] = "snakemake"
main()
"""


def bare(workspace: Workspace, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Snakemake alone: neither the package nor its command, and another package of its name in the way."""
    other = workspace.folder / "installed" / "specsplit"
    other.mkdir(parents=True, exist_ok=True)
    (other / "__init__.py").write_text("raise ImportError('this is the one that is installed')\n")
    path = os.pathsep.join(["/usr/bin", "/bin"])
    environment = {**workspace.environment(), "PATH": path, "PYTHONPATH": str(other.parent)}
    return subprocess.run(
        [sys.executable, "-c", ONLY_SNAKEMAKE, *arguments],
        cwd=workspace.folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def contents(folder: Path) -> dict[str, bytes]:
    own = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {
        str(path): (folder / path).read_bytes() for path in own if not {".snakemake", "__pycache__"} & set(path.parts)
    }


def test_with_snakemake_alone_one_can_look_and_is_told_what_to_install(workspace: Workspace) -> None:
    workspace.command()  # writes my.yaml
    (workspace.folder / "installed").mkdir()
    bare(workspace, "--version")
    before = contents(workspace.folder)
    for arguments, shown in (
        (["--lint", "--snakefile", "workflow/Snakefile"], "in a good condition"),
        (["--dry-run", "--configfile", "my.yaml"], "This was a dry-run"),
    ):
        done = bare(workspace, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        assert shown in done.stdout + done.stderr
    assert contents(workspace.folder) == before  # parsing changes nothing
    done = bare(workspace, "--cores", "1", "--configfile", "my.yaml")
    assert done.returncode != 0
    assert "The command specsplit is not installed" in done.stderr
    assert "make .venv/installed" in done.stderr
    assert "Error in rule" not in done.stderr
    assert "Traceback" not in done.stderr


PARENT = """
configfile: "settings.yaml"


rule tiny_model:
    output:
        "models/a tiny $one/config.json",
        "models/a tiny $one/model.safetensors",
    params:
        source=config.pop("made_from"),
    shell:
        "cp -r {params.source:q}/* 'models/a tiny $one'"


module specsplit:
    snakefile: "@/workflow/Snakefile"
    config: config
    prefix: "deeper/one"


use rule * from specsplit as specsplit_*


rule mine:
    default_target: True
    input: "deeper/one/results/summary.csv"
    output: "mine.txt"
    shell: "wc -l < {input} > {output}"
"""


def test_from_another_workflow(
    compiled_kernels: None, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With other names, a prefix, and a model that a rule of the other workflow makes."""
    mine = tmp_path_factory.mktemp("other workflow")
    model = workspace.config["models"]["tiny"]["path"]
    config = {**workspace.config, "gammas": [0], "made_from": model}
    config["models"] = {"tiny": {"source": "local", "path": "models/a tiny $one"}}
    (mine / "settings.yaml").write_text(yaml.safe_dump(config))
    (mine / "Snakefile").write_text(PARENT.replace("@", str(workspace.folder)))
    shutil.copy(workspace.folder / "prompts.jsonl", mine)

    def snakemake(*arguments: str) -> str:
        done = subprocess.run(
            [*SNAKEMAKE, *arguments],
            cwd=mine,
            env=workspace.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        logs = "".join(f"\n--- {f}\n{f.read_text()}" for f in sorted(mine.glob("deeper/**/*.log")))
        assert done.returncode == 0, done.stdout + done.stderr + logs
        return done.stdout + done.stderr

    snakemake()
    summary = pd.read_csv(mine / "deeper/one/results/summary.csv")
    assert list(summary.loc[summary["setup"] == "workers", "gamma"]) == [0]
    assert (summary["lossless"] == 1).all()
    assert sorted(path.name for path in mine.iterdir() if not path.name.startswith(".")) == [
        *("Snakefile", "deeper", "mine.txt", "models", "prompts.jsonl", "settings.yaml")
    ]
    assert not list(mine.glob("deeper/one/results/workers/*/*.json"))
    assert "Nothing to be done" in snakemake("--dry-run")


@pytest.mark.slow
def test_the_smallest_run(tmp_path: Path, workspace: Workspace) -> None:
    """.test, as the catalog runs it."""
    shutil.copytree(ROOT / ".test", workspace.folder / ".test", ignore=shutil.ignore_patterns("results", ".snakemake"))
    arguments = ("--directory", ".test", "--snakefile", "workflow/Snakefile")
    command = [*SNAKEMAKE, *arguments]
    done = subprocess.run(
        command, cwd=workspace.folder, env=workspace.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = pd.read_csv(workspace.folder / ".test/results/summary.csv")
    own = summary[summary["setup"] == "workers"]
    assert (list(own["gamma"]), list(own["requests"])) == ([0, 2], [2, 2])
    assert (workspace.folder / ".test/results/report.html").is_file()
