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


def verify(experiment: Experiment) -> Verdict:
    """Compare every file with the hashes of it in SHA256SUMS, the record and the crate.

    A list of hashes that is itself not as sealed is named, and what it says of other files is not used.
    """
    return _Verification(experiment).run()


class _Verification:
    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.verdict = Verdict()
        self.crate = self._crate_hashes()
        self.sha256 = cache(self._sha256)  # of a recorded path; None = there is no such file

    def run(self) -> Verdict:
        verdict = self.verdict
        for file, problem in self.experiment.damaged.items():
            self.blame(file, f"damaged in the archive: {problem}")
        if self.experiment.archived:
            self._check_sums(ARCHIVE_SUMS)
            self._check_nothing_added()
        if self.experiment.at(SEAL).is_file() and SEAL not in verdict.differing:
            self._check_sums(SEAL)
        elif not self.experiment.archived:
            verdict.notes.append(f"no {SEAL}: nothing vouches for the record itself, the summary and the figures")
        if CRATE not in verdict.differing:
            for file, expected in self.crate.items():
                self.compare(file, expected, CRATE)
        if RECORD in verdict.differing:
            verdict.notes.append(f"{RECORD} is not what was sealed: the hashes in it were not used")
        else:
            self._check_record()
        return verdict

    def blame(self, file: str, problem: str) -> None:
        self.verdict.checked.discard(file)
        self.verdict.differing.setdefault(file, problem)

    def compare(self, file: str, expected: str, witness: str) -> None:
        found = self.sha256(file)
        if found == expected:
            if file not in self.verdict.differing:
                self.verdict.checked.add(file)
        elif found is None:
            self.blame(file, f"missing; {witness} lists it")
        else:
            self.blame(file, f"sha256 is {found[:12]}..., {witness} says {expected[:12]}...")

    def _sha256(self, file: str) -> str | None:
        path = self.experiment.at(file)
        return sha256_file(path) if path.is_file() else None

    def _check_sums(self, name: str) -> None:
        try:
            sums = read_sums(self.experiment.at(name))
        except UserError as error:
            self.blame(name, str(error))
            return
        self.verdict.checked.add(name)
        other, witness = (CRATE, self.crate) if self.crate else (RECORD, self._record_hashes())
        for file, expected in sums.items():
            found = self.sha256(file)
            # A second witness, itself as it was sealed, tells which of the two was changed.
            if found not in (None, expected) and witness.get(file) == found and sums.get(other) == self.sha256(other):
                self.blame(name, f"its hash of {file} is neither the file's nor that in {other}")
            else:
                self.compare(file, expected, name)

    def _check_nothing_added(self) -> None:
        root = self.experiment.root
        try:
            listed = {ARCHIVE_SUMS, *read_sums(root / ARCHIVE_SUMS)}
        except UserError:
            return  # told already
        found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
        for file in sorted(found - listed):
            self.blame(file, f"not listed in {ARCHIVE_SUMS}: added later")

    def _crate_hashes(self) -> dict[str, str]:
        if not self.experiment.archived or not self.experiment.at(CRATE).is_file():
            return {}
        try:
            graph = read_json_object(self.experiment.at(CRATE))["@graph"]
            # Models have one too: of their weights, which are elsewhere.
            files = [entity for entity in graph if "sha256" in entity and not entity["@id"].startswith("#")]
            return {unquote(entity["@id"]): entity["sha256"] for entity in files}
        except (UserError, KeyError, TypeError):
            return {}  # its own hash tells that it was changed

    def _record_hashes(self) -> dict[str, str]:
        try:
            record = self.experiment.record()
            return {entry["path"]: entry["sha256"] for entry in (*record["inputs"], *record["results"])}
        except (UserError, KeyError, TypeError):
            return {}

    # ---- the record

    def _check_record(self) -> None:
        try:
            record = self.experiment.record()
            check_record(record)
        except UserError as error:
            self.blame(RECORD, str(error))
            return
        self.verdict.checked.add(RECORD)
        for problem in _contradictions(record):
            self.blame(RECORD, problem)
        for entry in (*record["inputs"], *record["results"]):
            if entry["path"].split("/")[0] == RESULTS or self.sha256(entry["path"]) is not None:
                self.compare(entry["path"], entry["sha256"], RECORD)
            else:
                self.verdict.notes.append(f"{entry['path']} is not here; its sha256 was {entry['sha256']}")
        self._check_config(record)
        self._check_patch(record)
        self._check_files("the source code is", f"{SOURCE}/", record["source_files"], RECORD)
        self._check_files("the workflow is", "", record["workflow_files"], RECORD)
        for model in record["models"]:
            name, folder = model.get("name"), model.get("path", ".")
            folder = f"resources/models/{name}" if folder == "." else folder
            files = model.get("files") or {}
            self._check_files(f"the files of model {name} are", f"{folder}/", files, f"{RECORD}, model {name},")

    def _check_config(self, record: Mapping[str, Any]) -> None:
        if not self.experiment.at(CONFIG).is_file():
            self.blame(CONFIG, "missing")
        elif CONFIG not in self.verdict.differing:
            try:
                same = read_json(self.experiment.at(CONFIG)) == record["config"]
            except UserError as error:
                self.blame(CONFIG, str(error))
                return
            self.verdict.checked.add(CONFIG)
            if not same:
                self.blame(CONFIG, f"is not the configuration in {RECORD}")

    def _check_patch(self, record: Mapping[str, Any]) -> None:
        expected = record["git"]["changes"]["sha256"]
        if expected is None or PATCH in self.verdict.differing:
            return
        found = self.sha256(PATCH)
        if found == expected:
            self.verdict.checked.add(PATCH)
        else:
            self.blame(PATCH, f"missing; {RECORD} has its content" if found is None else f"is not the diff in {RECORD}")

    def _check_files(self, what: str, prefix: str, files: Mapping[str, str], witness: str) -> None:
        """Files that are not part of the results, so that they may all be elsewhere."""
        if not any(self.experiment.at(prefix + file).is_file() for file in files):
            self.verdict.notes.append(f"{what} not here: {len(files)} hashes not checked")
            return
        for file, expected in files.items():
            self.compare(prefix + file, expected, witness)


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
