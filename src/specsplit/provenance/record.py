"""The record of how an experiment came about."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

from specsplit.errors import UserError, listed, why
from specsplit.io import combined_sha256, json_sha256, read_json_object, sha256_file
from specsplit.provenance.capture import (
    WORKFLOW_FILES,
    capture_environment,
    capture_lock,
    capture_machine,
    capture_software,
    hash_tree,
    utc_now,
)
from specsplit.provenance.checklist import make_checklist
from specsplit.provenance.closure import PACKAGE, command_files
from specsplit.provenance.facts import differences, read_run, run_facts, told_facts
from specsplit.provenance.folder import MANIFEST, SEAL
from specsplit.provenance.git import capture_diff, capture_git
from specsplit.provenance.gpu import capture_gpu
from specsplit.provenance.redaction import redact
from specsplit.provenance.steps import read_steps, workflow_command

SCHEMA_VERSION = 2
SCHEMA_FILE = Path(__file__).with_name("record_schema.json")
# Why a manifest of a model has a null.
MODEL_REASONS = {
    "revision": "only a repository has revisions",
    "upstream_sha256": "only a file of a package has a hash upstream",
    "max_context": "the model sets no limit",
}


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

    run_files: the run.json of every run. model_files: the model.json of every model. They and the manifest of the
    dataset are embedded as they are. root: the project's folder; paths inside it are recorded relative to it.
    `checklist` is what a reviewer would ask for, as {item, ok, detail}; `complete`: all of it is there. Secrets are
    left out. Raises UserError that names a missing or malformed file.
    """
    config = redact(config)
    runs = [(_relative(path, root), read_run(path)) for path in run_files]
    models = [(_relative(path, root), _explain_model(read_json_object(path))) for path in model_files]
    dataset = read_json_object(dataset_manifest)
    software = capture_software()
    inputs = [_file_entry(path, root) for path in (*run_files, *model_files, dataset_manifest)]
    results = [_file_entry(path, root) for path in result_files]
    # The code that ran, which an installed copy may have from elsewhere than `root`.
    source_files = hash_tree(PACKAGE)
    run_code = command_files("bench")
    workflow_files = hash_tree(root, WORKFLOW_FILES)
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "witnesses": [SEAL, MANIFEST],
        "created": utc_now(),
        "complete": False,
        "checklist": [],
        "config": config,
        "config_sha256": json_sha256(config),
        "workflow": workflow_command(),
        "steps": read_steps([entry["path"] for entry in (*inputs, *results)], root),
        "runs": [{"file": name, **run} for name, run in runs],
        "differences": _differences(runs),
        "models": [model for _, model in models],
        "dataset": dataset,
        "seeds": _seeds(config, runs),
        "inputs": inputs,
        "results": results,
        "machine": capture_machine(),
        "gpu": capture_gpu(),
        "environment": capture_environment(),
        "software": software,
        "lock": capture_lock(root, software["packages"]),
        "git": {**capture_git(root), "changes": capture_diff(root)},
        "source_sha256": combined_sha256(source_files),
        "run_code_sha256": combined_sha256({file: source_files[file] for file in run_code}),
        "run_code_files": run_code,
        "source_files": source_files,
        "workflow_sha256": combined_sha256(workflow_files),
        "workflow_files": workflow_files,
    }
    # Not the files themselves, whose hashes are recorded: they are written without secrets already.
    record |= {key: redact(record[key]) for key in ("runs", "models", "dataset", "steps")}
    dataset_files = [*sorted(dataset_manifest.parent.glob("*.jsonl")), *result_files]
    record["checklist"] = make_checklist(record, runs, models, dataset_files)
    record["complete"] = all(item["ok"] for item in record["checklist"])
    check_record(record)
    return record


def check_record(record: Mapping[str, Any]) -> None:
    """Raise UserError that lists where a record is not what record_schema.json says."""
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"a record of version {version}, not {SCHEMA_VERSION}: make it again with "
            "snakemake --cores N --forcerun provenance -- results/summary.csv"
        )
    problems = [
        f"{'.'.join(map(str, error.absolute_path)) or 'the record'}: {error.message[:200]}"
        for error in _validator().iter_errors(record)
    ]
    if problems:
        shown = listed(problems, 10, "\n")
        raise UserError(f"not a provenance record of version {SCHEMA_VERSION}:\n{shown}")


@cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))


def _relative(path: Path, root: Path) -> str:
    path, root = path.resolve(), root.resolve()
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _file_entry(path: Path, root: Path) -> dict[str, Any]:
    try:
        return {"path": _relative(path, root), "sha256": sha256_file(path), "bytes": path.stat().st_size}
    except OSError as error:
        raise UserError(f"{path}: {why(error)}; make it again with the workflow") from None


def _explain_model(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with a `reason` for the nulls in each of its parts."""
    explained = {key: _explain_model(value) if isinstance(value, dict) else value for key, value in manifest.items()}
    nulls = [f"{key}: {MODEL_REASONS.get(key, 'not given')}" for key, value in manifest.items() if value is None]
    return {**explained, "reason": "; ".join(nulls)} if nulls else explained


def _differences(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """What differs between the runs and their workers, as {fact, values, matters}: value -> the runs that have it.

    matters: results of these runs are not joined.
    """
    found = []
    for matters, facts_of in ((True, run_facts), (False, told_facts)):
        for each in differences({name: facts_of(run) for name, run in runs}):
            found.append(
                {"fact": each.fact, "values": {k: list(v) for k, v in each.values.items()}, "matters": matters}
            )
    return found


def _seeds(config: Mapping[str, Any], runs: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    return {
        "configuration": config.get("seed"),
        "bootstrap": config.get("seed"),
        "requests": "of the run's seed and the request's id; results/requests.csv, column seed",
        "runs": {name: run.get("seeds") for name, run in runs},
        "reason": None if "seed" in config else "the configuration has no seed",
    }
