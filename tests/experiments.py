"""A finished experiment on disk, without running one: a project with code, models, results and its record."""

from __future__ import annotations

import contextlib
import copy
import csv
import hashlib
import io
import os
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from specsplit.cli.main import main
from specsplit.experiment.columns import REQUEST_COLUMNS
from specsplit.io import combined_sha256, sha256_file, write_json
from specsplit.provenance import capture
from specsplit.provenance.closure import PACKAGE, code_sha256
from specsplit.provenance.folder import RECORD, SEAL
from specsplit.settings.axes import PLAIN

NO_GPU = {"available": False, "reason": "nvidia-smi: command not found", "cuda_version": None, "gpus": [], "raw": None}
NO_GIT = dict.fromkeys(("commit", "branch", "dirty", "remote"))
CONFIG = {"seed": 7, "gammas": [0, 2], "statistics": {"confidence": 0.95}}
MODEL_FILE = "config.json"
SMI_TABLE = """\
NVIDIA H100 80GB HBM3, GPU-11111111-aaaa, 550.54.15, 81559, P0, 1980, 2619, 118.27
"Tesla T4, rev 2", GPU-22222222-bbbb, 550.54.15, 15360, P8, 300, 405, [N/A]
"""
SMI_FULL = """\
==============NVSMI LOG==============

Driver Version                            : 550.54.15
CUDA Version                              : 12.4
Attached GPUs                             : 2
"""


def nvidia_smi(table: str = SMI_TABLE, full: str = SMI_FULL, full_status: int = 0) -> str:
    return (
        f"case \"$1\" in\n-q) cat <<'END'\n{full}END\nexit {full_status};;\n"
        f"--query-gpu=name,uuid,*) cat <<'END'\n{table}END\nexit 0;;\nesac\nexit 9"
    )


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(root), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def specsplit(*arguments: str | Path, folder: Path | None = None) -> tuple[int, str]:
    """Run the command line in this process, in `folder`; returns (exit status, everything it printed)."""
    printed = io.StringIO()
    here = Path.cwd()
    os.chdir(folder or here)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            main([str(argument) for argument in arguments])
        return 0, printed.getvalue()
    except SystemExit as end:
        return int(end.code or 0), printed.getvalue()
    finally:
        os.chdir(here)


@cache
def _surroundings() -> dict[str, Any]:
    files = capture.hash_tree(PACKAGE)
    return {
        "machine": capture.capture_machine(),
        "source_sha256": combined_sha256(files),
        "run_code_sha256": code_sha256("bench"),
    }


def make_run(gamma: int = 2, **changes: Any) -> dict[str, Any]:
    """A run.json with all that a complete record wants."""
    environment = {"PYTHONHASHSEED": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "2"}
    worker = {
        "address": "127.0.0.1:1",
        "attached": False,
        "host": "vm",
        "process_started": 1.5,
        "log": "results/logs/workers/target.log",
        "reason": None,
        "role": "target",
        "model": "tiny",
        "weights_sha256": "a" * 64,
        "tokenizer_sha256": "b" * 64,
        "dtype": "float32",
        "device": "cpu",
        "threads": 2,
        "pid": 17,
        "environment": environment,
        "runtime": {"host": "vm", "cpu": "a CPU", "driver": "None", "torch": "2", "seed": "7"},
        "packages": {"torch": "2"},
    }
    run = {
        "command": f"specsplit bench --gamma {gamma}",
        "argv": ["specsplit", "bench", "--gamma", str(gamma)],
        "workflow": {
            "command": "snakemake --cores 2",
            "argv": ["snakemake", "--cores", "2"],
            "cores": 2,
            "config_files": ["config/config.yaml"],
            "reason": None,
        },
        "started": "2025-01-31T12:00:00Z",
        "finished": "2025-01-31T12:01:00.5+00:00",
        "exit_code": 0,
        "error": None,
        "gamma": gamma,
        "seed": 7,
        "seeds": {"orchestrator": 7, "target_worker": 7},
        "orchestrator": {"max_rounds": None},
        "workers": {"target": worker, **({"draft": {**worker, "role": "draft"}} if gamma else {})},
        "inputs": {},
        "tokenizer_sha256": "b" * 64,
        "environment": environment,
        "software": {"packages": {"torch": "2"}},
        "software_sha256": "c" * 64,
        "git": {**NO_GIT, "reason": "git: command not found"},
        "gpu": {
            "before": NO_GPU,
            "after": NO_GPU,
            "samples": {"available": False, "reason": NO_GPU["reason"], "period_s": 1.0, "gpus": []},
        },
        **_surroundings(),
    }
    return copy.deepcopy({**run, **changes})


def commit_experiment(root: Path) -> Experiment:
    """A finished experiment in a git checkout with all of its files in one commit; made without a record."""
    root.mkdir(exist_ok=True)
    git(root, "init", "-q", "-b", "trunk")
    (root / "a.txt").write_text("a")
    (root / ".gitignore").write_text("/results/\n/resources/\n")
    experiment = Experiment(root)
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "an experiment")
    return experiment


