"""Recomputes every hash of an experiment and names what differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import unquote

from specsplit.errors import UserError
from specsplit.io import combined_sha256, json_sha256, read_json, read_json_object, sha256_file
from specsplit.provenance.folder import (
    ARCHIVE_SUMS,
    CONFIG,
    CRATE,
    PATCH,
    RECORD,
    RESULTS,
    SEAL,
    Experiment,
    read_sums,
)
from specsplit.provenance.record import check_record

SOURCE = "src/specsplit"
# What `run_code_sha256` covers in a record that does not list its files: folders and files of the package as it was.
FORMER_RUN_CODE = (
    *("decoding", "models", "workers", "rpc", "config.py"),
    *("bench/runner.py", "bench/journal.py", "bench/records.py", "bench/metrics.py", "bench/dataset.py"),
    "bench/sweep.py",
)


@dataclass
class Verdict:
    """checked: files that are as recorded. differing: {file: what is wrong}. notes: what could not be looked at."""

    checked: set[str] = field(default_factory=set)
    differing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def blame(self, file: str, problem: str) -> None:
        self.checked.discard(file)
        self.differing.setdefault(file, problem)


def verify(experiment: Experiment) -> Verdict:
    """Compare every file with the hashes of it in SHA256SUMS, the record and the crate.

    A list of hashes that is itself not as sealed is named, and what it says of other files is not used.
    """
    verdict = Verdict()
    for file, problem in experiment.damaged.items():
        verdict.blame(file, f"damaged in the archive: {problem}")
    hashes = _Hashes(experiment)
    crate = _crate_hashes(experiment)
    sealed = False
    if experiment.archived:
        sealed = True
        _check_sums(ARCHIVE_SUMS, experiment, hashes, crate, verdict)
        _check_nothing_added(experiment, verdict)
    if experiment.at(SEAL).is_file() and SEAL not in verdict.differing:
        sealed = True
        _check_sums(SEAL, experiment, hashes, crate, verdict)
    if not sealed:
        verdict.notes.append(f"no {SEAL}: nothing vouches for the record itself, the summary and the figures")
    if CRATE not in verdict.differing:
        for file, expected in crate.items():
            _compare(file, expected, CRATE, hashes, verdict)
    if RECORD in verdict.differing:
        verdict.notes.append(f"{RECORD} is not what was sealed: the hashes in it were not used")
    else:
        _check_record(experiment, hashes, verdict)
    return verdict


class _Hashes:
    """sha256 of the experiment's files by recorded path, computed once; None = there is no such file."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self.of = cache(self._of)

    def _of(self, file: str) -> str | None:
        path = self._experiment.at(file)
        return sha256_file(path) if path.is_file() else None


def _compare(file: str, expected: str, witness: str, hashes: _Hashes, verdict: Verdict) -> None:
    found = hashes.of(file)
    if found == expected:
        if file not in verdict.differing:
            verdict.checked.add(file)
    elif found is None:
        verdict.blame(file, f"missing; {witness} lists it")
    else:
        verdict.blame(file, f"sha256 is {found[:12]}..., {witness} says {expected[:12]}...")


def _check_sums(name: str, experiment: Experiment, hashes: _Hashes, crate: Mapping[str, str], verdict: Verdict) -> None:
    try:
        sums = read_sums(experiment.at(name))
    except UserError as error:
        verdict.blame(name, str(error))
        return
    verdict.checked.add(name)
    other, witness = (CRATE, crate) if crate else (RECORD, _record_hashes(experiment))
    for file, expected in sums.items():
        found = hashes.of(file)
        # A second witness, itself as it was sealed, tells which of the two was changed.
        if found not in (None, expected) and witness.get(file) == found and sums.get(other) == hashes.of(other):
            verdict.blame(name, f"its hash of {file} is neither the file's nor that in {other}")
        else:
            _compare(file, expected, name, hashes, verdict)


def _check_nothing_added(experiment: Experiment, verdict: Verdict) -> None:
    try:
        listed = {ARCHIVE_SUMS, *read_sums(experiment.root / ARCHIVE_SUMS)}
    except UserError:
        return  # told already
    there = {path.relative_to(experiment.root).as_posix() for path in experiment.root.rglob("*") if path.is_file()}
    for file in sorted(there - listed):
        verdict.blame(file, f"not listed in {ARCHIVE_SUMS}: added later")


def _crate_hashes(experiment: Experiment) -> dict[str, str]:
    if not experiment.archived or not experiment.at(CRATE).is_file():
        return {}
    try:
        graph = read_json_object(experiment.at(CRATE))["@graph"]
        # Models have one too: of their weights, which are elsewhere.
        files = [entity for entity in graph if "sha256" in entity and not entity["@id"].startswith("#")]
        return {unquote(entity["@id"]): entity["sha256"] for entity in files}
    except (UserError, KeyError, TypeError):
        return {}  # its own hash tells that it was changed


