"""Finding the record and the files that it names: in a project, in its results folder, in an archive."""

from __future__ import annotations

import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from specsplit.errors import UserError
from specsplit.io import read_json_object

RESULTS = "results"
RECORD = "results/provenance/provenance.json"
CONFIG = "results/provenance/config.json"
PATCH = "results/provenance/changes.patch"
SEAL = "results/provenance/SHA256SUMS"
MANIFEST = "results/provenance/manifest.json"
ARCHIVE = "results/archive.zip"  # verified by what it holds, as it holds the lists itself
ARCHIVE_SUMS = "SHA256SUMS"
CRATE = "ro-crate-metadata.json"
WORKERS, OF_WORKERS = "results/workers", (".json", ".users", ".lock")
SUMS_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)")


@dataclass(frozen=True)
class Experiment:
    """Where the files of an experiment are.

    root: the project's folder or an unpacked archive. results: its results, wherever they were moved to. shown: what
    the user called it. damaged: files of an archive that could not be unpacked as they are, with the reason. archived:
    it is an archive; packed: the file that it was unpacked from.
    """

    root: Path
    results: Path
    shown: str
    damaged: Mapping[str, str] = field(default_factory=dict)
    archived: bool = False
    packed: Path | None = None

    def at(self, recorded: str) -> Path:
        """Where a recorded path is: relative to the project's folder, or absolute."""
        head, _, rest = recorded.partition("/")
        return self.results / rest if head == RESULTS else self.root / recorded

    @property
    def seal(self) -> str:
        """The list of hashes that a signature is of: it vouches, through other lists, for every file."""
        return ARCHIVE_SUMS if self.archived else SEAL

    @property
    def unlisted(self) -> frozenset[str]:
        """What no list of hashes has: signatures are of the lists, an archive among results has lists of its own."""
        if self.archived:
            return frozenset() if self.packed else frozenset({f"{ARCHIVE_SUMS}.sig"})
        return frozenset({f"{SEAL}.sig", ARCHIVE, *([f"{ARCHIVE}.sig"] if self.at(ARCHIVE).exists() else [])})

    @property
    def signature(self) -> Path:
        """Where the signature of the seal is, if there is one."""
        signed = self.packed or self.at(self.seal)
        return signed.with_name(f"{signed.name}.sig")

    def record(self) -> dict[str, Any]:
        return read_json_object(self.at(RECORD))


@contextmanager
def open_experiment(path: Path) -> Iterator[Experiment]:
    """The experiment at `path`: a results folder, the folder that has it, an archive, or a provenance.json.

    An archive is unpacked into a temporary folder that goes at the end. Raises UserError when there is no record, nor
    anything that vouches for one.
    """
    if path.is_file() and path.suffix == ".zip":
        with TemporaryDirectory(prefix="specsplit-") as scratch:
            folder = Path(scratch).resolve()
            yield Experiment(folder, folder / RESULTS, str(path), _unpack(path, folder), archived=True, packed=path)
    else:
        yield _find(path.resolve().parents[1] if path.name == Path(RECORD).name else path, str(path))


def _find(folder: Path, shown: str) -> Experiment:
    if not folder.is_dir():
        raise UserError(f"{shown}: no such folder, archive or record")
    root = folder.resolve()
    witnesses = (RECORD, SEAL, MANIFEST)
    archived = any((root / name).is_file() for name in (ARCHIVE_SUMS, CRATE))
    if archived or any((root / name).is_file() for name in witnesses):
        with suppress(UserError, OSError):  # the hashes of an archive are of more than results
            archived = archived or any(not name.startswith(f"{RESULTS}/") for name in read_sums(root / SEAL))
        return Experiment(root, root / RESULTS, shown, archived=archived)
    if any((root / Path(name).relative_to(RESULTS)).is_file() for name in witnesses):
        return Experiment(root.parent, root, shown)
    raise UserError(
        f"{shown}: has neither {RECORD} nor {Path(RECORD).relative_to(RESULTS)}. Name a results folder, an unpacked "
        "archive or archive.zip; `snakemake --cores N results/summary.csv` makes the record"
    )


def _unpack(archive: Path, folder: Path) -> dict[str, str]:
    """Unpack; returns {name: reason} of what is damaged or no plain file of the archive."""
    damaged = {}
    seen = set()
    try:
        with zipfile.ZipFile(archive) as packed, archive.open("rb") as file:
            begin, _, end = file.read(4), file.seek(-22, os.SEEK_END), file.read(4)
            if (begin, end) != (b"PK\3\4", b"PK\5\6"):
                damaged[archive.name] = "there are bytes before or after what it holds"
            for member in packed.infolist():
                name, parts = member.filename, PurePosixPath(member.filename).parts
                if not parts or ".." in parts or name.startswith("/"):
                    damaged[name] = "its name leads out of the archive"
                    continue
                if parts in seen:  # whatever they are called: `a/b`, `a/./b`
                    damaged[name] = "it is there more than once"
                seen.add(parts)
                if stat.S_IFMT(member.external_attr >> 16) not in (
                    0,
                    stat.S_IFDIR if member.is_dir() else stat.S_IFREG,
                ):
                    damaged[name] = "is unpacked as something else than a file"
                if member.comment or (member.is_dir() and member.file_size):
                    damaged[name] = "has bytes that are in no file"
                target = folder.joinpath(*parts)
                try:
                    if member.is_dir():
                        target.mkdir(parents=True, exist_ok=True)
                        continue
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(packed.read(member))
                except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, RuntimeError) as error:
                    damaged[name] = str(error)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{archive}: cannot be unpacked: {error}") from None
    return damaged


def list_files(folder: Path, prefix: str) -> tuple[set[str], set[str], dict[str, str]]:
    """What is below a folder: files, empty folders, and symbolic links with where they lead.

    Names begin with `prefix`; empty for an archive. A link is followed, and listed as what it leads to as well; what is
    neither a file nor a folder counts as a file. What workers have in results/workers while they run is left out, but
    for an archive, where none runs.
    """
    running = f"{WORKERS}/" if prefix else "\n"
    files, empty, links = set(), set(), {}
    waiting, seen = [(folder, prefix)], set()
    while waiting:
        here, name = waiting.pop()
        if (real := here.resolve()) in seen:
            continue
        seen.add(real)
        entries = sorted(here.iterdir())
        if not entries and name and not f"{name}/".startswith(running):
            empty.add(name)
        for path in entries:
            own = f"{name}/{path.name}" if name else path.name
            if path.is_symlink():
                links[own] = str(path.readlink())
            if path.is_dir():
                waiting.append((path, own))
            elif not (own.startswith(running) and path.suffix in OF_WORKERS):
                files.add(own)
    return files, empty, links


def write_sums(files: Mapping[str, str]) -> str:
    """The text of a SHA256SUMS file, as `sha256sum` writes it: path -> hash, sorted by path."""
    return "".join(f"{files[name]}  {name}\n" for name in sorted(files))


def read_sums(path: Path) -> dict[str, str]:
    """path -> hash of a SHA256SUMS file. UserError with the line when it is not exactly what write_sums writes."""
    files: dict[str, str] = {}
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 at byte {error.start}") from None
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        found = SUMS_LINE.fullmatch(line)
        if found is None:
            raise UserError(f"line {number} is not a hash, two spaces and a path")
        files[found[2]] = found[1]
    if write_sums(files) != text:
        raise UserError("its lines are not sorted, or one occurs twice, or the last one is cut off")
    return files
