"""The variables that make a process deterministic, set before Python starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

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
