"""The variables that make a process deterministic, set before Python starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from specsplit.errors import UserError

# Without the working directory on sys.path (-P), where a file of the user's could stand for a module.
COMMAND = (sys.executable, "-P", "-m", "specsplit")
REQUIRED = {
    "PYTHONHASHSEED": "0",  # order of sets and dicts of strings
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic cuBLAS
}
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
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_beside_another() -> int:
    """Compute threads of a worker that computes while another one on this machine does.

    Half of the cores: threads that share cores wait for each other at the end of every operation, actively, which makes
    a pass several times slower.
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
