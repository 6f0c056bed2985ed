"""One thread that runs the model.

Torch keeps a team of worker threads for every thread that calls it, so all passes of a process come from this one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Computed(Generic[T]):
    """What a computation returned, and its milliseconds in the queue and in the model."""

    value: T
    queue_ms: float
    compute_ms: float


class ModelThread:
    """Runs one computation at a time, in the order of arrival."""

    def __init__(self, threads: int | None, seed: int) -> None:
        self.threads = threads or usable_cores()
        self._running = threading.Lock()
        self._executor = ThreadPoolExecutor(1, "model", self._prepare, (self.threads, seed))

    @staticmethod
    def _prepare(threads: int, seed: int) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)

    def run(self, work: Callable[[], T]) -> Computed[T]:
        """Run `work` on the model thread and wait for it; its exceptions are raised here."""
        arrived = time.perf_counter()

        def timed() -> tuple[T, float, float]:
            started = time.perf_counter()
            with self._running:
                value = work()
            return value, started, time.perf_counter()

        value, started, finished = self._executor.submit(timed).result()
        return Computed(value, (started - arrived) * 1e3, (finished - started) * 1e3)

    def close(self) -> bool:
        """Take no more work and drop what waits; False when a computation still runs, which cannot be interrupted."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        return not self._running.locked()


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
