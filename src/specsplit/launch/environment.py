"""The variables that make a process deterministic, set before Python starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from specsplit.errors import UserError

# Without the working directory on sys.path (-P), where a file of the user's could stand for a module.
COMMAND = (sys.executable, "-P", "-m", "specsplit")
REQUIRED = {
    "PYTHONHASHSEED": "0",  # order of sets and dicts of strings
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic cuBLAS
}
CGROUP_MOUNT, CGROUPS_OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
DETERMINISM_VARIABLES = (*REQUIRED, "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def deterministic_environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """A copy of the environment with the required variables set and tokenizers' fork warning off."""
    return {**(os.environ if base is None else base), **REQUIRED, "TOKENIZERS_PARALLELISM": "false"}


def ensure_deterministic_environment() -> None:
    """Start this very command again with the required variables when they are not set.

    Python reads PYTHONHASHSEED only at its start, so setting it later would record something untrue.
    """
    if all(os.environ.get(name) == value for name, value in REQUIRED.items()):
        return
    os.execve(sys.executable, [*COMMAND, *sys.argv[1:]], deterministic_environment())


def usable_cores() -> int:
    """Cores that this process may use all the time: by its affinity and by the quotas of its control groups.

    A quota of 1.5 cores is one: a second thread would be stopped for half of the time, and the first wait for it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(int, _quotas())]))


def _quotas() -> Iterator[float]:
    """Cores that each control group around this process allows, of version 2 (cpu.max) and 1 (cpu.cfs_quota_us)."""
    try:
        groups = [line.split(":", 2) for line in CGROUPS_OF_PROCESS.read_text().splitlines()]
    except OSError:  # not Linux
        return
    for _, controllers, path in groups:
        if controllers == "":
            top, names = CGROUP_MOUNT, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            top, names = CGROUP_MOUNT / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        inner = PurePosixPath(path.lstrip("/"))
        # In a container the path may be that of the host: only the top is there.
        for group in (inner, *inner.parents):
            try:
                quota, period = " ".join((top / group / name).read_text() for name in names).split()
                cores = int(quota) / int(period)
            except (OSError, ValueError):  # no such group, or "max"
                continue
            if cores > 0:  # version 1 says -1 for no quota
                yield cores


def threads_beside_another() -> int:
    """Compute threads of a worker that computes while another one on this machine does.

    Half of the cores: threads that share cores wait for each other at the end of every operation.
    """
    return max(1, usable_cores() // 2)


def own_gpu(role: str, gpus: int, visible: str | None) -> str | None:
    """CUDA_VISIBLE_DEVICES of the `role` worker of a run that has `gpus` GPUs; None = leave it as it is.

    gpus: 0 leaves it alone, 1 is shared by both workers, of 2 the target has the first and the draft the second.
    visible: the variable as a scheduler or the user set it; None = not set, so that the GPUs count from 0.
    Raises UserError when fewer are visible.
    """
    if gpus == 0:
        return None
    devices = [str(number) for number in range(gpus)] if visible is None else [d for d in visible.split(",") if d]
    if len(devices) < gpus:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible} shows {len(devices)} GPUs where the run takes {gpus} (resource gpu, "
            "workers.gpus): ask for fewer, or show it more"
        )
    return devices[1] if role == "draft" and gpus > 1 else devices[0]
