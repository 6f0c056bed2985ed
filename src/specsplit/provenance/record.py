"""The record of how an experiment came about, and the checklist of what a reviewer would ask for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import specsplit
from specsplit.errors import UserError
from specsplit.hashing import sha256_file
from specsplit.jsonio import json_sha256, read_json_object
from specsplit.provenance.capture import (
    capture_environment,
    capture_machine,
    capture_software,
    hash_source_tree,
    utc_now,
)
from specsplit.provenance.git import capture_git
from specsplit.provenance.gpu import capture_gpu
from specsplit.workers.environment import REQUIRED

SCHEMA_VERSION = 1


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
