"""Recomputes every hash of an experiment and names what differs.

Several lists hold the same hashes: SHA256SUMS and manifest.json of the results, the description and the SHA256SUMS of
an archive. A file counts as it was when every list says so. Where lists contradict each other, one that stands alone
with one hash, and for which no other list vouches, is what was changed; otherwise the file is named, and the lists that
were changed with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from specsplit.errors import UserError, counted, listed, why
from specsplit.io import combined_sha256, json_sha256, read_json, read_json_object, sha256_file
from specsplit.provenance.facts import read_run_alone
from specsplit.provenance.folder import (
    ARCHIVE,
    ARCHIVE_SUMS,
    CONFIG,
    CRATE,
    MANIFEST,
    OF_WORKERS,
    PATCH,
    RECORD,
    RESULTS,
    SEAL,
    WORKERS,
    Experiment,
    list_files,
    open_experiment,
    read_sums,
)
from specsplit.provenance.record import check_record
from specsplit.provenance.seal import read_manifest

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


@dataclass(frozen=True)
class _List:
    """A list of hashes. omits: files that it never has; whole: every other file is in it, or was added later."""

    name: str
    files: Mapping[str, str]
    omits: frozenset[str]
    whole: bool

    def covers(self, file: str) -> bool:
        return file not in self.omits and (self.whole or file in self.files)


def verify(experiment: Experiment) -> Verdict:
    """Compare every file with the hashes of it in SHA256SUMS, manifest.json, the record and the crate.

    Named are files that were changed, are missing or were added, empty folders and symbolic links that were not there,
    and lists of hashes that are missing or were changed; what a changed list says of other files is not used.
    """
    return _Verification(experiment).run()


class _Verification:
    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.verdict = Verdict()
        self.sha256 = cache(self._sha256)  # of a recorded path; None = there is no such file
        self.record = self._read_record()
        root, prefix = (experiment.root, "") if experiment.archived else (experiment.results, RESULTS)
        files, self.empty, self.links = list_files(root, prefix) if root.is_dir() else (set(), set(), {})
        self.found = files - experiment.unlisted

    def run(self) -> Verdict:
        for file, problem in self.experiment.damaged.items():
            self.blame(_shown(file), f"damaged in the archive: {problem}")
        lists = self._trusted(self._read_lists())
        self._check_lists(lists)
        self._check_folders_and_links()
        self._check_runs()
        if RECORD in self.verdict.differing:
            self.verdict.notes.append(f"{RECORD} is not what was sealed: the hashes in it were not used")
        elif self.record is not None:
            self._check_record(self.record)
        if not self.experiment.archived:
            self._check_archive()
            files = self.experiment.at(WORKERS).rglob("*")
            if of_workers := sorted(path.name for path in files if path.suffix in OF_WORKERS and path.stat().st_size):
                self.verdict.notes.append(f"{WORKERS} has files of running workers, not sealed: {listed(of_workers)}")
        return self.verdict

    def blame(self, file: str, problem: str) -> None:
        self.verdict.checked.discard(file)
        self.verdict.differing.setdefault(file, problem)

    def compare(self, file: str, expected: str | None, witness: str) -> None:
        found = self.sha256(file)
        if found == expected:
            if file not in self.verdict.differing and found is not None:
                self.verdict.checked.add(file)
        elif found is None:
            self.blame(_shown(file), f"missing; {witness} lists it")
        elif expected is None:
            self.blame(_shown(file), f"not listed in {witness}: added later")
        else:
            is_now = f"sha256 is {found[:12]}..." if len(found) == 64 else found
            self.blame(_shown(file), f"{is_now}, {witness} says {expected[:12]}...")

    def _sha256(self, file: str) -> str | None:
        path = self.experiment.at(file)
        try:
            if path.is_file():
                return sha256_file(path)
            return "is no plain file" if path.exists() or path.is_symlink() else None
        except OSError as error:
            return f"cannot be read: {why(error)}"

    def _read_record(self) -> dict[str, Any] | None:
        try:
            if self.experiment.at(RECORD).is_file():  # reading a pipe would wait for ever
                return self.experiment.record()
            self.blame(RECORD, "missing")
        except UserError as error:
            self.blame(RECORD, str(error))
        return None

    # ---- the lists

    def _read_lists(self) -> list[_List]:
        """The lists that can be read, those first that vouch for others."""
        names = [name for name in READERS if self.experiment.archived or name in (SEAL, MANIFEST)]
        read = {name: content for name in names if (content := self._read(name)) is not None}
        self.manifest = read.get(MANIFEST)
        old = self.record is not None and "witnesses" not in self.record
        self.former = old and MANIFEST not in read.get(SEAL, {}) and self.manifest is None
        for name in names:
            if not self.experiment.at(name).is_file() and not (name == MANIFEST and self.former):
                self.blame(name, "missing: nothing can take its place")
        omits, lists = set(self.experiment.unlisted), []
        for name in READERS:
            omits.add(name)
            if name in read:
                files = read[name]["files"] if name == MANIFEST else read[name]
                lists.append(_List(name, files, frozenset(omits), name == ARCHIVE_SUMS or not self.former))
        return lists

    def _read(self, name: str) -> Any:
        path = self.experiment.at(name)
        if path.is_file():
            try:
                return READERS[name](path)
            except (UserError, OSError, KeyError, TypeError, AttributeError) as error:
                self.blame(name, str(error))
        return None

    def _trusted(self, lists: list[_List]) -> list[_List]:
        """Without those that are not as all lists before them say."""
        trusted: list[_List] = []
        for each in lists:
            above = [other for other in trusted if other.covers(each.name)]
            against = [other for other in above if other.files.get(each.name) != self.sha256(each.name)]
            if not against or len(against) < len(above):
                trusted.append(each)
                continue
            alike = len(above) == 1 and all(
                above[0].files.get(file) == each.files.get(file)
                for file in {*above[0].files, *each.files}
                if above[0].covers(file) and each.covers(file)
            )
            if alike:  # which of the two was changed? manifest.json has a hash of its own
                self.blame(above[0].name, f"its hash of {each.name} is not that of the file")
            if alike and each.name == MANIFEST:
                trusted.append(each)
                self.verdict.checked.add(each.name)
            else:
                self.compare(each.name, against[0].files.get(each.name), against[0].name)
        return trusted

    def _check_lists(self, lists: list[_List]) -> None:
        names = {file for each in lists for file in each.files} | self.found
        conflicts = []
        for file in sorted(names, key=_shown):
            if file in self.verdict.differing or file in self.verdict.checked:
                continue
            claims = [(each.files.get(file), each) for each in lists if each.covers(file)]
            agree = [each for claim, each in claims if claim == self.sha256(file)]
            differ = [each for claim, each in claims if claim != self.sha256(file)]
            if agree and differ:
                conflicts.append((file, agree, differ))
            elif claims:
                self.compare(file, claims[0][0], claims[0][1].name)
        errors = Counter(each.name for _, _, differ in conflicts for each in differ)
        for file, agree, differ in conflicts:
            if all(errors[each.name] == 1 and not self._vouched_for(each, lists) for each in differ):
                for each in differ:
                    self.blame(each.name, f"its hash of {file} is neither the file's nor that in {agree[0].name}")
                continue
            self.compare(file, differ[0].files.get(file), differ[0].name)
            for each in agree:
                self.blame(each.name, f"its hash of {_shown(file)} is not that in {differ[0].name}")
        for each in lists:
            if each.name not in self.verdict.differing:
                self.verdict.checked.add(each.name)

    def _check_runs(self) -> None:
        """What runs and measurements beside the sweep say of themselves and their tables."""
        for name in sorted(self.found - self.verdict.differing.keys(), key=_shown):
            folder, _, own = name.rpartition("/")
            if not folder.startswith(RESULTS) or not (own == "run.json" or own.endswith("_run.json")):
                continue
            try:
                tables = read_run_alone(self.experiment.at(name)).get("files") or {}
            except UserError as error:
                self.blame(_shown(name), str(error))
                continue
            for table, digest in tables.items():
                self.compare(f"{folder}/{table}", digest, name)

    def _vouched_for(self, own: _List, lists: list[_List]) -> bool:
        return any(each.files.get(own.name) == self.sha256(own.name) for each in lists if each is not own)

    def _check_folders_and_links(self) -> None:
        if self.former:
            return
        listed: Mapping[str, Any] = {"folders": (), "links": {}}
        if self.manifest is not None and MANIFEST not in self.verdict.differing:
            listed = self.manifest
        for folder in sorted(self.empty - set(listed["folders"]), key=_shown):
            if not any(file.startswith(f"{folder}/") for file in self.verdict.differing):  # whose files are gone
                self.blame(f"{_shown(folder)}/", "an empty folder that was added")
        for folder in sorted(set(listed["folders"]) - self.empty):
            if not self.experiment.at(folder).is_dir():
                self.blame(f"{_shown(folder)}/", f"missing; {MANIFEST} lists this empty folder")
        for link in sorted({*self.links, *listed["links"]}, key=_shown):
            if link not in self.experiment.unlisted - {ARCHIVE} and self.links.get(link) != listed["links"].get(link):
                now = f"a symbolic link to {self.links[link]}" if link in self.links else "no symbolic link any more"
                self.blame(_shown(link), f"{_shown(now)}; {MANIFEST} says otherwise")

    def _check_archive(self) -> None:
        """The archive.zip among the results: whole, and of these very results."""
        path = self.experiment.at(ARCHIVE)
        if not path.is_file():
            return
        try:
            with open_experiment(path) as packed:
                inside = _Verification(packed)
                for file, problem in inside.run().differing.items():
                    self.blame(ARCHIVE, f"{file} in it: {problem}")
                if inside.sha256(RECORD) != self.sha256(RECORD):
                    self.blame(ARCHIVE, "it is of other results: its record is not the one here")
                names = [name for name in inside.found - READERS.keys() if name.startswith(f"{RESULTS}/")]
                other = [_shown(name) for name in sorted(names) if inside.sha256(name) != self.sha256(name)]
                if other := [name for name in other if not name.startswith(f"{RESULTS}/logs/")]:  # which go on
                    self.verdict.notes.append(f"{ARCHIVE} has other files than there are here: {listed(other)}")
        except UserError as error:
            self.blame(ARCHIVE, str(error))
        if ARCHIVE not in self.verdict.differing:
            self.verdict.checked.add(ARCHIVE)

    # ---- the record

    def _check_record(self, record: Mapping[str, Any]) -> None:
        try:
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
        if CONFIG in self.verdict.differing:
            return
        self.verdict.checked.add(CONFIG)
        try:
            if not self.experiment.at(CONFIG).is_file():
                self.blame(CONFIG, "missing")
            elif read_json(self.experiment.at(CONFIG)) != record["config"]:
                self.blame(CONFIG, f"is not the configuration in {RECORD}")
        except UserError as error:
            self.blame(CONFIG, str(error))

    def _check_patch(self, record: Mapping[str, Any]) -> None:
        expected = record["git"]["changes"]["sha256"]
        if expected is not None and PATCH not in self.verdict.differing:
            self.compare(PATCH, expected, RECORD)

    def _check_files(self, what: str, prefix: str, files: Mapping[str, str], witness: str) -> None:
        """Files that are not part of the results, so that they may all be elsewhere."""
        if not any(self.experiment.at(prefix + file).is_file() for file in files):
            self.verdict.notes.append(f"{what} not here: {counted(len(files), 'hash')} not checked")
            return
        for file, expected in files.items():
            self.compare(prefix + file, expected, witness)


def _contradictions(record: Mapping[str, Any]) -> Iterator[str]:
    software = record["software"]
    hashes = {
        "config_sha256": (record["config_sha256"], json_sha256(record["config"])),
        "source_sha256": (record["source_sha256"], combined_sha256(record["source_files"])),
        "run_code_sha256": (record["run_code_sha256"], combined_sha256(_run_code(record))),
        "workflow_sha256": (record["workflow_sha256"], combined_sha256(record["workflow_files"])),
        "software.sha256": (software["sha256"], json_sha256(software["packages"])),
    }
    for key, (recorded, computed) in hashes.items():
        if recorded != computed:
            yield f"{key} is {recorded[:12]}..., but its content gives {computed[:12]}..."


def _run_code(record: Mapping[str, Any]) -> dict[str, str]:
    """The hashes of the files that decide what a run writes."""
    files = record["source_files"]
    if "run_code_files" in record:
        return {name: files.get(name, "") for name in record["run_code_files"]}
    return {name: sha for name, sha in files.items() if any(f"{name}/".startswith(f"{p}/") for p in FORMER_RUN_CODE)}


def _crate_hashes(path: Path) -> dict[str, str]:
    # Models have one too: of their weights, which are elsewhere.
    graph = read_json_object(path)["@graph"]
    files = [entity for entity in graph if "sha256" in entity and not entity["@id"].startswith("#")]
    if any(type(entity["sha256"]) is not str for entity in files):
        raise UserError("a hash in it is no text")
    return {unquote(entity["@id"]): entity["sha256"] for entity in files}


# The lists of hashes: each vouches for those after it.
READERS: dict[str, Callable[[Path], Any]] = {
    ARCHIVE_SUMS: read_sums,
    CRATE: _crate_hashes,
    SEAL: read_sums,
    MANIFEST: read_manifest,
}


def _shown(name: str) -> str:
    """A name that can be printed, whatever is in it."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").replace("\n", "\\n")
