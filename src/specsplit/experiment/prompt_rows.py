"""The rows of a prompt file of any format, recognised by its content and not by its name.

JSON lines, JSON documents, CSV and TSV, Parquet, Arrow; compressed or not; in UTF-8 or UTF-16. What is no table is
named as what it is, with the way to mend it.
"""

from __future__ import annotations

import codecs
import csv
import io
import math
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from specsplit.errors import UserError, counted, shortened
from specsplit.experiment.containers import arrow_rows, folder_rows, read_container, recognise_binary, refuse_repeated
from specsplit.experiment.prompt_json import JSON_SPACE, parse_cell, parse_line, read_array, read_lines, whole_object
from specsplit.experiment.prompt_table import Row, Table, encoding_problem

ONE_COLUMN = "\x1f"  # the separator of a table that has none: its cells may hold commas
# UTF-32 first: its mark begins as that of UTF-16 does.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PAGES = (("<!doctype html", "an HTML page"), ("<html", "an HTML page"), ("<?xml", "an XML document"))
# How other kinds of text begin.
_OTHERS = (
    (re.compile(r"\[{1,2}[A-Za-z_][\w.-]*\]{1,2}\s*\n"), "a TOML or INI file"),
    (re.compile(r"---\s*\n|- [A-Za-z_]\w*:\s"), "a YAML file"),
    (re.compile(r"\|.*\|\s*\n\|[|\s:-]+\|"), "a Markdown table"),
)


_QUOTED = re.compile(r'"[^"]*"')


def read_rows(path: Path, content: bytes | None, wanted: Sequence[str]) -> Table:
    """The rows of a file, or of a folder that `datasets` saved (content None).

    wanted: names of columns that hold prompts, by which a CSV table is told from plain text.
    Raises UserError that names the file, what it is and how to mend it, when it holds no rows at all.
    """
    if content is None:
        return _numbered("a saved dataset", folder_rows(path))
    kind, content = read_container(path, content)
    if kind in ("Parquet", "Arrow"):
        return _numbered(kind, arrow_rows(path, kind, content))
    return _read_text(path, content, wanted)


def _numbered(name: str, rows: Iterable[dict[str, Any]]) -> Table:
    return Table(name, "row", [_checked(Row(number, data)) for number, data in enumerate(rows, start=1)])


def _checked(row: Row) -> Row:
    assert row.data is not None
    return Row(row.line, _plain(row.data))


