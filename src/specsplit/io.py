"""Files: reading and writing JSON, writing tables, replacing a file as a whole, content hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specsplit.errors import UserError

if TYPE_CHECKING:
    from pandas import DataFrame


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` when the block ends without an error.

    So a reader sees the old file or the new one, never a part. Makes the folder when it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder: a rename is atomic within one file system only.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Replace the content of a file as a whole (`replacing`). mode: its permissions, less the umask."""
    with replacing(path) as temporary:
        # Created with its mode: a secret is at no moment readable by others.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError that names the file, and the line when it is malformed."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        return json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"JSON has no {constant}")  # Python would read NaN and Infinity


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that must hold an object. Raises UserError that names the file."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {json.dumps(content)[:40]}; wanted a JSON object")
    return content


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` with two spaces of indent, keys in their order; a reader sees the old file or the new one.

    Makes the folder when it is missing. Raises ValueError for NaN and infinities, which JSON does not have.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    replace_file(path, text)


def write_csv(frame: DataFrame, path: Path) -> None:
    """Write a table; a reader sees the old file or the new one. Makes the folder when it is missing.

    Floats have 10 significant digits: finer than any clock here, coarser than the last bits of a sum, which
    differ between machines. Missing values are empty cells.
    """
    text = frame.to_csv(index=False, float_format="%.10g", lineterminator="\n")
    replace_file(path, text)


def json_sha256(obj: Any) -> str:
    """SHA-256 of the canonical JSON of `obj` (sorted keys, no spaces, UTF-8) as 64 hexadecimal digits."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def combined_sha256(files: Mapping[str, str]) -> str:
    """One hash for several files (name -> sha256): what `LC_ALL=C sha256sum FILE... | sha256sum` prints."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
