"""results/archive.zip: everything that a reader of the results needs, but for the weights, in one file.

The same results give the same bytes: names are sorted, times are fixed.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import specsplit
from specsplit.errors import UserError, listed, why
from specsplit.io import read_json_object, replacing
from specsplit.provenance.capture import WORKFLOW_FILES, hash_tree
from specsplit.provenance.crate import WORKFLOW, build_crate
from specsplit.provenance.facts import refuse_differences, run_facts
from specsplit.provenance.folder import ARCHIVE_SUMS, CRATE, MANIFEST, RECORD, RESULTS, SEAL, read_sums, write_sums
from specsplit.provenance.record import check_record
from specsplit.provenance.redaction import find_secret
from specsplit.provenance.seal import UNSEALED, await_workers, seal_lists
from specsplit.provenance.steps import read_steps

# Of the project's folder, beside the package.
PROJECT_FILES = (*WORKFLOW_FILES, "config/**/*", "LICENSE", "README.md", "Makefile", "CITATION.cff")
FIXED_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say
BINARY = (".png", ".pdf", ".ico")


def write_archive(output: Path, result_files: Sequence[Path], root: Path) -> int:
    """Write the archive of an experiment; returns how many files are in it.

    result_files: what of the results goes in, below `root`, the project's folder. All logs go in as well but that of
    the archive itself, and of the project what the results were made with. Raises UserError when a file is missing, or
    when one holds a password or token.
    """
    record = read_json_object(root / RECORD)
    check_record(record)
    _refuse_other_code(record, root)
    if not record["config"].get("keep_apart"):
        refuse_differences({run["file"]: run_facts(run) for run in record["runs"]}, "Run again what does not belong")
    await_workers(root / RESULTS)
    others = [*(record["workflow"]["config_files"] or ()), record["dataset"].get("source") or ""]
    collected = _collect(result_files, others, root, output)
    if WORKFLOW not in collected:
        raise UserError(
            f"{root / WORKFLOW}: no such file, and an archive holds the workflow that made its results: run that in "
            "its own folder, without --directory"
        )
    content = {name: _read(path) for name, path in collected.items() if name not in UNSEALED}
    for name, data in content.items():
        _refuse_secrets(name, data)
    _refuse_unsealed(content, root)
    made = [name for name in content if name.startswith((f"{RESULTS}/", "resources/models/"))]
    # Lists of its own, which say that it is an archive: those of the folder know nothing of the code beside it.
    sums = {name: _digest(data) for name, data in content.items()}
    content |= {name: text.encode() for name, text in seal_lists(sums).items()}
    sums |= {name: _digest(content[name]) for name in (SEAL, MANIFEST)}
    files = {name: (sums[name], len(data)) for name, data in content.items()}
    content[CRATE] = build_crate(record, read_steps(sorted(made), root), files)
    sums[CRATE] = _digest(content[CRATE])
    content[ARCHIVE_SUMS] = write_sums(sums).encode()
    _write_zip(output, content)
    return len(content)


def _collect(result_files: Sequence[Path], others: Sequence[str], root: Path, output: Path) -> dict[str, Path]:
    """Name in the archive -> file. others: paths that may be outside the project, or gone; then they are left out."""
    root = root.resolve()
    files = {path.resolve().relative_to(root).as_posix(): path for path in result_files}
    for path in (root / name for name in others):
        if path.is_file() and path.resolve().is_relative_to(root):
            files[path.resolve().relative_to(root).as_posix()] = path
    own_log = f"{RESULTS}/logs/{output.stem}.log"
    for name in hash_tree(root, (*PROJECT_FILES, f"{RESULTS}/logs/**/*.log")):
        if name != own_log:
            files[name] = root / name
    # The code that ran, which an installed copy may have from elsewhere.
    package = Path(specsplit.__file__).parent
    return files | {f"src/{package.name}/{name}": package / name for name in hash_tree(package)}


def _refuse_other_code(record: Mapping[str, Any], root: Path) -> None:
    """The archive must not say that its results were made by code that it does not hold."""
    now = {f"src/specsplit/{name}": digest for name, digest in hash_tree(Path(specsplit.__file__).parent).items()}
    now |= hash_tree(root, WORKFLOW_FILES)
    then = {f"src/specsplit/{name}": digest for name, digest in record["source_files"].items()}
    then |= record["workflow_files"]
    changed = sorted(name for name in {*now, *then} if now.get(name) != then.get(name))
    if changed:
        raise UserError(
            f"changed since the record was made: {listed(changed)}. Make it again: "
            f"snakemake --cores N --forcerun provenance -- {RESULTS}/archive.zip"
        )


def _refuse_unsealed(content: Mapping[str, bytes], root: Path) -> None:
    """The archive must not vouch for results that are no longer what was sealed."""
    if not (root / SEAL).is_file():
        return
    sealed = read_sums(root / SEAL)
    changed = [name for name, data in content.items() if sealed.get(name, _digest(data)) != _digest(data)]
    logs = f"{RESULTS}/logs/"  # which go on with every job
    if changed := sorted(name for name in changed if not name.startswith(logs)):
        raise UserError(f"changed since the results were sealed: {listed(changed)}; make them again with the workflow")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {why(error)}; make it again with the workflow") from None


def _refuse_secrets(name: str, data: bytes) -> None:
    if name.endswith(BINARY):
        return
    text = data.decode("utf-8", errors="replace")
    # Prompts and what models write of themselves may look like anything, and so may the pictures in the report.
    place = find_secret(text, patterns=not name.endswith((".jsonl", ".html")))
    if place is not None:
        line = text.count("\n", 0, place) + 1
        raise UserError(f"{name}, line {line}: looks like a password or token. Take it out; nothing was archived")


def _write_zip(output: Path, content: Mapping[str, bytes]) -> None:
    with replacing(output) as part, zipfile.ZipFile(part, "w") as archive:
        for name in sorted(content, key=lambda name: (name != CRATE, name)):  # the description comes first
            entry = zipfile.ZipInfo(name, FIXED_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system, entry.external_attr = 3, 0o100644 << 16  # Unix, on every system
            archive.writestr(entry, content[name], compresslevel=9)