def _plain(value: Any) -> Any:
    """As JSON has it. A NaN of Parquet or pandas is a missing value. Texts in a column of bytes, as Spark writes them,
    are texts, and so are values of types that JSON lacks, as UUIDs and times."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, float) and math.isnan(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


# ---- text


def _read_text(path: Path, content: bytes, wanted: Sequence[str]) -> Table:
    text = _decode(path, content)
    start = text.lstrip()
    if not start:
        raise UserError(f"{path}: empty, no line with a prompt; write it again, or name another file")
    if start.startswith("version https://git-lfs.github.com/spec/"):
        raise UserError(f"{path}: a Git LFS pointer, not the file itself; fetch it with: git lfs pull")
    if start.startswith("/annex/objects/"):
        raise UserError(f"{path}: a git-annex pointer, not the file itself; fetch it with: git annex get {path.name}")
    for mark, what in _PAGES:
        if start[: len(mark)].lower() == mark:
            raise UserError(
                f"{path}: {what}, not a table of prompts; a page was saved in place of the file behind it (a login, an "
                "error, or a preview). Download the raw file"
            )
    for begins, what in _OTHERS:
        if begins.match(start):
            raise UserError(f"{path}, line 1: {what}, not a table of prompts; give JSON lines, CSV, Parquet or Arrow")
    if start[0] == "[":
        return read_array(path, text)
    if start[0] == "{":
        text = text.replace("\r\n", "\n").replace("\r", "\n")  # of old Macs, too; no JSON string holds one as it is
    lines = text.split("\n")
    if start[0] == "{" and (whole := whole_object(path, text)) is not None:
        return whole
    objects = [line for line in lines if line.lstrip(JSON_SPACE).startswith("{")]
    if objects and (start[0] == "{" or any(parse_line(line).data is not None for line in objects)):
        return read_lines(path, text, lines)
    return _read_csv(path, text, wanted)


def _decode(path: Path, content: bytes) -> str:
    """The text of a file. A byte that is not UTF-8 becomes half of a surrogate pair, which its row then names."""
    name = next((name for mark, name in _MARKS if content.startswith(mark)), None) or _without_mark(content)
    if name == "utf-8":
        content = content.removeprefix(codecs.BOM_UTF8)
        if what := recognise_binary(content):
            raise UserError(f"{path}: no table of prompts (JSON lines, CSV, Parquet, Arrow) but {what}")
        return content.decode("utf-8", errors="surrogateescape")
    try:
        return content.decode(name)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: looks like {name.upper()}, but byte {error.start + 1} does not fit ({error.reason}): damaged or "
            "cut off; fetch it again, or save it as UTF-8"
        ) from None


def _without_mark(content: bytes) -> str:
    """UTF-16 of mostly Latin letters has a zero in every second byte, UTF-32 in three of four."""
    head = content[: 1 << 12]
    zeros = [head[place::4].count(0) / max(1, len(head) / 4) for place in range(4)]
    names = {"0111": "utf-32-le", "1110": "utf-32-be", "0101": "utf-16-le", "1010": "utf-16-be"}  # of zeros, by place
    name = names.get("".join("1" if share > 0.4 else "-" if share else "0" for share in zeros), "utf-8")
    if "32" in name:  # of which few bytes by chance are any
        with suppress(UnicodeDecodeError):
            content.decode(name)
            return name
        return "utf-8"
    return name if len(content) % 2 == 0 else "utf-8"


# ---- CSV


def _read_csv(path: Path, text: str, wanted: Sequence[str]) -> Table:
    if problem := encoding_problem(text, "of the file"):
        raise UserError(f"{path}: {problem}")
    first = next(line for line in text.split("\n") if line.strip())
    if re.fullmatch(r"sep=.\s*", first):  # of Excel
        delimiter, text = first[4], text.replace(first, "", 1)
    else:  # whatever stands in quotes is of a name
        unquoted = _QUOTED.sub("", text[: 1 << 16].lstrip()).partition("\n")[0]
        delimiter = max(f"{ONE_COLUMN},\t;|", key=unquoted.count)
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(row for row in reader if row)]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV: {error}; and not JSON") from None
    known = {name.lower() for name in wanted}
    has_prompt = any(name.lower() in known for name in header)
    if not has_prompt and len(header) == 1 and re.fullmatch(r"[A-Za-z_]\w*", header[0]) and "\n" in text.strip():
        raise UserError(
            f"{path}, line 1: plain text, or a CSV table with the one column {header[0]!r}. If that holds the prompts, "
            f"name it: dataset.columns: {{prompt: {header[0]}}} (--columns prompt={header[0]})"
        )
    if not has_prompt and (len(header) < 2 or not _is_regular(text, delimiter, len(header))):
        raise UserError(
            f"{path}, line 1: plain text, not a table: {shortened(first)!r}. Give each prompt a line of JSON, as "
            '{"prompt": "..."}, or a CSV file whose first line has the column prompt'
        )
    refuse_repeated(f"{path}, line 1", header)
    if not has_prompt:
        raise UserError(
            f"{path}, line 1: a CSV table with the columns {', '.join(map(repr, header))}: none holds prompts. Name "
            f"it: dataset.columns: {{prompt: {header[-1]}}} (--columns prompt={header[-1]}). If that line is no "
            "header, add one"
        )
    rows, start = [], reader.line_num + 1
    try:
        for cells in reader:
            if any(cells):
                rows.append(_csv_row(header, cells, start))
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, line {start}: not CSV: {error}; a quote that is opened there is not closed, one within a text "
            'is not doubled (""), or the file is cut off (truncated)'
        ) from None
    return Table("TSV" if delimiter == "\t" else "CSV", "line", rows)


def _csv_row(header: Sequence[str], cells: Sequence[str], line: int) -> Row:
    if len(cells) != len(header):
        why = f"{counted(len(cells), 'cell')}, the header has {len(header)}; put texts with the separator in quotes"
        return Row(line, None, why)
    data: dict[str, Any] = {name: cell if cell else None for name, cell in zip(header, cells, strict=True)}
    for name, cell in data.items():
        # Conversations stand in a cell as JSON.
        if cell and cell.lstrip()[:1] in ("[", "{") and name.lower() not in ("prompt", "question", "text"):
            data[name] = parse_cell(cell)
    return Row(line, data)


def _is_regular(text: str, delimiter: str, width: int) -> bool:
    """Whether every row has as many cells as the header, and there are some."""
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if any(row)]
    except csv.Error:
        return False
    return len(rows) > 1 and all(len(row) == width for row in rows)
