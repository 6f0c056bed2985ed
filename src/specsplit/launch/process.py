"""Which process it is, and whether it still runs."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

CLOCK_SLACK_S = 5.0


@dataclass(frozen=True)
class ProcessIdentity:
    """A process that cannot be mistaken for a later one with the same number.

    started: seconds since 1970, to be read by people: it moves when the clock is set. birth: the boot of the machine
    and the clock ticks from it to the start of the process, which never move; empty where the system does not tell.
    """

    pid: int
    started: float
    birth: str = field(default="", compare=False)

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """The identity of a running process, or None when there is none."""
        try:
            return cls(pid, psutil.Process(pid).create_time(), _birth(pid))
        except psutil.NoSuchProcess:
            return None

    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            if self.birth:
                return _birth(self.pid) == self.birth
            return abs(process.create_time() - self.started) < CLOCK_SLACK_S
        except psutil.NoSuchProcess:
            return False


def end_process(process: subprocess.Popen[Any], patience_s: float = 5.0) -> None:
    """Ask a child process to end, and kill it when it is still there after `patience_s` seconds."""
    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _birth(pid: int) -> str:
    """See ProcessIdentity; empty when there is no such process, or no /proc."""
    try:
        # The name of the program, in parentheses, may hold spaces. The start is field 22 of proc_pid_stat(5).
        ticks = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, IndexError):
        return ""
    return f"{boot}/{ticks}"
