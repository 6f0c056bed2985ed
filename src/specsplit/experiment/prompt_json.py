"""JSON as people write prompts in: lines, an array, one object, objects one after another; each row with its line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specsplit.errors import UserError, shortened
from specsplit.experiment.prompt_table import JSON_LINES, Row, Table, encoding_problem, kind_of, undecodable
from specsplit.io import json_mend, unique_keys

JSON_SPACE = " \t\n\r"
MOST_DIGITS = 1000
_NO_SPACE = re.compile(f"[^{JSON_SPACE}]")
_ROW_KEYS = {"prompt", "messages", "conversations", "conversation", "items", "turns"}
_SPLITS = {"train", "test", "validation", "valid", "val", "dev"}
_ERROR_KEYS = {"error", "message", "detail", "details", "status", "statusCode", "documentation_url", "code"}


def _parse(text: str, start: int | None = None) -> tuple[Any, int, tuple[str, ...]]:
    """The JSON value that begins at `start`, or that is the whole text; where it ends; and what is worth a word.

    Raises ValueError, for what Python would take in silence as well.
    """
    notes: dict[str, None] = {}

    def constant(name: str) -> float:
        notes[f"holds {name}, which JSON does not have; write null"] = None
        return float(name.replace("Infinity", "inf"))

    decoder = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=constant, parse_int=_whole_number)
    try:
        data, end = (decoder.decode(text), len(text)) if start is None else decoder.raw_decode(text, start)
    except RecursionError:
        raise ValueError("not usable JSON: nested too deeply") from None
    return data, end, tuple(notes)


def _whole_number(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits; write it in quotes, as text")
    return int(text)


def _row(data: Any, line: int, notes: tuple[str, ...]) -> Row:
    if not isinstance(data, dict):
        mend = '; write {"prompt": "..."}' if isinstance(data, str) else ""
        return Row(line, None, f"not a JSON object but {kind_of(data)}{mend}")
    return Row(line, data, notes=notes)


def parse_line(text: str, line: int = 1) -> Row:
    """The row of one line."""
    if problem := encoding_problem(text):
        return Row(line, None, problem)
    try:
        data, _, notes = _parse(text)
    except json.JSONDecodeError as error:
        return Row(line, None, _explain_line(text, error))
    except ValueError as error:
        return Row(line, None, str(error))
    return _row(data, line, notes)


def parse_cell(text: str) -> Any:
    """The JSON in a cell of another table; the text itself where it is none."""
    try:
        return _parse(text)[0]
    except ValueError:
        return text


class _Reader:
    """Reads the values of a file one after another. place: of the next character; line: that it is in, from 1."""

    def __init__(self, path: Path, text: str, place: int = 0) -> None:
        self.path, self.text = path, text
        self.place, self.line = 0, 1
        self.go_to(place)

    def go_to(self, place: int) -> None:
        self.line += self.text.count("\n", self.place, place)
        self.place = place

    def sign(self) -> str:
        """The next character that is no space; empty at the end."""
        found = _NO_SPACE.search(self.text, self.place)
        self.go_to(found.start() if found else len(self.text))
        return self.text[self.place : self.place + 1]

    def value(self) -> Row:
        """The row of the value that begins here. Raises ValueError."""
        data, end, notes = _parse(self.text, self.place)
        row = _row(data, self.line, notes)
        self.go_to(end)
        return row

    def refusal(self, place: int, why: str) -> UserError:
        at = json.JSONDecodeError("", self.text, place)
        return UserError(f"{self.path}, line {at.lineno}, column {at.colno}: {why}")


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
    return f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}{json_mend(text, error)}"


def read_lines(path: Path, text: str, lines: Sequence[str]) -> Table:
    """JSON lines. An object is not skipped for what it has around it: that is told of the file."""
    numbered = [(number, line.strip(f"{JSON_SPACE}\ufeff")) for number, line in enumerate(lines, start=1)]
    rows = [parse_line(line, number) for number, line in numbered if line]
    bad = [row for row in rows if row.data is None and not row.problem.startswith("not a JSON object but")]
    for row in bad:
        line = lines[row.line - 1].rstrip()
        if line.endswith(",") and parse_line(line[:-1].strip()).data is not None:
            raise UserError(
                f"{path}:{row.line}: the object ends with a comma (column {len(line)}): lines of a JSON array without "
                "its brackets. Remove the commas, or put [ before the first line and ] after the last"
            )
    if rows[0].data is None and undecodable(text) is None:
        several = _read_several(path, text, strict=all(row.data is None for row in rows))
        if several is not None:
            return several
    return Table(JSON_LINES, "line", rows)


def whole_object(path: Path, text: str) -> Table | None:
    """A file that is one JSON object: a row, or what its only list of objects holds."""
    try:
        data = _parse(text)[0]
    except ValueError:
        return None
    if data and set(data) <= _ERROR_KEYS:
        told = shortened(str(next(iter(data.values()))))
        raise UserError(
            f"{path}: the error message of a server, not a table of prompts: {told!r}; fetch the file again"
        )
    lists = {key: value for key, value in data.items() if _is_rows(value)}
    if "rows" in lists:
        lists = {"rows": lists["rows"]}
    is_row = bool(_ROW_KEYS & {key.lower() for key in data})
    if len(lists) > 1 and set(data) <= _SPLITS:
        raise UserError(
            f"{path}: a JSON object of several splits ({', '.join(map(repr, lists))}); write one to a file of its own"
        )
    if len(lists) == 1 and not is_row:
        key, items = next(iter(lists.items()))
        if problem := encoding_problem(text, "of the file"):
            raise UserError(f"{path}: {problem}")
        # As the dataset viewer of the Hub answers: {"rows": [{"row": {...}}]}.
        found = [item["row"] if isinstance(item.get("row"), dict) else item for item in items]
        return Table(f"a JSON document with rows under {key!r}", "row", [Row(n, d) for n, d in enumerate(found, 1)])
    sizes = {(type(value), len(value)) if isinstance(value, list | dict) else None for value in data.values()}
    if "prompt" in data and not lists and len(data) > 1 and len(sizes) == 1 and None not in sizes:
        raise UserError(
            f"{path}: a JSON object of columns ({', '.join(map(repr, data))}), not of rows; write rows, as pandas does "
            'with to_json(orient="records")'
        )
    if "\n" not in text.strip():
        return None  # one line of JSON lines
    first = text[: text.index("{")].count("\n") + 1
    return Table("a JSON object", "line", [parse_line(text.strip(), first)])


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _read_several(path: Path, text: str, *, strict: bool) -> Table | None:
    """Objects one after another, each over several lines. None when they are not that; strict: then say where."""
    rows: list[Row] = []
    reader = _Reader(path, text)
    while reader.sign():
        try:
            rows.append(reader.value())
        except json.JSONDecodeError as error:
            if not strict or (not rows and "\n" not in text[reader.place : error.pos]):
                return None
            why = _cut_off(text, error) or json_mend(text, error)
            raise reader.refusal(error.pos, f"not valid JSON: {error.msg}{why}") from None
        except ValueError:
            return None
    return Table("JSON objects", "line", rows)


def _cut_off(text: str, error: json.JSONDecodeError) -> str:
    rest = text[error.pos :].strip(JSON_SPACE)
    unterminated = error.msg.startswith(("Unterminated", "Invalid \\"))
    if not rest or (unterminated and "\n" not in rest):
        return ". The file ends there: it is cut off (truncated); fetch it again"
    return ""


def read_array(path: Path, text: str) -> Table:
    """A JSON array, item by item, so that each has its line. What breaks it is told of the file."""
    rows: list[Row] = []
    reader = _Reader(path, text, text.index("[") + 1)
    if reader.sign() == "]":
        raise UserError(f"{path}: an empty JSON array; give it a prompt")
    sign = ","
    while sign == ",":
        reader.sign()
        start = reader.place
        try:
            row = reader.value()
        except json.JSONDecodeError as error:
            raise reader.refusal(*_broken_item(text, start, error, first=not rows)) from None
        except ValueError as error:
            raise reader.refusal(start, f"in this item: {error}") from None
        if problem := encoding_problem(text[start : reader.place], "of the item"):
            row = Row(row.line, None, problem)
        rows.append(row)
        sign = reader.sign()
        if sign not in ("", ",", "]"):
            raise reader.refusal(reader.place, f"{sign!r} where a comma or the end of the JSON array is wanted")
        reader.go_to(reader.place + len(sign))
    if not sign:
        why = "the JSON array is cut off (truncated) here, without its closing ]; fetch the file again"
        raise reader.refusal(reader.place, why)
    if sign := reader.sign():
        if all(row.data is None and not row.notes for row in rows) or sign == "[":
            return read_lines(path, text, text.split("\n"))  # each line is a list
        rest = text[reader.place : reader.place + 20]
        raise reader.refusal(reader.place, f"{rest!r} after the end of the JSON array")
    return Table("a JSON array", "line", rows)


def _broken_item(text: str, start: int, error: json.JSONDecodeError, *, first: bool) -> tuple[int, str]:
    """Where and why an item of an array cannot be read."""
    if problem := encoding_problem(text[start : error.pos + 1], "of the item"):
        return error.pos, problem
    if not first and text[start : start + 1] == "]":
        return start, "a comma before the end of the JSON array; remove it"
    if error.pos >= len(text.rstrip()) or _cut_off(text, error):
        return error.pos, "the JSON array is cut off (truncated) here; fetch the file again"
    return error.pos, f"not valid JSON: {error.msg}{json_mend(text, error)}"
