"""Prompt files of every format, for tests."""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard

Rows = Sequence[Mapping[str, Any]]
DOCS = Path(__file__).parents[1] / "docs" / "prompts.md"


def json_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(rows: Rows) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


def arrow(rows: Rows, new: Callable[..., Any] = pyarrow.ipc.new_file) -> bytes:
    table = pyarrow.Table.from_pylist(list(rows))
    sink = pyarrow.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


# format -> rows as bytes
FORMATS: dict[str, Callable[[Rows], bytes]] = {
    "JSON lines": json_lines,
    "JSON lines of Windows": lambda rows: json_lines(rows).replace(b"\n", b"\r\n"),
    "JSON array": lambda rows: json.dumps(rows).encode(),
    "JSON array, indented": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False).encode(),
    "JSON array, an object a line": lambda rows: ("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n").encode(),
    "JSON objects, indented": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows).encode(),
    "JSON document": lambda rows: json.dumps({"version": 1, "data": rows}, indent=1).encode(),
    "UTF-8 with mark": lambda rows: b"\xef\xbb\xbf" + json_lines(rows),
    "UTF-16": lambda rows: json_lines(rows).decode().encode("utf-16"),
    "UTF-16, big end first": lambda rows: b"\xfe\xff" + json_lines(rows).decode().encode("utf-16-be"),
    "UTF-16 without mark": lambda rows: json_lines(rows).decode().encode("utf-16-le"),
    "UTF-32": lambda rows: json_lines(rows).decode().encode("utf-32"),
    "Parquet": parquet,
    "Arrow": arrow,
    "Arrow stream": lambda rows: arrow(rows, pyarrow.ipc.new_stream),
    "gzip": lambda rows: gzip.compress(json_lines(rows)),
    "Zstandard": lambda rows: zstandard.compress(json_lines(rows)),
    "bzip2": lambda rows: bz2.compress(json_lines(rows)),
    "xz": lambda rows: lzma.compress(json_lines(rows)),
    "Parquet in gzip": lambda rows: gzip.compress(parquet(rows)),
    "Arrow in Zstandard": lambda rows: zstandard.compress(arrow(rows)),
}


def documented_shapes() -> list[tuple[str, str, str, list[str]]]:
    """Of every row of the table of shapes: its name, the sample as a file, the mapping, and `id: prompt` as it says."""
    table = DOCS.read_text(encoding="utf-8").partition("<!-- shapes: begin -->")[2].partition("<!-- shapes: end -->")[0]
    shapes = []
    for line in table.strip().splitlines()[2:]:
        name, sample, columns, gives = (cell.strip() for cell in line.strip("|").split("|"))
        lines = [part.strip("`").replace("\\t", "\t") for part in sample.split("<br>")]
        shapes.append((name, "\n".join(lines) + "\n", columns.strip("`"), gives.replace("\\n", "\n").split("<br>")))
    return shapes
