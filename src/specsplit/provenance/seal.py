"""The two lists that seal results: SHA256SUMS, which `sha256sum --check` reads, and manifest.json.

Each holds the hash of every file, and SHA256SUMS that of manifest.json as well: a file that is edited together with its
line in one list is still contradicted by the other.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from specsplit.errors import UserError, listed, why
from specsplit.io import json_sha256, read_json_object, replace_file, sha256_file
from specsplit.provenance.folder import (
    ARCHIVE,
    ARCHIVE_SUMS,
    CRATE,
    MANIFEST,
    RESULTS,
    SEAL,
    list_files,
    read_sums,
    write_sums,
)
from specsplit.provenance.steps import read_made, read_outputs, workflow_started

SIGNATURES = (f"{SEAL}.sig", f"{ARCHIVE}.sig", f"{ARCHIVE_SUMS}.sig")
# What no list of this module has. MANIFEST is in SEAL, and all of them are in the SHA256SUMS of an archive.
UNSEALED = (SEAL, MANIFEST, ARCHIVE, ARCHIVE_SUMS, CRATE, *SIGNATURES)
WORKER_END_S = 10.0
# What jobs leave beside the outputs that their rules name.
UNLOGGED = (f"{RESULTS}/logs/workers/", f"{RESULTS}/distill/")


def seal_results(results: Path, required: Iterable[Path] = (), *, add: bool = False) -> int:
    """Write SHA256SUMS and manifest.json over all files that are in a results folder now; returns how many.

    required: files that must be there. add: there is a seal already, and only what jobs of the workflow made since is
    sealed anew; other files keep the hash that they had, and those that nobody made stay out. Raises UserError when one
    is missing, or cannot be in such a list, and in the workflow when one is not as the job that made it left it.
    """
    missing = [str(path) for path in required if not path.is_file()]
    if missing:
        raise UserError(f"{', '.join(missing)}: no such file; make it again with the workflow")
    await_workers(results)
    names, empty, links = list_files(results, RESULTS)
    sums = {}
    for name in sorted(names - set(UNSEALED)):
        path = results / Path(name).relative_to(RESULTS)
        try:
            name.encode()
            if "\n" in name or not path.is_file():
                raise ValueError
            sums[name] = sha256_file(path)
        except ValueError:
            raise UserError(f"{path!s:.200}: is no plain file with a plain name; take it out of the results") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {why(error)}") from None
    kept = _kept(results) if add else None
    if kept is None and workflow_started() is not None:
        _refuse_edited(sums, results.parent)
    if kept is not None:
        since = (results / Path(SEAL).relative_to(RESULTS)).stat().st_mtime
        since = min(since, workflow_started() or since)  # jobs of this run may have been at work while it was sealed
        sums = _added(kept["files"], sums, results.parent, since)
        empty, links = kept["folders"], kept["links"]
    for name, text in seal_lists(sums, empty, links).items():
        replace_file(results / Path(name).relative_to(RESULTS), text)
    return len(sums)


def _refuse_edited(now: Mapping[str, str], root: Path) -> None:
    """A seal of the workflow vouches for what its jobs made: raise UserError when a file is not as its job left it."""
    made = read_made(root)
    edited = [
        f"{name} (rule {made[name][0]})" for name, digest in now.items() if made.get(name, ("", digest))[1] != digest
    ]
    if edited:
        raise UserError(
            f"not sealed: changed since the workflow made them: {listed(edited)}. Put back what was there, or delete "
            "these files, and the workflow makes them again"
        )


def _kept(results: Path) -> dict[str, Any] | None:
    """What manifest.json says, where it and SHA256SUMS can be read; else there is nothing to add to."""
    try:
        read_sums(results / Path(SEAL).relative_to(RESULTS))
        return read_manifest(results / Path(MANIFEST).relative_to(RESULTS))
    except (UserError, OSError):
        return None


def _added(sealed: Mapping[str, str], now: Mapping[str, str], root: Path, since: float) -> dict[str, str]:
    """The hashes to seal: those of before, but for files that jobs made after the time `since`, and of files that jobs
    made and that are not sealed yet."""
    ever, later = read_outputs(root), read_outputs(root, since)

    def made(name: str, outputs: set[str]) -> bool:
        return name.startswith(UNLOGGED) or any(f"{name}/".startswith(f"{place}/") for place in outputs)

    kept = {name: digest for name, digest in sealed.items() if name in now or not made(name, later)}
    changed = {name for name, digest in now.items() if sealed.get(name) != digest}
    return kept | {name: now[name] for name in changed if made(name, later if name in sealed else ever)}


def seal_lists(
    sums: Mapping[str, str], folders: Iterable[str] = (), links: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The two lists over files (name -> sha256): {MANIFEST: text, SEAL: text}. folders: empty ones."""
    content = {
        "files": dict(sorted(sums.items())),
        "folders": sorted(folders),
        "links": dict(sorted((links or {}).items())),
    }
    manifest = _manifest_text(content)
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    return {MANIFEST: manifest, SEAL: write_sums({**sums, MANIFEST: digest})}


def read_manifest(path: Path) -> dict[str, Any]:
    """{files, folders, links} of a manifest.json. UserError when it is not exactly what `seal_lists` writes."""
    content = read_json_object(path)
    digest = content.pop("sha256", None)
    try:
        whole = digest == json_sha256(content) and path.read_bytes() == _manifest_text(content).encode()
        files, folders, links = content["files"], content["folders"], content["links"]
        texts = {*files, *files.values(), *folders, *links, *links.values()}
        if not whole or len(content) > 3 or not all(isinstance(text, str) for text in texts):
            raise ValueError
    except (ValueError, OSError, KeyError, TypeError, AttributeError):
        raise UserError("its content is not that of its own hash") from None
    return content


def await_workers(results: Path) -> None:
    """Workers that are stopping still write to their logs: wait until they are gone, for a while."""
    deadline = time.monotonic() + WORKER_END_S
    while any((results / "workers").rglob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.2)


def _manifest_text(content: Mapping[str, Any]) -> str:
    return json.dumps({**content, "sha256": json_sha256(content)}, indent=1, ensure_ascii=False) + "\n"
