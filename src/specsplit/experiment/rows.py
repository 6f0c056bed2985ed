"""A table that is written while a measurement goes on, and is there under its name only when that is over."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class RowFile:
    """Writes rows to `PATH.part`; the end of the block without an error makes it `path`.

    An old `path` is deleted at the start: rows of two measurements never stand side by side.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._path = path
        self._part = path.with_name(f"{path.name}.part")
        self._columns = columns

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        self._file = self._part.open("w", encoding="utf-8", newline="")
        self._rows = csv.DictWriter(self._file, self._columns, lineterminator="\n")
        self._rows.writeheader()
        return self

    def write(self, row: Mapping[str, Any]) -> None:
        self._rows.writerow(row)
        self._file.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is None:
            self._part.replace(self._path)
