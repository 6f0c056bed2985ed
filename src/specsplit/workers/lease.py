"""A worker that something else started lives no longer than that something.

The holder of the lease is an endpoint file (deleting it ends the worker) and, when SPECSPLIT_LEASE_PID names one, a
process (the workflow): the worker ends when either is gone, however it went, SIGKILL included.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

LEASE_PID = "SPECSPLIT_LEASE_PID"


@dataclass(frozen=True)
class ProcessIdentity:
    """A process that cannot be mistaken for a later one with the same number."""

    pid: int
    started: float

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """The identity of a running process, or None when there is none."""
        try:
            return cls(pid, psutil.Process(pid).create_time())
        except psutil.NoSuchProcess:
            return None

    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def lease_holder() -> ProcessIdentity | None:
    """The process named by SPECSPLIT_LEASE_PID, or None when the variable is not set.

    A number that names no process gives an identity that is not alive: the holder is gone already.
    """
    value = os.environ.get(LEASE_PID, "")
    if not value.isdigit():
        return None
    return ProcessIdentity.of(int(value)) or ProcessIdentity(int(value), -1.0)


@dataclass
class Lease:
    """What keeps a process alive. `file` counts only once it exists (`written` is set by its writer)."""

    holder: ProcessIdentity | None = None
    file: Path | None = None
    written: bool = False

    def lost(self) -> str | None:
        """Why the lease has ended, or None while it holds."""
        if self.holder is not None and not self.holder.alive():
            return f"process {self.holder.pid}, which this worker was started for, is gone"
        if self.file is not None and self.written and not self.file.exists():
            return f"endpoint file {self.file} is gone"
        return None


def end_with_lease(poll_s: float = 0.5) -> None:
    """End this process when the holder of SPECSPLIT_LEASE_PID is gone, so that a killed workflow leaves no client.

    Does nothing when the variable is not set.
    """
    holder = lease_holder()
    if holder is None:
        return

    def watch() -> None:
        while holder.alive():
            time.sleep(poll_s)
        os._exit(143)

    threading.Thread(target=watch, name="lease", daemon=True).start()
