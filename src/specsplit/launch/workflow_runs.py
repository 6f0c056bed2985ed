"""Which runs of the workflow are alive, so that a killed one does not block the next.

A killed Snakemake leaves its lock on the folder and the endpoint files of its workers. Each run registers its process;
when no registered run is alive, the leftovers of dead ones are removed. A run touches its file as long as it lives, so
that runs on other hosts that share the folder know.
"""

from __future__ import annotations

import atexit
import os
import socket
from dataclasses import asdict
from pathlib import Path

from specsplit.errors import UserError
from specsplit.io import read_json_object, write_json
from specsplit.launch.endpoint import remove_stale
from specsplit.launch.heartbeat import silent, start_heartbeat
from specsplit.launch.lease import LEASE_PID, ProcessIdentity, hold_lease


def begin_run(state: Path = Path(".snakemake"), workers: Path = Path("results/workers")) -> None:
    """Register this process as a run of the workflow and clear what dead runs left behind.

    Called when the Snakefile is read; jobs read it too, and do nothing here. Sets SPECSPLIT_LEASE_PID, so that
    jobs and workers end with this process.
    """
    if LEASE_PID in os.environ:
        return
    remove_stale(workers)
    me = ProcessIdentity.of(os.getpid())
    host = socket.gethostname()
    mine = state / "specsplit-runs" / f"{host}-{os.getpid()}.json"
    died = mine.exists()  # an earlier process with our number
    # Before looking at the others: of two runs that begin at once each must see the other.
    write_json(mine, {"host": host, "heartbeat": True, **(asdict(me) if me else {})})
    start_heartbeat(mine.absolute())
    hold_lease(mine)
    atexit.register(mine.absolute().unlink, missing_ok=True)
    others = [path for path in mine.parent.glob("*.json") if path != mine]
    dead = [path for path in others if _alive(path) is False]
    dead += silent({path for path in others if _alive(path) is None})
    for path in dead:
        path.unlink(missing_ok=True)
    if (dead or died) and len(dead) == len(others):
        for lock in (state / "locks").glob("*.lock"):
            lock.unlink(missing_ok=True)


def _alive(path: Path) -> bool | None:
    """None: on another host, and its heartbeat tells. One without a heartbeat counts as alive: it cannot be seen."""
    try:
        run = read_json_object(path)
        if run["host"] != socket.gethostname():
            return None if run.get("heartbeat") else True
        return ProcessIdentity(run["pid"], run["started"], run.get("birth", "")).alive()
    except (UserError, KeyError, TypeError):
        return False
