"""What happens once per run of the workflow, before its first job and after a failed one: Snakemake's onstart, onerror.

Needs nothing but the standard library: Snakemake imports it from the checkout.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specsplit.errors import UserError
from specsplit.launch.heartbeat import hold_lease, start_heartbeat
from specsplit.provenance.steps import remember_workflow

LAST_LINES = 12
LONG_AGO = 1_000_000_000  # the date of the file that tells whether a copy has its dates, in seconds since 1970
INSTALL = (
    "The command specsplit is not installed. Make an environment with it in the folder of the project: "
    "make .venv/installed && . .venv/bin/activate. Or let conda make one: snakemake --sdm conda"
)


def lost_dates(dated: Path) -> str | None:
    """What to say of results that were copied without their dates; None when they have them. dated: see `Run.begin`."""
    if not dated.exists() or int(dated.stat().st_mtime) == LONG_AGO:
        return None
    return (
        f"{dated.parent} was copied without its dates, by which Snakemake knows what is left to be made: some may "
        "be made again, and what a call left undone may be missed. Copy it with them (cp -a, rsync -a), or decide: "
        f"rm {shlex.quote(str(dated))}, then snakemake --touch where all of it is finished, or --forceall"
    )


class Run:
    """A run of the workflow in a folder. Its lock is the kernel's: it is gone with the process, however that ends."""

    def __init__(self) -> None:
        self._lock: Any = None
        self._failed = FailedJobs()

    def begin(
        self,
        cores: int | None,
        config_files: Sequence[str],
        *,
        dated: Path,
        deployed: bool,
        state: Path = Path(".snakemake"),
    ) -> None:
        """Claim the folder, let all jobs end with this process, and have what is run recorded.

        dated: a file beside the results that gets a date long ago: a copy of it without dates has another one.
        deployed: Snakemake makes the environments of the jobs. Raises UserError when another run works in this folder,
        or when there is no specsplit to run.
        """
        if not deployed and shutil.which("specsplit") is None:
            raise UserError(INSTALL)
        state.mkdir(exist_ok=True)
        lock = state / "specsplit.lock"
        self._lock = lock.open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            raise UserError(
                f"Another run of the workflow, process {self._lock.read().strip()}, works in this folder: wait for it, "
                "or end it"
            ) from None
        except OSError:
            pass  # a file system without locks
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        if not dated.exists():
            dated.parent.mkdir(parents=True, exist_ok=True)
            dated.touch()
            os.utime(dated, (LONG_AGO, LONG_AGO))
        start_heartbeat(lock.absolute())
        hold_lease(lock)
        remember_workflow(cores, config_files)
        logging.getLogger("snakemake.logging").addHandler(self._failed)

    def last_words(self) -> str:
        """The end of the log of each job that failed, for the end of the terminal."""
        return "\n".join(f"Rule {name} failed; {_end_of(logs)}" for name, logs in self._failed.jobs)


class FailedJobs(logging.Handler):
    """Keeps rule and logs of each job of which Snakemake says that it failed."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[tuple[str, list[str]]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "event", None) == "job_error":
            told: dict[str, Any] = record.__dict__
            job = told["rule_name"], [str(path) for path in told["log"]]
            if job not in self.jobs:
                self.jobs.append(job)


def _end_of(logs: Sequence[str]) -> str:
    for path in map(Path, logs):
        if path.is_file() and (text := path.read_text(encoding="utf-8", errors="replace").strip()):
            return f"{path} ends with\n" + "\n".join(f"    {line}" for line in text.splitlines()[-LAST_LINES:])
    return "its log is empty"
