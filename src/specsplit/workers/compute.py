"""One thread that runs the model.

Torch keeps a team of worker threads for every thread that calls it, so all passes of a process come from this one.
"""

from __future__ import annotations

import platform
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch

from specsplit.workers.environment import usable_cores

T = TypeVar("T")


def describe_runtime(device: Any, seed: int) -> dict[str, str]:
    """What beside the model decides what this process computes, for Describe. device: PyTorch's, of the model."""
    cuda = torch.device(device).type == "cuda"
    algorithms = "warn only" if torch.is_deterministic_algorithms_warn_only_enabled() else "enforced"
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "gpu": torch.cuda.get_device_name(device) if cuda else "None",
        "seed": str(seed),
        "deterministic_algorithms": algorithms if torch.are_deterministic_algorithms_enabled() else "off",
        "cudnn_deterministic": str(torch.backends.cudnn.deterministic),
        "cudnn_benchmark": str(torch.backends.cudnn.benchmark),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


@dataclass(frozen=True)
class Computed(Generic[T]):
    """What a computation returned, and its milliseconds in the queue and in the model."""

    value: T
    queue_ms: float
    compute_ms: float


class ModelThread:
    """Runs one computation at a time, in the order of arrival.

    Two plain queues, as a pass may take less than a ThreadPoolExecutor needs to hand it over: 0.17 ms where this takes
    0.04 on a machine whose cores had gone to sleep.
    """

    def __init__(self, threads: int | None, seed: int) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)  # of the whole process
        self.threads = threads or usable_cores()
        self._closed = False
        self._entry = threading.Lock()  # nothing is queued behind the end
        self._running = threading.Lock()
        self._jobs: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]] | None] = SimpleQueue()
        threading.Thread(target=self._work, args=(seed,), name="model", daemon=True).start()

    def run(self, work: Callable[[], T]) -> Computed[T]:
        """Run `work` on the model thread and wait for it; its exceptions are raised here.

        Raises CancelledError when the thread was closed before it came to that.
        """
        arrived = time.perf_counter()
        answer: SimpleQueue[Any] = SimpleQueue()
        with self._entry:
            if self._closed:
                raise CancelledError("the model is closed")
            self._jobs.put((work, answer))
        value, error, started, finished = answer.get()
        if error is not None:
            raise error
        return Computed(value, (started - arrived) * 1e3, (finished - started) * 1e3)

    def close(self) -> bool:
        """Take no more work and drop what waits; False when a computation still runs, which cannot be interrupted."""
        with self._entry:
            self._closed = True
            self._jobs.put(None)
        return not self._running.locked()

    def _work(self, seed: int) -> None:
        torch.set_num_threads(self.threads)
        torch.manual_seed(seed)
        while (job := self._jobs.get()) is not None:
            work, answer = job
            value, started = None, time.perf_counter()
            error: BaseException | None = None
            if self._closed:
                error = CancelledError("the model is closed")
            else:
                try:
                    with self._running:
                        value = work()
                except BaseException as raised:
                    error = raised
            answer.put((value, error, started, time.perf_counter()))
            del job, work, answer, value, error  # a traceback would keep the caller's frames
