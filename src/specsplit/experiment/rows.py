"""A table that is written while a measurement goes on, and is there under its name only when that is over."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from specsplit.io import CSV_ROW_END, RowEnds, replacing


@contextmanager
def writing_rows(path: Path, record: type[Any]) -> Iterator[Callable[[Any], None]]:
    """A function that writes a row; the end of the block without an error makes the rows the table `path`.

    record: the dataclass of the rows, whose fields are the columns. An old `path` is deleted at the start: a table is
    of one measurement.
    """
    path.unlink(missing_ok=True)
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        ends: Any = RowEnds(file)
        table = csv.DictWriter(ends, [field.name for field in fields(record)], lineterminator=CSV_ROW_END)
        table.writeheader()

        def write(row: Any) -> None:
            table.writerow(asdict(row))
            file.flush()

        yield write


def write_rows(path: Path, record: type[Any], rows: Iterable[Any]) -> None:
    """Write a table of all of these rows; record: their dataclass."""
    with writing_rows(path, record) as write:
        for row in rows:
            write(row)
