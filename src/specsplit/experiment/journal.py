"""What a measurement has done so far, so that one that was cut short can be resumed.

A journal is a file of JSON lines: first the settings that its rows were made with, then a line for every request of a
run, turn of a race or load of the capacity that ended. A line is written at once and counts when it is whole, so a
process that is killed at any moment loses no row and repeats none. The file is no output of the workflow, which deletes
those of a job that failed.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from specsplit.errors import UserError
from specsplit.experiment.columns import ReferenceRecord, RequestRecord, RoundRecord
from specsplit.provenance.capture import utc_now

JOURNAL = "unfinished.jsonl"
log = logging.getLogger(__name__)
Key = tuple[int, str]  # repeat, request_id


@dataclass(frozen=True)
class Entry:
    """A request that ended: its row, the rows of its rounds, its line of `outputs.jsonl`, and the rows of what was
    measured in turn with it. They are kept together or not at all: what is compared was measured side by side."""

    request: RequestRecord
    rounds: list[RoundRecord]
    output: dict[str, Any]
    reference: list[ReferenceRecord] = field(default_factory=list)

    @property
    def key(self) -> Key:
        return self.request.repeat, self.request.request_id


class Lines:
    """The lines of a journal. Use as a context manager: one process at a time.

    settings: everything that decides the rows, as JSON can hold it. A file with other settings is started over.
    attempts: when each of those who wrote here started, this one last. lines: of earlier attempts.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool = True) -> None:
        self._path = path
        self._settings = json.loads(json.dumps(settings))
        self._resume = resume
        self.attempts: list[str] = []
        self.lines: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{self._path}: another process writes this run; wait for it, or end it") from None
        except OSError as error:  # a file system without locks
            log.warning("%s: not locked against a second run: %s", self._path, error.strerror)
        whole = self._read() if self._resume else 0
        self._file.truncate(whole)
        if not whole:
            self.append({"settings": self._settings})
        self.attempts.append(utc_now())
        self.append({"attempt": self.attempts[-1]})
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def remove(self) -> None:
        """Delete the file: the tables hold the whole run."""
        self._path.unlink()

    def take(self, line: dict[str, Any]) -> None:
        """Take a line of an earlier attempt. Raises ValueError, KeyError or TypeError for one that cannot be."""
        self.lines.append(line)

    def append(self, line: Mapping[str, Any]) -> None:
        """Keep a line, at once."""
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")

    def _read(self) -> int:
        """Take the lines of earlier attempts; returns how many bytes of the file are whole and of these settings."""
        self._file.seek(0)
        whole = 0
        for line in self._file.read().splitlines(keepends=True):
            try:
                content = json.loads(line)
                if not line.endswith(b"\n"):
                    raise ValueError
                if whole == 0:
                    if names := _differing(content["settings"], self._settings):
                        log.warning(
                            "%s: its rows were made with other settings (%s) and are dropped", self._path, names
                        )
                        return 0
                elif "attempt" in content:
                    self.attempts.append(content["attempt"])
                else:
                    self.take(content)
            except (ValueError, KeyError, TypeError):
                log.warning("%s: cut off after %d bytes; what came before is kept", self._path, whole)
                break
            whole += len(line)
        return whole


class Journal(Lines):
    """The entries of the run in `folder`, as `Lines` keeps them.

    controller: what the gamma controller had learnt after the last of them; None where gamma is fixed.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, resume: bool = True) -> None:
        super().__init__(folder / JOURNAL, settings, resume=resume)
        self._entries: dict[Key, Entry] = {}
        self.controller: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Entry | None:
        return self._entries.get(key)

    def add(self, entry: Entry, controller: dict[str, Any] | None = None) -> None:
        """Keep an entry; it replaces an earlier one of the same request."""
        line = asdict(entry)
        self.append(line if controller is None else {**line, "controller": controller})
        self._entries[entry.key] = entry

    def take(self, line: dict[str, Any]) -> None:
        rounds = [RoundRecord(**row) for row in line["rounds"]]
        reference = [ReferenceRecord(**row) for row in line["reference"]]
        entry = Entry(RequestRecord(**line["request"]), rounds, line["output"], reference)
        self._entries[entry.key] = entry
        self.controller = line.get("controller")


class Parts(Lines):
    """The parts of a measurement that leaves one table, `output`: a journal beside it."""

    def __init__(self, output: Path, settings: Mapping[str, Any], *, resume: bool = True) -> None:
        super().__init__(output.with_name(f"{output.stem}_{JOURNAL}"), settings, resume=resume)
        self._parts: dict[str, Any] = {}

    def take(self, line: dict[str, Any]) -> None:
        self._parts[json.dumps(line["part"])] = line["content"]

    def measured(self, part: Any, measure: Callable[[], Any]) -> Any:
        """The content of a part, as JSON: of an earlier attempt, or measured now and kept."""
        key = json.dumps(part)
        if key not in self._parts:
            content = measure()
            self.append({"part": part, "content": content})
            self._parts[key] = content
        return self._parts[key]


def _differing(before: Mapping[str, Any], now: Mapping[str, Any], name: str = "") -> str:
    """The names of the settings that differ, dotted."""
    names = []
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names.append(_differing(old, new, f"{name}{key}."))
        elif old != new:
            names.append(f"{name}{key}")
    return ", ".join(filter(None, names))
