"""What runs a compiled pass: a team of threads, and the arrays that it works in."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np

from specsplit.decoding.growth import CANDIDATES
from specsplit.engines.linears import padded
from specsplit.engines.numba_kernels import (
    FAILED,
    LANES,
    LEAVING,
    NANOSECONDS,
    TOKEN_NUMBERS,
    follow_passes,
    run_pass,
    start_others,
)
from specsplit.engines.state_slots import MOST_TAPS
from specsplit.engines.vector_kernels import QUERIES

LONGEST_SLEEP_NS = 20_000_000  # at a meeting, before a thread looks whether another one failed
Job = Callable[..., None]


class Team:
    """Threads that do a job together, the calling one among them. To be used from one thread at a time.

    job(thread, threads, sync, *arguments): does a part of it; in thread 0 it calls `start_others` first, and the last
    thing that it does is to meet the others. follow: does the same over and over in the others, as `follow_passes`. So
    long as the arguments are the same, the others stay in compiled code: waking them takes neither Python nor its lock.

    A job that raises in one thread ends in all: nobody waits for it any more at a meeting, and `run` raises its error.
    """

    def __init__(self, threads: int, job: Job = run_pass, follow: Job = follow_passes) -> None:
        self.threads = threads
        self._job = job
        self._sync = np.zeros(16, np.int64)
        self._errors: list[BaseException] = []
        self._arguments: Sequence[Any] | None = None  # that the others have
        self._left: SimpleQueue[None] = SimpleQueue()
        self._orders: list[SimpleQueue[Sequence[Any] | None]] = [SimpleQueue() for _ in range(threads - 1)]
        for number, orders in enumerate(self._orders, 1):
            what = (follow, (number, threads, self._sync), orders, self._left, self._errors)
            threading.Thread(target=_follow, args=what, name=f"pass-{number}", daemon=True).start()
        weakref.finalize(self, _dismiss, self._sync, self._orders)  # its threads hold what they work with

    def run(self, arguments: Sequence[Any]) -> None:
        """Do the job in every thread."""
        if arguments is not self._arguments:
            self._gather()
            for orders in self._orders:
                orders.put(arguments)
            self._arguments = arguments
        try:
            self._job(0, self.threads, self._sync, *arguments)
        except BaseException as error:
            self._errors.append(error)
            self._sync[FAILED] = 1
        if self._errors:
            self._gather()
            first = self._errors[0]
            self._errors.clear()
            raise first

    def _gather(self) -> None:
        """Have the other threads leave their arguments, and start anew."""
        if self._arguments is not None:
            self._sync[LEAVING] = 1
            start_others(self._sync, self.threads)
            for _ in self._orders:
                self._left.get()
        self._sync[:] = 0
        self._sync[NANOSECONDS] = LONGEST_SLEEP_NS
        self._arguments = None


def _follow(
    follow: Job,
    place: tuple[int, int, np.ndarray],
    orders: SimpleQueue[Sequence[Any] | None],
    left: SimpleQueue[None],
    errors: list[BaseException],
) -> None:
    """What another thread does until it gets None instead of arguments. It does not hold its team."""
    while (arguments := orders.get()) is not None:
        try:
            follow(*place, *arguments)
        except BaseException as error:
            errors.append(error)
            place[2][FAILED] = 1
        del arguments
        left.put(None)


def _dismiss(sync: np.ndarray, orders: Sequence[SimpleQueue[Any]]) -> None:
    sync[LEAVING] = 1
    start_others(sync, len(orders) + 1)
    for each in orders:
        each.put(None)


@dataclass(frozen=True)
class Sizes:
    """Of a model. hidden: numbers of a token between layers; inner: in the middle of the MLP; joined: of embedding and
    state, which a head attends over."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    layers: int
    vocab: int
    joined: int = 0


class Workspace:
    """Arrays that the kernel works in, as large as was ever needed. Zero at first, as padding is read.

    request, x, logits, best_tokens, best_values, kept: what goes in and comes out, as run_pass has them. arguments: all
    arrays, in its order.
    """

    def __init__(self, sizes: Sizes, threads: int, tokens: int, visible: int, numbers: int) -> None:
        self._sizes, self._threads, self._tokens, self._visible = sizes, threads, tokens, visible
        attended, inner = sizes.heads * sizes.head_dim, padded(sizes.inner)
        inputs = max(padded(sizes.hidden), padded(attended), padded(sizes.joined))
        self.request = np.zeros(numbers, np.int64)
        self.kept = np.zeros((MOST_TAPS, sizes.layers + 1, tokens), np.int64)
        self.x = np.zeros((tokens, sizes.hidden), np.float32)
        self.joined = np.zeros((tokens, sizes.joined), np.float32)
        self.logits = np.empty((tokens, sizes.vocab), np.float32)  # the system commits the rows that are used
        self.best_tokens = np.zeros((tokens, CANDIDATES), np.int64)
        self.best_values = np.zeros((tokens, CANDIDATES), np.float32)
        gate, up = np.zeros((2, tokens, inner), np.float32)
        self.arguments = (
            *(self.request, self.kept),
            np.zeros((TOKEN_NUMBERS, tokens + 1), np.int64),
            np.empty(tokens * visible, np.int64),  # slots
            np.zeros((tokens * sizes.heads // sizes.kv_heads, 3), np.int64),  # tiles
            np.zeros((3, tokens), np.int64),  # rows
            *(self.x, self.joined),
            np.zeros((threads, tokens * inputs), np.float32),  # packed
            np.zeros((threads, padded(sizes.hidden)), np.float32),  # row
            np.zeros((tokens, attended + 2 * sizes.kv_heads * sizes.head_dim), np.float32),  # projected
            np.zeros((tokens, attended), np.float32),  # attended
            *(gate, up),
            np.zeros(tokens * inner, np.float32),  # gated
            np.zeros((threads, QUERIES, sizes.head_dim), np.float32),  # queries
            np.zeros((threads, QUERIES, visible), np.float32),  # scores
            np.zeros((threads, QUERIES, vectors(sizes.head_dim) * LANES), np.float32),  # out
            *(self.logits, self.best_tokens, self.best_values),
        )

    def fitting(self, tokens: int, visible: int, numbers: int) -> Workspace:
        """This one, or a larger one. visible: slots of the longest cache; numbers: of the request."""
        if tokens <= self._tokens and visible <= self._visible - LANES and numbers <= len(self.request):
            return self
        # Not a new one for every token, nor rows that lie on each other in the processor's caches.
        visible = -(-max(visible, self._visible - LANES) // 1024) * 1024 + LANES
        numbers = 2 * max(numbers, len(self.request) // 2)
        return Workspace(self._sizes, self._threads, max(tokens, self._tokens), visible, numbers)


def vectors(count: int) -> int:
    """Vectors that hold so many numbers."""
    return -(-count // LANES)
