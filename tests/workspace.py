"""A copy of the workflow in a folder of its own, run by the real snakemake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from forked import SNAKEMAKE as LIBRARIES
from forked import run_module
from waiting import wait_until

ROOT = Path(__file__).parents[1]
SUMMARY = "results/summary.csv"
SNAKEMAKE = [sys.executable, "-m", "snakemake", "--cores", "2"]


class Workspace:
    """A project folder. `config` is what my.yaml holds; `snakemake` runs with it.

    model: the folder of the model that is draft and target, or its section of the configuration.
    """

    def __init__(self, folder: Path, model: Path | Mapping[str, Any]) -> None:
        self.folder = folder
        for name in ("Snakefile", "workflow", "config", "profiles", "envs", "src"):
            source = ROOT / name
            if source.is_dir():
                # With __pycache__, which holds the compiled kernels, but not what another process is writing.
                shutil.copytree(
                    source, folder / name, ignore=shutil.ignore_patterns("*.egg-info", "*.pyc.*", "*.tmp.*")
                )
            else:
                shutil.copy(source, folder / name)
        self.config: dict[str, Any] = {
            "gammas": [0, 1, 3],
            "dataset": {"path": "prompts.jsonl", "limit": None},
            "generation": {"max_output_tokens": 12},
            "models": {"tiny": {"source": "local", "path": str(model)} if isinstance(model, Path) else dict(model)},
            "target": {"model": "tiny"},
            "draft": {"model": "tiny", "dtype": "float32", "lookup": 0, "p_min": 0},
            "states_cost": {"draft": "tiny", "head": "tiny"},
            "workers": {"threads": 1, "max_context": 128},
            "statistics": {"bootstrap_samples": 200},
        }
        self.write_prompts("one two three", "four five", "six seven eight nine")

    def write_prompts(self, *prompts: str) -> None:
        lines = [json.dumps({"id": f"p{i}", "prompt": text}) for i, text in enumerate(prompts)]
        (self.folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("SPECSPLIT_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
        # The copy's own code, so that a test may change it.
        return {**kept, "PATH": path, "PYTHONPATH": str(self.folder / "src")}

    def command(self, *arguments: str, target: str = SUMMARY) -> list[str]:
        (self.folder / "my.yaml").write_text(yaml.safe_dump(self.config))
        return [*SNAKEMAKE, *arguments, "--configfile", "my.yaml", "--", *target.split()]

    def snakemake(self, *arguments: str, target: str = SUMMARY, **variables: str) -> subprocess.CompletedProcess[str]:
        command, environment = self.command(*arguments, target=target), {**self.environment(), **variables}
        if "--dry-run" in arguments:
            words = command[3:]
            return run_module("snakemake", words, folder=self.folder, environment=environment, libraries=LIBRARIES)
        return subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def run(self, *arguments: str, target: str = SUMMARY) -> str:
        done = self.snakemake(*arguments, target=target)
        assert done.returncode == 0, done.stdout + done.stderr + self.logs()
        return done.stdout + done.stderr

    def start(self, *arguments: str, log: Path | None = None, **variables: str) -> subprocess.Popen[bytes]:
        """Snakemake in the background, in a process group of its own as in a terminal. log: gets what it prints."""
        with open(log or os.devnull, "ab") as output:  # noqa: PTH123
            return subprocess.Popen(
                self.command(*arguments),
                cwd=self.folder,
                env={**self.environment(), **variables},
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def planned(self, *arguments: str, target: str = SUMMARY) -> dict[str, int]:
        """Jobs that a dry run would execute, by rule."""
        text = self.run("--dry-run", "--quiet", "rules", *arguments, target=target)
        if "Job stats:" not in text:
            return {}
        table = text.rpartition("Job stats:")[2].partition("total")[0].splitlines()[3:]
        return {line.split()[0]: int(line.split()[1]) for line in table if line.strip()}

    def logs(self) -> str:
        return "".join(f"\n--- {f}\n{f.read_text()}" for f in sorted(self.folder.glob("results/logs/**/*.log")))

    def processes(self) -> list[str]:
        """Command lines of the processes whose working directory is this folder."""
        found = []
        for process in psutil.process_iter(["pid"]):
            try:
                if process.cwd() == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    wait_until = staticmethod(wait_until)
