"""A file that is touched as long as a process lives, so that other hosts can tell.

Only changes of the file's time count, over seconds of the reader's own monotonic clock: the clocks of two hosts need
not agree, and may be set.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

# Whose process a worker is started for, where that process is, as its number means nothing on another host, and its
# heartbeat, for other hosts.
LEASE_PID, LEASE_HOST, LEASE_FILE = "SPECSPLIT_LEASE_PID", "SPECSPLIT_LEASE_HOST", "SPECSPLIT_LEASE_FILE"
BEAT_S = 1.0
SILENT_S = 15.0  # without a beat: the process is gone, or its host, or the way to the folder


def start_heartbeat(file: Path) -> threading.Event:
    """Touch `file`, which exists, every BEAT_S seconds for as long as this process lives. Returns what ends it."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_S):
            with suppress(OSError):  # The folder may be out of reach for a while; a deleted file does not come back.
                os.utime(file)

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()
    return over


def hold_lease(heartbeat: Path | None = None) -> None:
    """Let what this process starts from now on end with it. heartbeat: its file, for workers on other hosts."""
    os.environ.update({LEASE_PID: str(os.getpid()), LEASE_HOST: socket.gethostname()})
    if heartbeat is not None:
        os.environ[LEASE_FILE] = str(heartbeat.absolute())


class Pulse:
    """The heartbeat of another process, as seen from here; pid: of that process on its own host."""

    def __init__(self, file: Path, pid: int = 0) -> None:
        self._file, self.pid = file, pid
        self._last = self._touched()
        self._changed = time.monotonic()

    def alive(self) -> bool:
        """Whether the file was touched in the last SILENT_S seconds, or has been watched for a shorter time."""
        now = self._touched()
        if now != self._last and now is not None:
            self._last, self._changed = now, time.monotonic()
        return time.monotonic() - self._changed < SILENT_S

    @property
    def last(self) -> int | None:
        return self._last

    def _touched(self) -> int | None:
        try:
            # Opened, not only looked up: a network file system then asks its server.
            with self._file.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return None


def silent(files: Collection[Path]) -> set[Path]:
    """Those of the files that no process touches. Takes up to SILENT_S seconds, and a beat when all are touched."""
    pulses = {file: Pulse(file) for file in files}
    first = {file: pulse.last for file, pulse in pulses.items()}
    quiet = {file for file in files if first[file] is not None}
    while quiet and all(pulses[file].alive() for file in quiet):
        quiet = {file for file in quiet if pulses[file].last == first[file]}
        time.sleep(BEAT_S / 4)
    return quiet | {file for file in files if first[file] is None}
