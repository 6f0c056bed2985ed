"""The rows of a prompt file of any format, recognised by its content and not by its name.

JSON lines, JSON documents, CSV and TSV, Parquet, Arrow; compressed or not; in UTF-8 or UTF-16. What is no table is
named as what it is, with the way to mend it.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specsplit.errors import UserError
from specsplit.experiment.containers import arrow_rows, folder_rows, read_container, recognise_binary

MOST_DIGITS = 1000
ONE_COLUMN = "\x1f"  # the separator of a table that has none: its cells may hold commas
JSON_LINES = "JSON lines"
JSON_SPACE = " \t\n\r"
# UTF-32 first: its mark begins as that of UTF-16 does.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ERROR_KEYS = {"error", "message", "detail", "details", "status", "statusCode", "documentation_url", "code"}
_PAGES = (("<!doctype html", "an HTML page"), ("<html", "an HTML page"), ("<?xml", "an XML document"))


@dataclass(frozen=True)
class Row:
    """One row of a table.

    line: where it begins, counted from 1; its number where the format has no lines. data: None when it cannot be read.
    problem: why. notes: what was read but is worth a word.
    """

    line: int
    data: dict[str, Any] | None
    problem: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """format: in words. unit: what `Row.line` counts. rows: in their order."""

    format: str
    unit: str
    rows: list[Row] = field(repr=False)

    def generated_id(self, index: int, row: Row) -> str:
        """The id of a row, the `index`-th from 0, that has none."""
        return f"line-{row.line}" if self.format == JSON_LINES else f"row-{index + 1}"


def read_rows(path: Path, content: bytes | None, wanted: Sequence[str]) -> Table:
    """The rows of a file, or of a folder that `datasets` saved (content None).

    wanted: names of columns that hold prompts, by which a CSV table is told from plain text.
    Raises UserError that names the file, what it is and how to mend it, when it holds no rows at all.
    """
    if content is None:
        return _numbered("a saved dataset", folder_rows(path))
    kind, content = read_container(path, content)
    if kind in ("Parquet", "Arrow"):
        return _numbered(f"{kind}", arrow_rows(path, kind, content))
    return _read_text(path, content, wanted)


def _numbered(name: str, rows: Iterator[dict[str, Any]]) -> Table:
    return Table(name, "row", [_checked(Row(number, data)) for number, data in enumerate(rows, start=1)])


def _checked(row: Row) -> Row:
    """A NaN of Parquet or pandas is a missing value."""
    assert row.data is not None
    data = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.data.items()}
    return Row(row.line, data)


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
    if start[0] == "[":
        return _read_array(path, text)
    if "\n" not in text and start[0] == "{":
        text = text.replace("\r", "\n")  # line ends of old Macs; no JSON string holds one as it is
    lines = text.split("\n")
    if start[0] == "{" and (whole := _whole_object(path, text)) is not None:
        return whole
    objects = [line for line in lines if line.lstrip(JSON_SPACE).startswith("{")]
    if objects and (start[0] == "{" or any(_parse(line).data is not None for line in objects)):
        return _read_lines(path, text, lines)
    return _read_csv(path, text, wanted)


def _decode(path: Path, content: bytes) -> str:
    """The text of a file. A byte that is not UTF-8 becomes half of a surrogate pair, which its row then names."""
    name = next((name for mark, name in _MARKS if content.startswith(mark)), None) or _without_mark(content)
    if name == "utf-8":
        content = content.removeprefix(codecs.BOM_UTF8)
        if what := recognise_binary(content):
            raise UserError(f"{path}: {what}, not a table of prompts; give JSON lines, CSV, Parquet or Arrow")
        return content.decode("utf-8", errors="surrogateescape")
    try:
        return content.decode(name)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: looks like {name.upper()}, but byte {error.start + 1} does not fit ({error.reason}): damaged or "
            "cut off; fetch it again, or save it as UTF-8"
        ) from None


def _without_mark(content: bytes) -> str:
    """UTF-16 of mostly Latin letters has a zero in every second byte."""
    head = content[: 1 << 12]
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if len(head) >= 4 and len(content) % 2 == 0:
        if odd > 0.4 * len(head) / 2 and not even:
            return "utf-16-le"
        if even > 0.4 * len(head) / 2 and not odd:
            return "utf-16-be"
    return "utf-8"


def undecodable(text: str) -> int | None:
    """The place of the first byte that `_decode` could not read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _encoding_problem(text: str, where: str = "of the line") -> str | None:
    place = undecodable(text)
    if place is None:
        return None
    byte = ord(text[place]) - 0xDC00
    before = len(text[:place].encode("utf-8", "surrogateescape"))
    found = f"not UTF-8 (byte {before + 1} {where} is 0x{byte:02x}"
    rest = text[place:]
    if len(rest) <= 3 and byte >= 0xC2 and all("\udc80" <= sign <= "\udcff" for sign in rest):
        return f"{found}): cut off (truncated) within a character; fetch the file again"
    sign = bytes([byte]).decode("cp1252", errors="replace")
    # Single bytes between letters are Latin-1; several in a row are of another encoding.
    if sign.isprintable() and sign != "\ufffd" and undecodable(rest[1:2]) is None:
        return f"{found}, {sign!r} in Latin-1); convert the file, for example: iconv -f WINDOWS-1252 -t UTF-8"
    return f"{found}); convert the file from its encoding, for example: iconv -f SHIFT-JIS -t UTF-8"


