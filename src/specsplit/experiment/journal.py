"""What a run has done so far, so that a run that was cut short can be resumed.

The journal is one file of JSON lines in the run folder: first the settings that its rows were made with, then a line
for every request that ended. A line is written at once and counts when it is whole, so a process that is killed at any
moment loses no row and repeats none. The file is no output of the workflow, which deletes those of a job that failed.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Mapping
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


class Journal:
    """The entries of the run in `folder`. Use as a context manager: one process at a time.

    settings: everything that decides the rows, as JSON can hold it. A journal with other settings is started over.
    attempts: when each of the runs that wrote here started, this one last.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, resume: bool = True) -> None:
        self._path = folder / JOURNAL
        self._settings = json.loads(json.dumps(settings))
        self._resume = resume
        self._entries: dict[Key, Entry] = {}
        self.attempts: list[str] = []

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
            self._append({"settings": self._settings})
        self.attempts.append(utc_now())
        self._append({"attempt": self.attempts[-1]})
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Entry | None:
        return self._entries.get(key)

    def add(self, entry: Entry) -> None:
        """Keep an entry; it replaces an earlier one of the same request."""
        self._append(asdict(entry))
        self._entries[entry.key] = entry

    def remove(self) -> None:
        """Delete the file: the tables hold the whole run."""
        self._path.unlink()

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")

    def _read(self) -> int:
        """Take the entries of an earlier run; returns how many bytes of the file are whole and of these settings."""
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
                    rounds = [RoundRecord(**row) for row in content["rounds"]]
                    reference = [ReferenceRecord(**row) for row in content["reference"]]
                    entry = Entry(RequestRecord(**content["request"]), rounds, content["output"], reference)
                    self._entries[entry.key] = entry
            except (ValueError, KeyError, TypeError):
                log.warning("%s: cut off after %d bytes; what came before is kept", self._path, whole)
                break
            whole += len(line)
        return whole


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