class Experiment:
    """A finished experiment in the folder `root`. `finish` writes its record and seals it, as the workflow does."""

    def __init__(self, root: Path, make: bool = True) -> None:
        self.root = root
        self.config: dict[str, Any] = copy.deepcopy(CONFIG)
        self.results = root / "results"
        self.runs = [self.results / "runs" / f"gamma_{gamma}" / "run.json" for gamma in (0, 2)]
        self.model = root / "resources" / "models" / "tiny" / "model.json"
        self.manifest = self.results / "dataset" / "manifest.json"
        self.summary = self.results / "summary.csv"
        self.dataset = self.manifest.parent / "prompts.jsonl"
        if make:
            self._make()

    def _make(self) -> None:
        root = self.root
        for name, text in {
            "Snakefile": 'rule all:\n    input: "results/summary.csv"\n',
            "workflow/rules/a.smk": "# rules\n",
            "envs/constraints.txt": "numpy==0.0.1\n",
            "config/config.yaml": "seed: 7 # a comment\n",
            "README.md": "# Read me\n",
            "LICENSE": "a licence\n",
            "prompts.jsonl": '{"prompt": "hi"}\n',
            "results/dataset/prompts.jsonl": '{"id": "a", "prompt": "hi"}\n',
            "results/summary.csv": "gamma,tpot\n0,1.5\n",
            "results/per_round.csv": "gamma,round\n0,1\n",
            "results/figures/tpot.svg": "<svg/>\n",
            "results/logs/merge.log": "merged\n",
        }.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
        for gamma, path in zip((0, 2), self.runs, strict=True):
            write_json(path, make_run(gamma))
        self.model.parent.mkdir(parents=True)
        (self.model.parent / MODEL_FILE).write_text("{}\n")
        write_json(
            self.model,
            {
                "name": "tiny",
                "source": {"source": "local", "path": "models/tiny"},
                "path": ".",
                "pinned": False,
                "revision": None,
                "fingerprint": {"weights_sha256": "a" * 64, "tokenizer_sha256": "b" * 64, "max_context": None},
                "files": {MODEL_FILE: sha256_file(self.model.parent / MODEL_FILE)},
            },
        )
        write_json(
            self.manifest,
            {
                "source": "prompts.jsonl",
                "source_sha256": sha256_file(root / "prompts.jsonl"),
                "output_sha256": sha256_file(self.dataset),
                "count": 1,
                "limit": None,
            },
        )
        self.write_requests()

    def write_requests(self, tpot: float = 5.0, text: str = "text", **cells: Any) -> None:
        """requests.csv with one request of gamma 0 and 2."""
        with (self.results / "requests.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, REQUEST_COLUMNS, restval="0", lineterminator="\n")
            table.writeheader()
            for gamma in (0, 2):
                digest = hashlib.sha256(text.encode()).hexdigest()
                row = {"request_id": "a", "gamma": gamma, "tpot_ms": tpot, "ttft_ms": 2 * tpot, "output_sha256": digest}
                table.writerow({**PLAIN, **row, **(cells if gamma else {})})

    def record(self) -> dict[str, Any]:
        from specsplit.provenance.record import build_record

        return build_record(
            config=self.config,
            run_files=self.runs,
            model_files=[self.model] if self.model else [],
            dataset_manifest=self.manifest,
            result_files=[self.summary],
            root=self.root,
        )

    def failures(self) -> dict[str, str]:
        """item -> detail of what the checklist refuses."""
        record = self.record()
        failed = {item["item"]: item["detail"] for item in record["checklist"] if not item["ok"]}
        assert record["complete"] is (not failed)
        return failed

    def finish(self) -> str:
        """Write config.json, the record, the patch and SHA256SUMS; returns what `provenance record` printed."""
        folder = self.results / "provenance"
        write_json(folder / "config.json", self.config)
        status, printed = specsplit(
            *("provenance", "record", "--config", "results/provenance/config.json"),
            *("--runs", *self._names(self.runs), "--models", *self._names([self.model])),
            *("--dataset", "results/dataset/manifest.json", "--results", "results/requests.csv"),
            *("results/per_round.csv", "--output", RECORD, "--patch", "results/provenance/changes.patch"),
            folder=self.root,
        )
        assert status == 0, printed
        status, sealed = specsplit("provenance", "seal", "--output", SEAL, *self.sealed(), folder=self.root)
        assert status == 0, sealed
        return printed

    def sealed(self) -> list[str]:
        skipped = (self.root / SEAL, self.results / "archive.zip")
        logs = self.results / "logs"
        paths = [path for path in self.results.rglob("*") if path.is_file() and path not in skipped]
        return self._names([path for path in sorted(paths) if not path.is_relative_to(logs)])

    def archive(self) -> Path:
        files = [*self.sealed(), SEAL, *self._names([self.model])]
        status, printed = specsplit(
            "provenance", "archive", "--output", "results/archive.zip", *files, folder=self.root
        )
        assert status == 0, printed
        return self.results / "archive.zip"

    def _names(self, paths: Sequence[Path]) -> list[str]:
        return [path.relative_to(self.root).as_posix() for path in paths]
