"""Files: reading and writing JSON, writing tables, replacing a file as a whole, content hashes; times as text."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from io import StringIO
from pathlib import Path
from tempfile import gettempdir
from typing import IO, TYPE_CHECKING, Any, cast

from specsplit.errors import UserError, why

if TYPE_CHECKING:
    from pandas import DataFrame

_LOCK = ".lock"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` when the block ends without an error.

    So a reader sees the old file or the new one, never a part. Makes the folder when it is missing. Of a link what it
    leads to is replaced. Raises UserError for what cannot be written, and for what is no file, as /dev/null.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: a folder, pipe or device, which no file replaces; name another")
    # In the same folder: a rename is atomic within one file system only.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) and error.filename not in (str(temporary), str(path.parent)):
            raise  # of something else in the block
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def scratch_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A new folder whose name begins with `prefix`, deleted at the end of the block. parent: default the system's.

    What a killed process left there under this prefix is deleted first: a folder that nobody holds the lock of.
    """
    import fcntl  # not on Windows, where the launcher does not run either

    parent = Path(gettempdir()) if parent is None else parent
    for lock in parent.glob(f"{prefix}*{_LOCK}"):
        with suppress(OSError), lock.open("rb") as file:  # another user's, in use, or gone by now
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_name(lock.name.removesuffix(_LOCK)), ignore_errors=True)
            lock.unlink()
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(6)}"
        lock = folder.with_name(folder.name + _LOCK)
        with lock.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not lock.exists():  # taken for a left one before it was locked
                continue
            folder.mkdir(0o700)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                lock.unlink(missing_ok=True)
            return


def replace_file(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Replace the content of a file as a whole (`replacing`). mode: its permissions, less the umask."""
    with replacing(path) as temporary:
        # Created with its mode: a secret is at no moment readable by others.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)


def check_openable(path: Path) -> None:
    """Raise UserError for a path that is no file which can be read to its end: a link to nothing, a folder, a pipe with
    a name, which waits for whoever writes to it, a device; or one that may not be read.

    The pipes of a shell, as /dev/stdin and <(...), have both ends open and pass.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        link = f"a link to {path.readlink()}, which is not there; bring that file as well" if path.is_symlink() else ""
        raise UserError(f"{path}: {link or 'no such file'}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    pipe = stat.S_ISFIFO(mode) and not os.path.realpath(path).startswith("/proc/")
    device = stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and path.name in ("zero", "random", "urandom", "full"))
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: a folder, where a file is wanted")
    if pipe or device or stat.S_ISSOCK(mode):
        raise UserError(f"{path}: a pipe, device or socket, where a file is wanted")
    if not os.access(path, os.R_OK, effective_ids=True):
        raise UserError(f"{path}: no permission to read it; change that (chmod), or name another")


def children(folder: Path) -> list[Path]:
    """What is in a folder. Raises UserError when it may not be listed."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be read: {error.strerror or error}") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError that names the file, and the line when it is malformed."""
    check_openable(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {why(error)}") from None
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        if text.startswith("\ufeff"):
            raise UserError(f"{path}: begins with a byte order mark; save it as UTF-8 without one") from None
        refuse_stand_in(path)
        at = f"{path}, line {error.lineno}, column {error.colno}"
        raise UserError(f"{at}: not valid JSON: {error.msg}{json_mend(text, error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def json_mend(text: str, error: json.JSONDecodeError) -> str:
    """What people write that JSON does not have, at the place of the error; empty where it is something else."""
    rest, before = text[error.pos :], text[: error.pos].rstrip()
    if rest.startswith(("//", "#", "/*")):
        return "; a comment, which JSON does not have: remove it"
    if rest.startswith("}") and before.endswith(","):
        return "; a comma before the end of the object: remove it"
    if rest.startswith(("\u201c", "\u201d", "\u2018", "\u2019")):
        return "; typographic quotes: JSON has straight ones"
    if error.msg.startswith("Invalid control character"):
        return "; write a tab as \\t, and the end of a line as \\n"
    if rest.startswith("'"):
        return "; single quotes: JSON has double ones"
    if error.msg.startswith("Expecting property name") and (before.endswith(("{", ","))):
        return "; a key without quotes, as JavaScript and JSON5 have them: write it in double quotes"
    if rest.startswith(("True", "False", "None")):
        return "; a Python word: JSON has true, false and null"
    return ""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a key with two values, of which Python would take the last."""
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data and data[key] != value:
            raise ValueError(f"the key {key!r} stands twice with different values; keep one of them")
        data[key] = value
    return data


def _refuse(constant: str) -> None:
    raise ValueError(f"JSON has no {constant}")  # Python would read NaN and Infinity


def refuse_stand_in(path: Path) -> None:
    """Raise UserError for a file that holds something else than it should: a Git LFS pointer, a web page."""
    with path.open("rb") as file:
        start = file.read(256).lstrip().lower()
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        raise UserError(f"{path}: a Git LFS pointer, not the file itself; fetch it with: git lfs pull")
    if start.startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{path}: an HTML page (a login, an error, a preview), not the file itself; fetch the raw file")


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


class RowEnds:
    """A text file for csv.writer: it ends rows with a line feed, and puts cells with a carriage return in quotes.

    Python quotes the characters of the line terminator alone, and its reader takes every carriage return for an end of
    row. So the writer (with CSV_ROW_END) is told CR LF, and the CR is left out here.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, row: str) -> int:
        return self._file.write(row.removesuffix(CSV_ROW_END) + "\n")


CSV_ROW_END = "\r\n"


def csv_reader(file: Iterable[str]) -> Any:
    """A strict csv.reader without a limit on the length of a cell, for files opened with newline=""."""
    csv.field_size_limit(sys.maxsize)
    return csv.reader(file, strict=True)


def refuse_overwriting(outputs: Mapping[str, Path], inputs: Mapping[str, Path]) -> None:
    """Raise UserError when a file that is to be written is one that is read, or another that is written.

    outputs, inputs: by the flag that names them.
    """
    seen = dict(inputs)
    for name, path in outputs.items():
        for other, taken in seen.items():
            same = path.resolve() == taken.resolve()
            if not same and path.exists() and taken.exists():
                same = path.samefile(taken)  # a hard link
            if same and other in inputs:
                raise UserError(f"{name} {path} is the source itself ({other} {taken}): write to another file")
            if same:
                raise UserError(f"{name} and {other} are one file, {path}: write to two files")
        seen[name] = path


def write_csv(frame: DataFrame, path: Path) -> None:
    """Write a table; a reader sees the old file or the new one. Makes the folder when it is missing.

    Floats have 10 significant digits: finer than any clock here, coarser than the last bits of a sum, which
    differ between machines. Missing values are empty cells.
    """
    text = StringIO()
    frame.to_csv(cast(Any, RowEnds(text)), index=False, float_format="%.10g", lineterminator=CSV_ROW_END)
    replace_file(path, text.getvalue())


def utc_text(time: datetime, digits: str = "milliseconds") -> str:
    """A time in UTC as ISO 8601: 2025-01-31T12:00:00.123Z. digits: as `datetime.isoformat` calls them."""
    return time.isoformat(timespec=digits).replace("+00:00", "Z")


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
