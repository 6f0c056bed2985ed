"""A table of prompts, row by row, before anyone asks what its columns mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

JSON_LINES = "JSON lines"


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


_KINDS = {str: "text", type(None): "null", bool: "true or false", int: "a number", float: "a number"} | {
    list: "a list",
    dict: "an object",
    bytes: "bytes that are not UTF-8",
}


def kind_of(value: Any) -> str:
    """The kind of a value of JSON, in words."""
    return _KINDS.get(type(value), type(value).__name__)


def undecodable(text: str) -> int | None:
    """The place of the first byte that `_decode` could not read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def encoding_problem(text: str, where: str = "of the line") -> str | None:
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
