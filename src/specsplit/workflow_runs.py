"""Which runs of the workflow are alive, so that one that was killed does not block the next.

A killed Snakemake leaves its lock on the folder, and endpoint files of workers that are gone. Each run registers its
process; when no registered run is alive, what the dead ones left is cleared.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from specsplit.workers.endpoint import remove_stale
from specsplit.workers.lease import LEASE_PID, ProcessIdentity


def begin_run(state: Path = Path(".snakemake"), workers: Path = Path("results/workers")) -> None:
    """Register this process as a run of the workflow and clear what dead runs left behind.

    Called when the Snakefile is read; jobs read it too, and do nothing here. Sets SPECSPLIT_LEASE_PID, so that
    jobs and workers end with this process.
    """
    if LEASE_PID in os.environ:
        return
    os.environ[LEASE_PID] = str(os.getpid())
    remove_stale(workers)
    runs = state / "specsplit-runs"
    runs.mkdir(parents=True, exist_ok=True)
    dead = [path for path in runs.glob("*.json") if not _alive(path)]
    alive = [path for path in runs.glob("*.json") if path not in dead]
    for path in dead:
        path.unlink(missing_ok=True)
    if dead and not alive:
        for lock in (state / "locks").glob("*.lock"):
            lock.unlink(missing_ok=True)
    me = ProcessIdentity.of(os.getpid())
    if me is not None:
        (runs / f"{me.pid}.json").write_text(json.dumps(asdict(me)), encoding="utf-8")


def _alive(path: Path) -> bool:
    try:
        return ProcessIdentity(**json.loads(path.read_text(encoding="utf-8"))).alive()
    except (OSError, ValueError, TypeError):
        return False
