"""What runs a compiled pass: a team of threads, and the arrays that it works in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from specsplit.engines.linears import padded
from specsplit.engines.numba_kernels import ARRIVED, FAILED, LANES, NANOSECONDS, SLEEPING
from specsplit.engines.vector_kernels import QUERIES

LONGEST_SLEEP_NS = 20_000_000  # at a meeting, before a thread looks whether another one failed
Job = Callable[[int, int, np.ndarray], None]


class Team:
    """Threads that do a job together, the calling one among them. To be used from one thread at a time.

    A job that raises in one thread ends in all: nobody waits for it any more at a meeting, and `run` raises its error.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._sync = np.zeros(16, np.int64)
        self._sync[NANOSECONDS] = LONGEST_SLEEP_NS
        self._errors: list[BaseException] = []
        self._jobs: list[SimpleQueue[Job]] = [SimpleQueue() for _ in range(threads - 1)]
        for number, jobs in enumerate(self._jobs, 1):
            threading.Thread(target=self._work, args=(number, jobs), name=f"pass-{number}", daemon=True).start()

    def run(self, job: Job) -> None:
        """Call job(number, threads, sync) in every thread. The last thing that a job does is to meet the others."""
        for jobs in self._jobs:
            jobs.put(job)
        self._do(job, 0)
        if self._errors:
            ended: SimpleQueue[None] = SimpleQueue()
            for jobs in self._jobs:
                jobs.put(lambda *_: ended.put(None))
            for _ in self._jobs:
                ended.get()
            errors, self._errors = self._errors, []
            self._sync[[ARRIVED, SLEEPING, FAILED]] = 0
            raise errors[0]

    def _do(self, job: Job, number: int) -> None:
        try:
            job(number, self.threads, self._sync)
        except BaseException as error:
            self._errors.append(error)
            self._sync[FAILED] = 1

    def _work(self, number: int, jobs: SimpleQueue[Job]) -> None:
        while True:
            self._do(jobs.get(), number)


@dataclass(frozen=True)
class Sizes:
    """Of a model. hidden: numbers of a token between layers; inner: in the middle of the MLP; joined: of embedding and
    state, which a head attends over."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    joined: int = 0


class Workspace:
    """Arrays that the kernel works in, as large as was ever needed. Zero at first, as padding is read."""

    def __init__(self, sizes: Sizes, threads: int, tokens: int, visible: int) -> None:
        self._sizes, self._threads, self._tokens, self._visible = sizes, threads, tokens, visible
        attended, inner = sizes.heads * sizes.head_dim, padded(sizes.inner)
        self._inputs = max(padded(sizes.hidden), padded(attended), padded(sizes.joined))
        self._inner = inner
        self.x = np.zeros((tokens, sizes.hidden), np.float32)
        self.joined = np.zeros((tokens, sizes.joined), np.float32)
        self._packed = np.zeros((threads, tokens * self._inputs), np.float32)
        self._row = np.zeros((threads, sizes.hidden), np.float32)
        self._projected = np.zeros((tokens, attended + 2 * sizes.kv_heads * sizes.head_dim), np.float32)
        self._attended = np.zeros((tokens, attended), np.float32)
        self._gate, self._up = np.zeros((2, tokens, inner), np.float32)
        self._gated = np.zeros(tokens * inner, np.float32)
        self._queries = np.zeros((threads, QUERIES, sizes.head_dim), np.float32)
        self._scores = np.zeros((threads, QUERIES, visible), np.float32)
        self._out = np.zeros((threads, QUERIES, vectors(sizes.head_dim) * LANES), np.float32)

    def fitting(self, tokens: int, visible: int) -> Workspace:
        """This one, or a larger one."""
        if tokens <= self._tokens and visible <= self._visible - LANES:
            return self
        # Not a new one for every token, nor rows that lie on each other in the processor's caches.
        visible = -(-max(visible, self._visible - LANES) // 1024) * 1024 + LANES
        return Workspace(self._sizes, self._threads, max(tokens, self._tokens), visible)

    def of(self, thread: int, tokens: int) -> tuple[np.ndarray, ...]:
        return (
            self.x[:tokens],
            self.joined[:tokens],
            self._packed[thread, : tokens * self._inputs],
            self._row[thread],
            self._projected[:tokens],
            self._attended[:tokens],
            self._gate[:tokens],
            self._up[:tokens],
            self._gated[: tokens * self._inner],
            self._queries[thread],
            self._scores[thread],
            self._out[thread],
        )


def vectors(count: int) -> int:
    """Vectors that hold so many numbers."""
    return -(-count // LANES)
