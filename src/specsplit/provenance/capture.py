"""What a result was made with: machine, GPU, software, source code; and the record of it all beside the runs.

Every capture returns a dict that JSON can hold. What cannot be had is null with the reason beside it; nothing
here fails because a tool is missing.
"""

from __future__ import annotations

import csv
import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import specsplit
from specsplit.errors import UserError
from specsplit.hashing import sha256_file
from specsplit.jsonio import json_sha256, read_json_object
from specsplit.workers.environment import REQUIRED

SCHEMA_VERSION = 1
ENVIRONMENT_VARIABLES = (
    *REQUIRED,
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "HF_HUB_OFFLINE",
)
# nvidia-smi's name for each column, and ours.
GPU_COLUMNS = {
    "name": "name",
    "uuid": "uuid",
    "driver_version": "driver_version",
    "memory.total": "memory_total_mib",
    "pstate": "pstate",
    "clocks.sm": "clocks_sm_mhz",
    "clocks.mem": "clocks_mem_mhz",
    "power.draw": "power_draw_w",
}


def utc_now() -> str:
    """The time now, as ISO 8601 in UTC: 2025-01-31T12:00:00.123456Z."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


# ---- the machine


def capture_gpu(timeout_s: float = 30.0) -> dict[str, Any]:
    """State of every NVIDIA GPU: {available, reason, cuda_version, gpus: [...], raw}.

    Memory is MiB, clocks MHz, power watts; what a GPU does not report is null. raw: `nvidia-smi -q`.
    timeout_s: limit of each of the two calls; a broken driver can make nvidia-smi hang.
    """
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_COLUMNS)}", "--format=csv,noheader,nounits"]
    state: dict[str, Any] = {
        "available": False,
        "reason": None,
        "cuda_version": None,
        "gpus": [],
        "raw": None,
    }
    table, reason = _run(query, timeout_s)
    if table is None:
        return {**state, "reason": reason}
    rows = [row for row in csv.reader(table.splitlines(), skipinitialspace=True) if row]
    if not rows or any(len(row) != len(GPU_COLUMNS) for row in rows):
        return {**state, "reason": f"nvidia-smi: lists no GPU: {table.strip()[:200] or 'no output'}"}
    raw, reason = _run(["nvidia-smi", "-q"], timeout_s)
    cuda = re.search(r"^CUDA (?:\w+ )?Version\s*:\s*([\d.]+)", raw or "", re.MULTILINE)
    if raw is not None and cuda is None:
        reason = "nvidia-smi -q: names no CUDA version"
    gpus = [_gpu(row) for row in rows]
    return {"available": True, "reason": reason, "cuda_version": cuda and cuda[1], "gpus": gpus, "raw": raw}


def _gpu(row: Sequence[str]) -> dict[str, Any]:
    gpu: dict[str, Any] = {}
    for key, cell in zip(GPU_COLUMNS.values(), row, strict=True):
        text = cell.strip()
        if text.startswith("["):  # [N/A], [Not Supported], [Unknown Error]
            gpu[key] = None
        elif key.endswith(("_mib", "_mhz", "_w")):
            gpu[key] = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None
        else:
            gpu[key] = text
    return gpu


def capture_machine() -> dict[str, Any]:
    """Host name, operating system, processor, memory (bytes), Python, and PyTorch.

    torch.threads is that of this process; a worker may have been told another number.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return {
        "hostname": platform.node(),
        "os": _os_name(),
        "kernel": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu_model": _cpu_model(),
        "cores_logical": psutil.cpu_count(logical=True),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_usable": len(affinity(0)) if affinity else psutil.cpu_count(logical=True),
        "memory_bytes": psutil.virtual_memory().total,
        "python": sys.version,
        "torch": _torch(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):  # not a Linux, or one without the file
        return platform.platform()


def _cpu_model() -> str | None:
    try:
        # x86 says "model name"; most ARM kernels say nothing of the kind.
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    text, _ = _run(["sysctl", "-n", "machdep.cpu.brand_string"], 5.0)
    return (text and text.strip()) or platform.processor() or None


def _torch() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        return {"available": False, "reason": f"torch cannot be imported: {error}"}
    return {
        "available": True,
        "reason": None,
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "build": torch.__config__.show().strip(),
        "parallel": torch.__config__.parallel_info().strip(),
    }


# ---- the software


def capture_software() -> dict[str, Any]:
    """Python, Snakemake, SpecSplit, and the version of every installed package, with a hash over them."""
    packages: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # a half-removed package has none
            # The first one on sys.path is the one that is imported.
            packages.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    packages = dict(sorted(packages.items()))
    return {
        "python": platform.python_version(),
        "specsplit": specsplit.__version__,
        "snakemake": packages.get("snakemake"),
        "packages": packages,
        "sha256": json_sha256(packages),
    }


def capture_git(root: Path) -> dict[str, Any]:
    """{commit, branch, dirty, reason} of the checkout at `root`; nulls and the reason when there is none.

    branch is null on a detached head. dirty counts new files that git does not ignore. Never raises.
    """
    unknown = {"commit": None, "branch": None, "dirty": None}
    tracked, reason = _git(root, "ls-files", "--", ".")
    if tracked is None:
        return {**unknown, "reason": reason}
    if not tracked:
        # An unpacked archive inside someone's own repository: that repository's commit says nothing about it.
        return {**unknown, "reason": f"git: no file under {root} is tracked"}
    commit, reason = _git(root, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return {**unknown, "reason": reason}
    status, reason = _git(root, "status", "--porcelain")
    branch, _ = _git(root, "symbolic-ref", "--quiet", "--short", "HEAD")
    dirty = None if status is None else bool(status)
    return {"commit": commit, "branch": branch, "dirty": dirty, "reason": reason}


def _git(root: Path, *arguments: str) -> tuple[str | None, str | None]:
    # Without optional locks `git status` writes nothing into the checkout.
    text, reason = _run(["git", "--no-optional-locks", "-C", str(root), *arguments], 30.0)
    return (None if text is None else text.strip()), reason


def capture_environment() -> dict[str, Any]:
    """The variables that decide whether a run can be repeated exactly; null = not set."""
    values: dict[str, Any] = {name: os.environ.get(name) for name in ENVIRONMENT_VARIABLES}
    return {**values, "hash_randomization": bool(sys.flags.hash_randomization)}


def hash_source_tree(root: Path) -> str:
    """One sha256 over every file under `root`, by relative path and content; compiled Python is left out."""
    digest = hashlib.sha256()
    # as_posix: the same order and the same hash on every system.
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    for name, path in sorted(paths.items()):
        if "__pycache__" not in path.relative_to(root).parts:
            digest.update(f"{sha256_file(path)}  {name}\n".encode())
    return digest.hexdigest()


def _run(command: Sequence[str], timeout_s: float) -> tuple[str | None, str | None]:
    """(output, None), or (None, the reason why there is none)."""
    name = command[0]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except FileNotFoundError:
        return None, f"{name}: command not found"
    except subprocess.TimeoutExpired:
        return None, f"{name}: no answer within {timeout_s:g} s"
    except OSError as error:
        return None, f"{name}: {error.strerror or error}"
    if done.returncode:
        said = " ".join((done.stderr.strip() or done.stdout.strip() or "no message").split())
        return None, f"{name}: exit status {done.returncode}: {said[:300]}"
    return done.stdout, None


# ---- the record


def build_record(
    *,
    config: dict[str, Any],
    run_files: Sequence[Path],
    model_files: Sequence[Path],
    dataset_manifest: Path,
    result_files: Sequence[Path],
    root: Path,
) -> dict[str, Any]:
    """The provenance record of one experiment: inputs, commands, surroundings, hashes of the results.

    run_files: the run.json of every run. model_files: the model.json of every model. They and the manifest of
    the dataset are embedded as they are. root: the project's folder; paths inside it are recorded relative to
    it. `checklist` is what a reviewer would ask for, as {item, ok, detail}; `complete`: all of it is there.
    Raises UserError that names a missing or malformed file.
    """
    runs = [(_relative(path, root), read_json_object(path)) for path in run_files]
    models = [(_relative(path, root), read_json_object(path)) for path in model_files]
    dataset = read_json_object(dataset_manifest)
    gpu, git = capture_gpu(), capture_git(root)
    checklist = [
        _check_seeds(config, runs),
        *(_check_variable(name, value, runs) for name, value in REQUIRED.items()),
        _check_commands(runs),
        _check_models(models),
        _check_dataset(dataset, dataset_manifest, result_files),
        _check_gpu(gpu),
        _check_git(git),
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "created": utc_now(),
        "complete": all(item["ok"] for item in checklist),
        "checklist": checklist,
        "config": config,
        "config_sha256": json_sha256(config),
        "runs": [run for _, run in runs],
        "models": [model for _, model in models],
        "dataset": dataset,
        "inputs": [_file_entry(path, root) for path in (*run_files, *model_files, dataset_manifest)],
        "results": [_file_entry(path, root) for path in result_files],
        "machine": capture_machine(),
        "gpu": gpu,
        "environment": capture_environment(),
        "software": capture_software(),
        "git": git,
        # The code that ran, which an installed copy may have from elsewhere than `root`.
        "source_sha256": hash_source_tree(Path(specsplit.__file__).parent),
    }


def _relative(path: Path, root: Path) -> str:
    path, root = path.resolve(), root.resolve()
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _file_entry(path: Path, root: Path) -> dict[str, Any]:
    try:
        return {"path": _relative(path, root), "sha256": sha256_file(path), "bytes": path.stat().st_size}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; make it again with the workflow") from None


def _item(item: str, problems: Sequence[str], detail: str) -> dict[str, Any]:
    """One line of the checklist; `detail` is what it says when there is no problem."""
    return {"item": item, "ok": not problems, "detail": "; ".join(problems) or detail}


Named = Sequence[tuple[str, Mapping[str, Any]]]


def _check_seeds(config: Mapping[str, Any], runs: Named) -> dict[str, Any]:
    seed = config.get("seed")
    problems = [] if type(seed) is int else ["the configuration has no seed"]
    for name, run in runs:
        if run.get("seed", seed) != seed:
            problems.append(f"{name}: seed {run['seed']}, but the configuration has {seed}")
    return _item("seeds recorded", problems, f"seed {seed}")


def _check_variable(variable: str, value: str, runs: Named) -> dict[str, Any]:
    """The variable in the client of every run and in each worker that it used."""
    problems = [] if runs else ["no run recorded"]
    for name, run in runs:
        processes = {name: run, **{f"{name}, {role} worker": w for role, w in (run.get("workers") or {}).items()}}
        for where, process in processes.items():
            environment = process.get("environment")
            found = environment.get(variable) if isinstance(environment, Mapping) else None
            if found != value:
                problems.append(f"{where}: {'not set' if found is None else found}")
    return _item(f"{variable}={value} in every run and its workers", problems, f"{len(runs)} run(s)")


def _check_commands(runs: Named) -> dict[str, Any]:
    problems = [] if runs else ["no run recorded"]
    for name, run in runs:
        argv = run.get("argv")
        if not argv or not isinstance(argv, list):
            problems.append(f"{name}: no command (argv)")
        started, finished = _utc(run.get("started")), _utc(run.get("finished"))
        if started is None or finished is None:
            problems.append(f"{name}: started or finished is not a UTC time")
        elif finished < started:
            problems.append(f"{name}: finished before it started")
        code = run.get("exit_code")
        if type(code) is not int or code != 0:
            problems.append(f"{name}: exit code {code}")
    return _item("command, UTC times and exit code 0 of every run", problems, f"{len(runs)} run(s)")


def _utc(text: Any) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return time if time.utcoffset() == timedelta(0) else None


def _check_models(models: Named) -> dict[str, Any]:
    problems = [] if models else ["no model recorded"]
    for name, model in models:
        if _weights_sha256(model) is None:
            problems.append(f"{name}: no weights_sha256")
    detail = ", ".join(f"{model.get('name', name)} {_weights_sha256(model)}" for name, model in models)
    return _item("models pinned by the hash of their weights", problems, detail)


def _weights_sha256(model: Mapping[str, Any]) -> str | None:
    fingerprint = model.get("fingerprint")
    found = fingerprint.get("weights_sha256") if isinstance(fingerprint, Mapping) else None
    return found if isinstance(found, str) and re.fullmatch("[0-9a-f]{64}", found) else None


def _check_dataset(manifest: Mapping[str, Any], where: Path, results: Sequence[Path]) -> dict[str, Any]:
    """The dataset lies beside its manifest, or among the results."""
    item = "dataset matches the hash in its manifest"
    expected = manifest.get("output_sha256")
    if not isinstance(expected, str):
        return _item(item, [f"{where.name}: no output_sha256"], "")
    for path in (*sorted(where.parent.glob("*.jsonl")), *results):
        if path.is_file() and sha256_file(path) == expected:
            return _item(item, [], f"{path.name} {expected}")
    return _item(item, [f"no file beside {where.name} has sha256 {expected}"], "")


def _check_gpu(gpu: Mapping[str, Any]) -> dict[str, Any]:
    problems = [] if gpu["available"] or gpu["reason"] else ["neither a GPU nor a reason"]
    detail = f"{len(gpu['gpus'])} GPU(s)" if gpu["available"] else f"no GPU: {gpu['reason']}"
    return _item("GPU state recorded or its absence explained", problems, detail)


def _check_git(git: Mapping[str, Any]) -> dict[str, Any]:
    problems = [] if git["commit"] else [str(git["reason"])]
    changes = " with uncommitted changes" if git["dirty"] else ""
    return _item("git commit known", problems, f"{git['commit']}{changes}")
