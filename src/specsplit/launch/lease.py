"""A worker that something else started lives no longer than that something.

The holder of the lease is an endpoint file (deleting it ends the worker) and, when SPECSPLIT_LEASE_PID names one, a
process (the workflow): the worker ends when either is gone, however it went, SIGKILL included.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

LEASE_PID = "SPECSPLIT_LEASE_PID"
LEASE_HOST = "SPECSPLIT_LEASE_HOST"  # where that process is: its number means nothing on another host
CLOCK_SLACK_S = 5.0


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
            # Start times are counted from the boot time, which moves a little when the clock is corrected.
            same = abs(process.create_time() - self.started) < CLOCK_SLACK_S
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def hold_lease() -> None:
    """Let what this process starts from now on end with it."""
    os.environ.update({LEASE_PID: str(os.getpid()), LEASE_HOST: socket.gethostname()})


def lease_holder() -> ProcessIdentity | None:
    """The process named by SPECSPLIT_LEASE_PID, or None when there is none or it is on another host.

    A number that names no process gives an identity that is not alive: the holder is gone already.
    """
    value = os.environ.get(LEASE_PID, "")
    if not value.isdigit() or os.environ.get(LEASE_HOST, socket.gethostname()) != socket.gethostname():
        return None
    return ProcessIdentity.of(int(value)) or ProcessIdentity(int(value), -1.0)


@dataclass
class Lease:
    """What keeps a worker alive.

    holder: the process it was started for. file: its endpoint file, which counts once `written` is set.
    users: a file that lists the endpoint files of those who share the worker, one path a line; the worker ends
    when none of them exists. It is read and written under the lock `user_lock(users)`.
    """

    holder: ProcessIdentity | None = None
    file: Path | None = None
    users: Path | None = None
    written: bool = False

    def lost(self) -> str | None:
        """Why the lease has ended, or None while it holds."""
        if self.holder is not None and not self.holder.alive():
            return f"process {self.holder.pid}, which this worker was started for, is gone"
        if self.file is not None and self.written and not self.file.exists():
            return f"endpoint file {self.file} is gone"
        if self.users is not None and self.written and self._unused(self.users):
            return "nobody uses this worker any more"
        return None

    def _unused(self, users: Path) -> bool:
        try:
            with user_lock(users).acquire(timeout=0):
                if users.exists() and any(Path(user).exists() for user in users.read_text().splitlines()):
                    return False
                # Nobody can find the worker from here on, so it cannot be shared while it stops.
                users.unlink(missing_ok=True)
                if self.file is not None:
                    self.file.unlink(missing_ok=True)
                return True
        except Timeout:
            return False  # somebody is about to share it


def user_lock(users: Path) -> FileLock:
    """The lock that guards who shares a worker."""
    return FileLock(users.with_suffix(".lock"))


def end_with_lease(poll_s: float = 0.5) -> Callable[[], None]:
    """End this process when the holder of SPECSPLIT_LEASE_PID is gone, so that a killed workflow leaves nothing.

    Does nothing when the variable is not set. Returns what calls it off.
    """
    holder = lease_holder()
    over = threading.Event()

    def watch(holder: ProcessIdentity) -> None:
        while holder.alive():
            if over.wait(poll_s):
                return
        os._exit(143)

    if holder is not None:
        threading.Thread(target=watch, args=(holder,), name="lease", daemon=True).start()
    return over.set
