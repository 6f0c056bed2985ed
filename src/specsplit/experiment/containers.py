"""What is around the rows: compression, Parquet and Arrow, folders, and files that hold no rows at all."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from specsplit.errors import UserError, listed, told
from specsplit.io import check_openable, children, combined_sha256, sha256_file

MOST_UNPACKED_BYTES, PART_BYTES, READ_BYTES = 4 << 30, 1 << 24, 1 << 18
MOST_LAYERS = 3  # of compression
SAVED_DATASET = ("state.json", "dataset_dict.json")
# First bytes of what people have in their folders of data, and no prompt file is.
BINARIES = (
    (b"PK\x03\x04", "a ZIP archive (or a spreadsheet, .xlsx); unpack it, or save the sheet as CSV"),
    (b"PK\x05\x06", "an empty ZIP archive"),
    (b"LZIP", "an lzip file; unpack it"),
    (b"\x1f\x9d", "a .Z file (compress); unpack it"),
    (b"\x89HDF", "an HDF5 file"),
    (b"Rar!", "a RAR archive; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it"),
    (b"\x04\x22\x4d\x18", "an LZ4 file; unpack it"),
    (b"%PDF", "a PDF document"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"GGUF", "the weights of a model (GGUF)"),
    (b"\x7fELF", "a program"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\xd0\xcf\x11\xe0", "a Microsoft Office document"),
    (b"FEA1", "a Feather file of version 1; write it again as Arrow"),
    (b"PARE", "an encrypted Parquet file"),
    (b"\x1e{", "JSON with record separators (RFC 7464); take them out: tr -d '\\036'"),
    (b"{\\rtf", "a document in Rich Text Format; save it as plain text"),
    (b"Obj\x01", "an Avro file"),
    (b"ORC", "an ORC file"),
    ((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), "a Python pickle, which can run code and is not read"),
)


def read_source(path: Path) -> tuple[bytes | None, str]:
    """The bytes of a prompt file and their sha256; of a folder that `datasets` saved None and that of its files.

    Raises UserError for what is neither.
    """
    try:
        if path.is_dir():
            return None, _folder_sha256(path)
        if path.exists():
            check_openable(path)
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror or error}; set dataset.path (--prompts) to a file of prompts"
        ) from None
    return content, hashlib.sha256(content).hexdigest()


def _folder_sha256(path: Path) -> str:
    if any((path / name).is_file() for name in SAVED_DATASET):
        files = {file.relative_to(path).as_posix(): sha256_file(file) for file in path.rglob("*") if file.is_file()}
        return combined_sha256(files)
    names = [child.name for child in children(path) if child.is_file()]
    holds = f"; it holds {listed(names)}" if names else "; it is empty"
    raise UserError(f"{path}: a folder, not a file of prompts{holds}. Name the file in it")


def read_container(path: Path, content: bytes) -> tuple[str, bytes]:
    """What the file holds when unpacked: ("Parquet" | "Arrow" | "text", its bytes)."""
    for layer in range(MOST_LAYERS + 1):
        for magic, name, unpack in _COMPRESSIONS:
            if content.startswith(magic):
                if layer == MOST_LAYERS:
                    raise UserError(f"{path}: compressed more than {MOST_LAYERS} times; unpack it")
                content = _unpack(path, content, name, unpack)
                break
        else:
            break
    if content[257:262] == b"ustar":
        raise UserError(f"{path}: a tar archive, not a table of prompts; unpack it and name the file in it")
    if content.startswith(b"PAR1"):
        return "Parquet", content
    if content.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "Arrow", content
    return "text", content


def _unpack(path: Path, content: bytes, name: str, open_: Callable[[io.BytesIO], Any]) -> bytes:
    unpacked = bytearray()
    try:
        with open_(io.BytesIO(content)) as file:
            while len(unpacked) <= MOST_UNPACKED_BYTES and (part := file.read(PART_BYTES)):
                unpacked += part
    except EOFError:
        raise UserError(f"{path}: a {name} file that is cut off (truncated); fetch it again") from None
    except (OSError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise UserError(f"{path}: a damaged {name} file ({error}); fetch it again") from None
    if len(unpacked) > MOST_UNPACKED_BYTES:
        raise UserError(f"{path}: unpacks to over {MOST_UNPACKED_BYTES >> 30} GiB; give the part with the prompts")
    return bytes(unpacked)


def needed(module: str, what: str) -> Any:
    """An optional package. Raises UserError that says how to install it."""
    try:
        return import_module(module)
    except ImportError:
        raise UserError(f"{what} need the package {module}: pip install 'specsplit[data]'") from None


def _open_zstandard(file: io.BytesIO) -> Any:
    return needed("pyarrow", ".zst files").CompressedInputStream(file, "zstd")


class _Streams(io.RawIOBase):
    """Streams one after another, with zeros between them. The readers of the standard library take what follows the
    first of bzip2 or xz for rubbish when it is not the next at once, and leave it out in silence."""

    def __init__(self, new: Callable[[], Any], file: io.BytesIO) -> None:
        self._new, self._file, self._stream = new, file, new()

    def read(self, size: int = -1) -> bytes:
        part = b""
        while not part:
            if self._stream.eof:
                rest = self._stream.unused_data.lstrip(b"\0")
                while not rest:
                    if not (more := self._file.read(READ_BYTES)):
                        return b""
                    rest = more.lstrip(b"\0")
                self._file.seek(-len(rest), io.SEEK_CUR)
                self._stream = self._new()
            given = self._file.read(READ_BYTES) if self._stream.needs_input else b""
            if not given and self._stream.needs_input:
                raise EOFError
            part = self._stream.decompress(given, size)
        return part


def _open_bzip2(file: io.BytesIO) -> Any:
    return _Streams(bz2.BZ2Decompressor, file)


def _open_xz(file: io.BytesIO) -> Any:
    return _Streams(lzma.LZMADecompressor, file)


_COMPRESSIONS: tuple[tuple[bytes | tuple[bytes, ...], str, Callable[[io.BytesIO], Any]], ...] = (
    (b"\x1f\x8b", "gzip", lambda file: gzip.GzipFile(fileobj=file)),
    (b"\x28\xb5\x2f\xfd", "Zstandard", _open_zstandard),
    (tuple(bytes([kind, 0x2A, 0x4D, 0x18]) for kind in range(0x50, 0x60)), "Zstandard", _open_zstandard),  # skippable
    (b"BZh", "bzip2", _open_bzip2),
    (b"\xfd7zXZ\x00", "xz", _open_xz),
    (b"\x5d\x00\x00", "lzma", _open_xz),
)


def recognise_binary(content: bytes) -> str | None:
    """What a file is that is not text, in words."""
    for magic, what in BINARIES:
        if content.startswith(magic):
            return what
    head = content[: 1 << 16]
    control = sum(head.count(byte) for byte in (*range(9), *range(14, 27), *range(28, 32)))
    if control > max(1, len(head) // 20):
        return "a binary file"
    return None


def arrow_rows(path: Path, kind: str, content: bytes) -> list[dict[str, Any]]:
    """The rows of a Parquet or Arrow file."""
    pyarrow = needed("pyarrow", f"{kind} files")
    if kind == "Parquet" and (len(content) < 12 or not content.endswith((b"PAR1", b"PARE"))):
        raise UserError(f"{path}: a Parquet file that is cut off (truncated); fetch it again")
    try:
        if kind == "Parquet":
            opened = import_module("pyarrow.parquet").ParquetFile(pyarrow.BufferReader(content))
            names, batches = opened.schema_arrow.names, opened.iter_batches()
        elif content.startswith(b"ARROW1"):
            opened = pyarrow.ipc.open_file(pyarrow.BufferReader(content))
            names, batches = opened.schema.names, map(opened.get_batch, range(opened.num_record_batches))
        else:
            batches = pyarrow.ipc.open_stream(pyarrow.BufferReader(content))
            names = batches.schema.names
        refuse_repeated(path, names)
        return [row for batch in batches for row in _rows_of(path, batch)]
    except UserError:
        raise
    except Exception as error:  # pyarrow has many kinds, OSError and its own, for bytes that are not what they seem
        said = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(
            f"{path}: a{'n' * (kind == 'Arrow')} {kind} file that is damaged or cut off (truncated): {said}; fetch it "
            "again"
        ) from None


def _rows_of(path: Path, batch: Any) -> list[dict[str, Any]]:
    columns = {}
    for name in batch.schema.names:
        try:
            columns[name] = batch.column(name).to_pylist(maps_as_pydicts="strict")
        except (ValueError, OverflowError, LookupError) as error:  # a date that Python does not have, a strange zone
            kind = batch.schema.field(name).type
            raise UserError(
                f"{path}: the column {name!r} ({kind}) holds what Python has no value for ({error}); write the file "
                "again without it, or with it as text"
            ) from None
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def refuse_repeated(path: Path | str, names: Sequence[str]) -> None:
    """Raise UserError for a column that stands twice: a row would keep the last one in silence."""
    if repeated := next((name for name in names if name and names.count(name) > 1), None):
        raise UserError(f"{path}: the column {repeated!r} stands twice; rename one of them")


def folder_rows(path: Path) -> Iterable[dict[str, Any]]:
    """The rows of a folder that `Dataset.save_to_disk` wrote."""
    datasets = needed("datasets", "folders of saved datasets")
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets and pyarrow raise any class of error for unusual files
        raise UserError(
            f"{path}: a saved dataset that cannot be loaded: {told(error)}; save or fetch it again"
        ) from None
    if not hasattr(loaded, "features") or isinstance(loaded, dict):
        splits, first = ", ".join(loaded), path / next(iter(loaded))
        raise UserError(f"{path}: a saved dataset with the splits {splits}; name one of them: {first}")
    return loaded