def _record_hashes(experiment: Experiment) -> dict[str, str]:
    try:
        record = experiment.record()
        return {entry["path"]: entry["sha256"] for entry in (*record["inputs"], *record["results"])}
    except (UserError, KeyError, TypeError):
        return {}


# ---- the record


def _check_record(experiment: Experiment, hashes: _Hashes, verdict: Verdict) -> None:
    try:
        record = experiment.record()
        check_record(record)
    except UserError as error:
        verdict.blame(RECORD, str(error))
        return
    verdict.checked.add(RECORD)
    for problem in _contradictions(record):
        verdict.blame(RECORD, problem)
    for entry in (*record["inputs"], *record["results"]):
        if entry["path"].split("/")[0] == RESULTS or hashes.of(entry["path"]) is not None:
            _compare(entry["path"], entry["sha256"], RECORD, hashes, verdict)
        else:
            verdict.notes.append(f"{entry['path']} is not here; its sha256 was {entry['sha256']}")
    _check_config(experiment, record, verdict)
    _check_patch(experiment, record, verdict)
    _check_tree(experiment, "source code", f"{SOURCE}/", record["source_files"], hashes, verdict)
    _check_tree(experiment, "workflow", "", record["workflow_files"], hashes, verdict)
    for model in record["models"]:
        _check_model(experiment, model, hashes, verdict)


def _contradictions(record: Mapping[str, Any]) -> Iterator[str]:
    computed = {
        "config_sha256": json_sha256(record["config"]),
        "source_sha256": combined_sha256(record["source_files"]),
        "run_code_sha256": combined_sha256(_run_code(record)),
        "workflow_sha256": combined_sha256(record["workflow_files"]),
    }
    for key, value in computed.items():
        if record[key] != value:
            yield f"{key} is {record[key][:12]}..., but its content gives {value[:12]}..."
    if record["software"]["sha256"] != json_sha256(record["software"]["packages"]):
        yield "software.sha256 is not the hash of software.packages"


def _run_code(record: Mapping[str, Any]) -> dict[str, str]:
    """The hashes of the files that decide what a run writes."""
    files = record["source_files"]
    if "run_code_files" in record:
        return {name: files.get(name, "") for name in record["run_code_files"]}
    return {name: sha for name, sha in files.items() if any(f"{name}/".startswith(f"{p}/") for p in FORMER_RUN_CODE)}


def _check_config(experiment: Experiment, record: Mapping[str, Any], verdict: Verdict) -> None:
    if not experiment.at(CONFIG).is_file():
        verdict.blame(CONFIG, "missing")
    elif CONFIG not in verdict.differing:
        try:
            same = read_json(experiment.at(CONFIG)) == record["config"]
        except UserError as error:
            verdict.blame(CONFIG, str(error))
            return
        verdict.checked.add(CONFIG)
        if not same:
            verdict.blame(CONFIG, f"is not the configuration in {RECORD}")


def _check_patch(experiment: Experiment, record: Mapping[str, Any], verdict: Verdict) -> None:
    changes = record["git"]["changes"]
    if changes["sha256"] is None or PATCH in verdict.differing:
        return
    path = experiment.at(PATCH)
    if not path.is_file():
        verdict.blame(PATCH, f"missing; {RECORD} has its content")
    elif sha256_file(path) != changes["sha256"]:
        verdict.blame(PATCH, f"is not the diff in {RECORD}")
    else:
        verdict.checked.add(PATCH)


def _check_tree(
    experiment: Experiment, name: str, prefix: str, files: Mapping[str, str], hashes: _Hashes, verdict: Verdict
) -> None:
    if not any(experiment.at(prefix + file).is_file() for file in files):
        verdict.notes.append(f"the {name} is not here: {len(files)} hashes not checked")
        return
    for file, expected in files.items():
        _compare(prefix + file, expected, RECORD, hashes, verdict)


def _check_model(experiment: Experiment, model: Mapping[str, Any], hashes: _Hashes, verdict: Verdict) -> None:
    name, files = model.get("name"), model.get("files") or {}
    folder = model.get("path", ".")
    folder = f"resources/models/{name}" if folder == "." else folder
    if not any(experiment.at(f"{folder}/{file}").is_file() for file in files):
        verdict.notes.append(f"the files of model {name} are not here: {len(files)} hashes not checked")
        return
    for file, expected in files.items():
        _compare(f"{folder}/{file}", expected, f"{RECORD}, model {name},", hashes, verdict)
