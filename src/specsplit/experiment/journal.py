"""What a measurement has done so far, so that one that was cut short can be resumed.

A journal is a file of JSON lines: first the settings that its parts were made with, then a line for every request of a
run, turn of a race or load of the capacity that ended. A line is written at once and counts when it is whole, so a
process that is killed at any moment loses no row and repeats none. The file is no output of the workflow, which deletes
those of a job that failed.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from specsplit.errors import UserError
from specsplit.experiment.records import Request, requests_sha256
from specsplit.provenance.capture import utc_now

JOURNAL = "unfinished.jsonl"
log = logging.getLogger(__name__)


class Journal:
    """The parts of a measurement that are done. Use as a context manager: one process at a time.

    settings: everything that decides the parts, as JSON can hold it. A file with other settings is started over, and
    one that is not to be resumed. attempts: when each of those who wrote here started, this one last. contents: of the
    parts, in the order in which they were kept last.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool = True) -> None:
        self._path = path
        self._settings = json.loads(json.dumps(settings))
        self._resume = resume
        self._parts: dict[str, Any] = {}
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

    @property
    def contents(self) -> Sequence[Any]:
        return list(self._parts.values())

    def keep(self, part: Any, content: Any) -> None:
        """Keep the content of a part, at once; it replaces an earlier one. Both as JSON can hold them."""
        self._append({"part": part, "content": content})
        self._take(part, content)

    def measured(self, part: Any, measure: Callable[[], Any]) -> Any:
        """The content of a part, as JSON: of an earlier attempt, or measured now and kept."""
        key = json.dumps(part)
        if key not in self._parts:
            self.keep(part, measure())
        return self._parts[key]

    def remove(self) -> None:
        """Delete the file: the tables hold all of it."""
        self._path.unlink()

    def _take(self, part: Any, content: Any) -> None:
        key = json.dumps(part)
        self._parts.pop(key, None)
        self._parts[key] = content

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")

    def _read(self) -> int:
        """Take the parts of earlier attempts; returns how many bytes of the file are whole and of these settings."""
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
                    self._take(content["part"], content["content"])
            except (ValueError, KeyError, TypeError):
                log.warning("%s: cut off after %d bytes; what came before is kept", self._path, whole)
                break
            whole += len(line)
        return whole


def journal_beside(
    output: Path, requests: Sequence[Request], settings: Mapping[str, Any], *, resume: bool = True
) -> Journal:
    """The journal, beside it, of a table that is made of these requests. settings: what else decides its rows."""
    path = output.with_name(f"{output.stem}_{JOURNAL}")
    return Journal(path, {**settings, "requests_sha256": requests_sha256(requests)}, resume=resume)


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
