"""Finding the record and the files that it names: in a project, in its results folder, in an archive."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
ARCHIVE_SUMS = "SHA256SUMS"
CRATE = "ro-crate-metadata.json"
SUMS_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)")


@dataclass(frozen=True)
class Experiment:
    """Where the files of an experiment are.

    root: the project's folder or an unpacked archive. results: its results, wherever they were moved to. shown: what
    the user called it. damaged: files of an archive that could not be unpacked, with the reason.
    """

    root: Path
    results: Path
    shown: str
    damaged: Mapping[str, str] = field(default_factory=dict)

    def at(self, recorded: str) -> Path:
        """Where a recorded path is: relative to the project's folder, or absolute."""
        head, _, rest = recorded.partition("/")
        return self.results / rest if head == RESULTS else self.root / recorded

    @property
    def archived(self) -> bool:
        return (self.root / ARCHIVE_SUMS).is_file()

    def record(self) -> dict[str, Any]:
        return read_json_object(self.at(RECORD))


@contextmanager
def open_experiment(path: Path) -> Iterator[Experiment]:
    """The experiment at `path`: a results folder, the folder that has it, an archive, or a provenance.json.

    An archive is unpacked into a temporary folder that goes at the end. Raises UserError when there is no record.
    """
    if path.is_file() and path.suffix == ".zip":
        with TemporaryDirectory(prefix="specsplit-") as scratch:
            damaged = _unpack(path, Path(scratch))
            yield _find(Path(scratch), str(path), damaged)
    else:
        yield _find(path.resolve().parents[1] if path.name == Path(RECORD).name else path, str(path), {})


def _find(folder: Path, shown: str, damaged: Mapping[str, str]) -> Experiment:
    if not folder.is_dir():
        raise UserError(f"{shown}: no such folder, archive or record")
    inside = Path(RECORD).relative_to(RESULTS)
    if (folder / RECORD).is_file() or (folder / ARCHIVE_SUMS).is_file():
        return Experiment(folder.resolve(), folder.resolve() / RESULTS, shown, damaged)
    if (folder / inside).is_file():
        return Experiment(folder.resolve().parent, folder.resolve(), shown, damaged)
    raise UserError(
        f"{shown}: has neither {RECORD} nor {inside}. Name a results folder, an unpacked archive or archive.zip; "
        f"`snakemake --cores N results/summary.csv` makes the record"
    )


def _unpack(archive: Path, folder: Path) -> dict[str, str]:
    """Unpack; returns {name: reason} of what is damaged."""
    damaged = {}
    try:
        with zipfile.ZipFile(archive) as packed:
            for member in packed.infolist():
                parts = PurePosixPath(member.filename).parts
                if member.is_dir() or ".." in parts or member.filename.startswith("/"):
                    continue
                target = folder.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    target.write_bytes(packed.read(member))
                except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
                    damaged[member.filename] = str(error)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{archive}: cannot be unpacked: {error}") from None
    return damaged


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