# ---- JSON


class _Pairs:
    """What the JSON parser meets that Python would take in silence."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def decoder(self) -> json.JSONDecoder:
        return json.JSONDecoder(object_pairs_hook=self.pairs, parse_constant=self.constant, parse_int=_whole_number)

    def constant(self, name: str) -> float:
        note = f"holds {name}, which JSON does not have; write null"
        if note not in self.notes:
            self.notes.append(note)
        return float(name.replace("Infinity", "inf"))

    @staticmethod
    def pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in pairs:
            if key in data and data[key] != value:
                raise ValueError(f"the key {key!r} stands twice with different values; keep one of them")
            data[key] = value
        return data


def _whole_number(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits; write it in quotes, as text")
    return int(text)


def _parse(text: str, line: int = 1) -> Row:
    """The row of one line."""
    if problem := _encoding_problem(text):
        return Row(line, None, problem)
    pairs = _Pairs()
    try:
        data = pairs.decoder().decode(text)
    except json.JSONDecodeError as error:
        return Row(line, None, _explain_line(text, error))
    except RecursionError:
        return Row(line, None, "not usable JSON: nested too deeply")
    except ValueError as error:
        return Row(line, None, str(error))
    return _object_row(data, line, pairs.notes)


def _object_row(data: Any, line: int, notes: Sequence[str]) -> Row:
    if not isinstance(data, dict):
        mend = '; write {"prompt": "..."}' if isinstance(data, str) else ""
        return Row(line, None, f"not a JSON object but {type(data).__name__}{mend}")
    return Row(line, data, notes=tuple(notes))


def _explain_line(text: str, error: json.JSONDecodeError) -> str:
    start = text.lstrip()
    if start.startswith(("//", "#", "/*")):
        return "a comment, which JSON does not have; remove the line"
    if "\x00" in text:
        return f"not valid JSON: a NUL character at column {text.index(chr(0)) + 1}; the file is damaged or binary"
    if start.startswith("{'") or "': '" in start:
        return f"not valid JSON at column {error.colno} but a Python dictionary; write it with json.dumps"
    if start.startswith("{") and (error.pos >= len(text) or error.msg.startswith("Unterminated string")):
        return f"not valid JSON: {error.msg.removesuffix(' starting at')} at column {error.colno}; the line is cut off"
    return f"not valid JSON: {error.msg} at column {error.colno}"


def _read_lines(path: Path, text: str, lines: Sequence[str]) -> Table:
    """JSON lines. An object is not skipped for what it has around it: that is told of the file."""
    rows = [
        _parse(line.strip(f"{JSON_SPACE}\ufeff"), number) for number, line in enumerate(lines, start=1) if line.strip()
    ]
    bad = [row for row in rows if row.data is None and not row.problem.startswith("not a JSON object but")]
    for row in bad:
        line = lines[row.line - 1].rstrip()
        if line.endswith(",") and _parse(line[:-1].strip()).data is not None:
            raise UserError(
                f"{path}:{row.line}: the object ends with a comma (column {len(line)}): lines of a JSON array without "
                "its brackets. Remove the commas, or put [ before the first line and ] after the last"
            )
    if rows[0].data is None and undecodable(text) is None:
        several = _read_several(path, text, strict=all(row.data is None for row in rows))
        if several is not None:
            return several
    return Table(JSON_LINES, "line", rows)


def _whole_object(path: Path, text: str) -> Table | None:
    """A file that is one JSON object: a row, or what its only list of objects holds."""
    try:
        data = _Pairs().decoder().decode(text)
    except (ValueError, RecursionError):
        return None
    if data and set(data) <= _ERROR_KEYS:
        told = _shorten(str(next(iter(data.values()))))
        raise UserError(
            f"{path}: the error message of a server, not a table of prompts: {told!r}; fetch the file again"
        )
    lists = {key: value for key, value in data.items() if _is_rows(value)}
    if "rows" in lists:
        lists = {"rows": lists["rows"]}
    if len(lists) == 1 and not {"prompt", "messages", "conversations", "conversation", "items"} & set(data):
        key, items = next(iter(lists.items()))
        # As the dataset viewer of the Hub answers: {"rows": [{"row": {...}}]}.
        found = [item["row"] if isinstance(item.get("row"), dict) else item for item in items]
        return Table(f"a JSON document with rows under {key!r}", "row", [Row(n, d) for n, d in enumerate(found, 1)])
    if "\n" not in text.strip():
        return None  # one line of JSON lines
    first = text[: text.index("{")].count("\n") + 1
    return Table("a JSON object", "line", [_parse(text.strip(), first)])


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _read_several(path: Path, text: str, *, strict: bool) -> Table | None:
    """Objects one after another, each over several lines. None when they are not that; strict: then say where."""
    rows: list[Row] = []
    place, line = 0, 1
    while True:
        start = place + len(text[place:]) - len(text[place:].lstrip(JSON_SPACE))
        line += text.count("\n", place, start)
        if start == len(text):
            return Table("JSON objects", "line", rows)
        pairs = _Pairs()
        try:
            data, place = pairs.decoder().raw_decode(text, start)
        except json.JSONDecodeError as error:
            if not strict or (not rows and text.count("\n", start, error.pos) == 0):
                return None
            raise UserError(
                f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}{_cut_off(text, error)}"
            ) from None
        except (ValueError, RecursionError):
            return None
        rows.append(_object_row(data, line, pairs.notes))
        line += text.count("\n", start, place)


def _cut_off(text: str, error: json.JSONDecodeError) -> str:
    rest = text[error.pos :].strip()
    unterminated = error.msg.startswith(("Unterminated", "Invalid \\"))
    if not rest or (unterminated and "\n" not in rest):
        return ". The file ends there: it is cut off (truncated); fetch it again"
    return ""


def _read_array(path: Path, text: str) -> Table:
    """A JSON array, item by item, so that each has its line. What breaks it is told of the file."""
    rows: list[Row] = []
    place = text.index("[") + 1
    line = text.count("\n", 0, place) + 1

    def skip(place: int) -> int:
        nonlocal line
        start = place
        while place < len(text) and text[place] in JSON_SPACE:
            place += 1
        line += text.count("\n", start, place)
        return place

    def fail(place: int, why: str) -> UserError:
        column = place - text.rfind("\n", 0, place)
        return UserError(f"{path}, line {line}, column {column}: {why}")

    place = skip(place)
    if text[place : place + 1] == "]":
        raise UserError(f"{path}: an empty JSON array; give it a prompt")
    while True:
        pairs = _Pairs()
        start = place
        try:
            data, place = pairs.decoder().raw_decode(text, place)
            row = _object_row(data, line, pairs.notes)
        except json.JSONDecodeError as error:
            line += text.count("\n", start, error.pos)
            if problem := _encoding_problem(text[start : error.pos + 1], "of the item"):
                raise fail(error.pos, problem) from None
            if rows and text[start : start + 1] == "]":
                raise fail(start, "a comma before the end of the JSON array; remove it") from None
            if text[start : start + 2] == "//":
                raise fail(start, "a comment, which JSON does not have; remove it") from None
            if error.pos >= len(text.rstrip()) or _cut_off(text, error):
                raise fail(error.pos, "the JSON array is cut off (truncated) here; fetch the file again") from None
            quotes = ", and single quotes: JSON has double ones" if text[error.pos] == "'" else ""
            raise fail(error.pos, f"not valid JSON: {error.msg}{quotes}") from None
        except RecursionError:
            raise fail(start, "not usable JSON: nested too deeply") from None
        except ValueError as error:
            raise fail(start, f"in this item: {error}") from None
        if problem := _encoding_problem(text[start:place], "of the item"):
            row = Row(line, None, problem)
        rows.append(row)
        line += text.count("\n", start, place)
        place = skip(place)
        sign = text[place : place + 1]
        if sign == ",":
            place = skip(place + 1)
        elif sign == "]":
            break
        elif not sign:
            raise fail(place, "the JSON array is cut off (truncated) here, without its closing ]; fetch the file again")
        else:
            raise fail(place, f"{sign!r} where a comma or the end of the JSON array is wanted")
    place = skip(place + 1)
    if place < len(text):
        if all(row.data is None and not row.notes for row in rows) or text[place] == "[":
            return _read_lines(path, text, text.split("\n"))  # each line is a list
        raise fail(place, f"{text[place : place + 20]!r} after the end of the JSON array")
    return Table("a JSON array", "line", rows)


# ---- CSV


def _read_csv(path: Path, text: str, wanted: Sequence[str]) -> Table:
    if problem := _encoding_problem(text, "of the file"):
        raise UserError(f"{path}: {problem}")
    first = next(line for line in text.split("\n") if line.strip())
    if re.fullmatch(r"sep=.\s*", first):  # of Excel
        delimiter, text = first[4], text.replace(first, "", 1)
    else:
        delimiter = max(f"{ONE_COLUMN},\t;|", key=first.count)
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
            f"{path}, line 1: plain text, not a table: {_shorten(first)!r}. Give each prompt a line of JSON, as "
            '{"prompt": "..."}, or a CSV file whose first line has the column prompt'
        )
    if repeated := [name for name, count in Counter(header).items() if count > 1]:
        raise UserError(f"{path}, line 1: the column {repeated[0]!r} stands twice; rename one of them")
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
            f"{path}, line {start}: not CSV: {error}; a quote that is opened there is not closed, or the file is cut "
            "off (truncated)"
        ) from None
    return Table("TSV" if delimiter == "\t" else "CSV", "line", rows)


def _csv_row(header: Sequence[str], cells: Sequence[str], line: int) -> Row:
    if len(cells) != len(header):
        why = f"{len(cells)} cells, the header has {len(header)}; put texts with the separator in quotes"
        return Row(line, None, why)
    data: dict[str, Any] = {name: cell if cell else None for name, cell in zip(header, cells, strict=True)}
    for name, cell in data.items():
        # Conversations stand in a cell as JSON.
        if cell and cell.lstrip()[:1] in ("[", "{") and name.lower() not in ("prompt", "question", "text"):
            try:
                data[name] = _Pairs().decoder().decode(cell)
            except (ValueError, RecursionError):
                continue
    return Row(line, data)


def _is_regular(text: str, delimiter: str, width: int) -> bool:
    """Whether every row has as many cells as the header, and there are some."""
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if any(row)]
    except csv.Error:
        return False
    return len(rows) > 1 and all(len(row) == width for row in rows)


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
