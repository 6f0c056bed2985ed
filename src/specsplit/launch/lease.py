"""A worker that something else started lives no longer than that something.

A lease is held by an endpoint file (deleting it ends the worker) and, when SPECSPLIT_LEASE_PID names one, by a process
(the workflow). The worker ends when either is gone, however it went, SIGKILL included.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from specsplit.launch.heartbeat import LEASE_FILE, LEASE_HOST, LEASE_PID, Pulse
from specsplit.launch.process import ProcessIdentity

STARTER_PID = "SPECSPLIT_STARTER_PID"  # the process that waits until a worker serves


def lease_holder() -> ProcessIdentity | Pulse | None:
    """The process named by SPECSPLIT_LEASE_PID; None when there is none, or on another host without a heartbeat.

    A number that names no process gives an identity that is not alive: the holder is gone already.
    """
    value = os.environ.get(LEASE_PID, "")
    if not value.isdigit():
        return None
    if os.environ.get(LEASE_HOST, socket.gethostname()) != socket.gethostname():
        file = os.environ.get(LEASE_FILE)
        return Pulse(Path(file), int(value)) if file else None
    return _process(int(value))


def _process(pid: int) -> ProcessIdentity:
    return ProcessIdentity.of(pid) or ProcessIdentity(pid, -1.0)


@dataclass
class Lease:
    """What keeps a worker alive.

    holder: the process it was started for. file: its endpoint file, which counts once `written` is set; inode: of that
    file, so that another worker's in its place is told apart.
    users: a file that lists the endpoint files of those who share the worker, one path a line; the worker ends
    when none of them exists. It is read and written under the lock `user_lock(users)`.
    """

    holder: ProcessIdentity | Pulse | None = None
    file: Path | None = None
    users: Path | None = None
    written: bool = False
    inode: int | None = None

    def lost(self) -> str | None:
        """Why the lease has ended, or None while it holds."""
        if self.holder is not None and not self.holder.alive():
            return f"process {self.holder.pid}, which this worker was started for, is gone"
        if self.file is not None and self.written:
            try:
                inode = self.file.stat().st_ino
            except FileNotFoundError:
                return f"endpoint file {self.file} is gone"
            if self.inode not in (None, inode):
                return f"endpoint file {self.file} is another worker's now"
        if self.users is not None and self.written and self._unused(self.users):
            return "nobody uses this worker any more"
        return None

    def _unused(self, users: Path) -> bool:
        try:
            with user_lock(users).acquire(timeout=0):
                if users.exists() and any(Path(user).exists() for user in users.read_text().splitlines()):
                    return False
                # Without these files no run finds the worker and shares it while it stops.
                users.unlink(missing_ok=True)
                if self.file is not None:
                    self.file.unlink(missing_ok=True)
                return True
        except Timeout:
            return False  # another run is about to share it


def user_lock(users: Path) -> FileLock:
    """The lock that guards who shares a worker."""
    return FileLock(users.with_suffix(".lock"))


def end_with_lease(poll_s: float = 0.5) -> Callable[[], None]:
    """End this process when the holder of SPECSPLIT_LEASE_PID is gone, so that a killed workflow leaves nothing.

    A worker that is being started also ends with the process that waits for it (SPECSPLIT_STARTER_PID).
    Does nothing when neither variable is set. Returns what calls it off.
    """
    starter = os.environ.pop(STARTER_PID, "")
    holders = [h for h in (lease_holder(), _process(int(starter)) if starter.isdigit() else None) if h is not None]
    over = threading.Event()

    def watch() -> None:
        while all(holder.alive() for holder in holders):
            if over.wait(poll_s):
                return
        if not over.is_set():
            os._exit(143)

    if holders:
        threading.Thread(target=watch, name="lease", daemon=True).start()
    return over.set
