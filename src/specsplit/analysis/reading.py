"""Reading CSV tables with types: what is wrong in a file is refused with its name, line and column."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame

from specsplit.errors import UserError, counted
from specsplit.experiment.columns import LATER_COLUMNS
from specsplit.io import csv_reader
from specsplit.settings.axes import PLAIN
from specsplit.settings.names import AUTO


def read_files(paths: list[Path], types: dict[str, str], made_by: str) -> DataFrame:
    """The rows of all files; the index keeps (file, row) so that a message can say where a row is from."""
    frames = [read_csv_file(path, types, made_by) for path in paths]
    return pd.concat(frames, keys=[str(path) for path in paths], names=["file", "row"])


def read_records(path: Path, record: type[Any], command: str) -> DataFrame:
    """A table whose columns are the fields of the dataclass `record`. Raises UserError when it is missing, malformed
    or empty. command: what writes it, beside the workflow."""
    made_by = f"`{command}` or the workflow (`snakemake --cores 2 {path}`) makes it"
    table = read_csv_file(path, {field.name: str(field.type) for field in fields(record)}, made_by)
    if table.empty:
        raise UserError(f"{path}: has no request, only the header; {made_by}")
    return table


def read_csv_file(path: Path, types: dict[str, str], made_by: str) -> DataFrame:
    """One table. types: column -> annotation, a key of _CELLS; other columns are left out, LATER_COLUMNS that
    the file lacks are empty, or the default of their setting.

    made_by: what makes the file, for the message when it cannot be read. Raises UserError.
    """
    # Not pandas: it would take a request called "NA" for a missing one, and its errors do not name the line.
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv_reader(file)
            header: list[str] = next(reader, [])
            lines = [(reader.line_num, cells) for cells in reader if cells]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {made_by}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a CSV table: {error}; {made_by}") from None
    if not header:
        raise UserError(f"{path}: is empty; {made_by}")
    absent = [name for name in types if name not in header]
    if missing := [name for name in absent if name not in LATER_COLUMNS]:
        raise UserError(f"{path}: lacks the columns {', '.join(missing)}; {made_by}")
    for number, cells in lines:
        if len(cells) != len(header):
            raise UserError(
                f"{path}, line {number}: {counted(len(cells), 'cell')} where the header has {len(header)}: "
                "the file was cut off or edited; make it again"
            )
    columns = {}
    for name, kind in types.items():
        parse, dtype = _CELLS[kind]
        if name in absent:
            columns[name] = pd.array([PLAIN.get(name)] * len(lines), dtype="Int64" if dtype == "int64" else dtype)
            continue
        place = header.index(name)
        values = []
        for number, cells in lines:
            try:
                values.append(parse(cells[place]))
            except (ValueError, KeyError):
                raise UserError(
                    f"{path}, line {number}, column {name}: {cells[place]!r} is not {_NAMES[kind]}"
                ) from None
        columns[name] = pd.array(values, dtype=dtype)
    return DataFrame(columns)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _finite_or_missing(text: str) -> float:
    return _finite(text) if text else math.nan


# Annotation of a column -> how to read one cell of it, and the column's type in the table.
_CELLS: dict[str, tuple[Callable[[str], Any], Any]] = {
    "str": (str, "str"),
    "int": (int, "int64"),
    "int | str": (lambda text: AUTO if text == AUTO else int(text), "object"),
    "float": (_finite, "float64"),
    "float | None": (_finite_or_missing, "float64"),
    "int | None": (lambda text: int(text) if text else None, "Int64"),
    "bool": ({"True": True, "False": False}.__getitem__, "bool"),
    "bool | None": ({"True": True, "False": False, "": None}.__getitem__, "boolean"),
}
_NAMES = {
    "int": "a whole number",
    "int | str": f"a whole number or {AUTO}",
    "int | None": "a whole number or empty",
    "float": "a finite number",
    "float | None": "a finite number or empty",
    "bool": "True or False",
    "bool | None": "True, False or empty",
}
