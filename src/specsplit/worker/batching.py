"""One thread runs the model. Each pass serves every session that is waiting (continuous batching).

Handlers put requests into a queue and wait. The thread takes the earliest ones, as many as fit into one pass, so that
the sessions of several clients share one reading of the weights.
"""

from __future__ import annotations

import platform
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import torch

from specsplit.decoding.sampling import Sampling
from specsplit.decoding.tree import TokenTree
from specsplit.decoding.verification import Verdict
from specsplit.engines.passes import EMPTY, Pass, Propose, Walk, all_or_none
from specsplit.launch.host import worker_host
from specsplit.worker.refusals import Abandoned, Stopped

if TYPE_CHECKING:
    from specsplit.engines.loading import LanguageModel

RETURN_WAIT = 0.15  # Wait for returning sessions this share of the last pass's time.
MAX_SKIPPED_WAITS = 32  # Skip the wait for at most this many passes after it repeatedly gained nothing.


def describe_runtime(device: Any, seed: int, engine: str) -> dict[str, str]:
    """What else than the model determines the results of this process, for Describe. device: of the model. engine: its
    class."""
    cuda = torch.device(device).type == "cuda"
    algorithms = "warn only" if torch.is_deterministic_algorithms_warn_only_enabled() else "enforced"
    return {
        **worker_host(),
        "host": socket.gethostname(),
        "engine": engine,
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


@dataclass
class Stopwatch:
    """Milliseconds of one request: waiting for the model, and everything else.

    gone: tells whether the client has left; asked before every pass.
    """

    queue_ms: float = 0.0
    compute_ms: float = 0.0
    gone: Callable[[], bool] = lambda: False


@dataclass
class _Request:
    """A pass that a handler waits for; `done` gets an item once there is a result or an error."""

    work: Pass
    gone: Callable[[], bool]
    is_prompt: bool = False  # a part of a long one
    arrived: float = field(default_factory=time.perf_counter)
    began: float = 0.0
    result: Any = None
    error: BaseException | None = None
    done: SimpleQueue[None] = field(default_factory=SimpleQueue)


class SharedModel:
    """A model that any thread may step, and the thread that runs it.

    threads: compute threads of a pass. seed: of torch.
    """

    def __init__(self, model: LanguageModel, threads: int, seed: int) -> None:
        self.model = model
        self.threads = threads
        self.new_cache, self.vocab_size, self.max_context = model.new_cache, model.vocab_size, model.max_context
        # Simple queues: a pass may take less time than other ways to hand it over and back.
        self._arrivals: SimpleQueue[_Request | None] = SimpleQueue()  # None: the model was closed
        self._waiting: deque[_Request] = deque()  # taken from the arrivals, by the model's thread alone
        self._recent: tuple[set[int], set[int]] = (set(), set())  # sessions of the last two passes, by cache
        self._wait_until = 0.0  # time.perf_counter() until which returning sessions are waited for
        self._skips = self._skips_left = 0  # passes that start without that wait
        self._overdue: set[int] = set()  # requests that come before the next part of a prompt
        self._closed = False
        self._lock = threading.Lock()  # no request arrives after the None of `close`
        self._clock = threading.local()
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        if not model.uses_torch_threads:
            torch.set_num_threads(1)  # what else is computed is too little to share
        threading.Thread(target=self._run, name="model", daemon=True).start()

    @property
    def waiting(self) -> int:
        """Requests that wait for the model."""
        return len(self._waiting) + self._arrivals.qsize()

    @contextmanager
    def timed(self, gone: Callable[[], bool] = lambda: False) -> Iterator[Stopwatch]:
        """Time what this thread does; the numbers are complete at the end.

        gone: once it says that the client has left, the next pass raises Abandoned instead of being run.
        """
        watch = self._clock.watch = Stopwatch(gone=gone)
        started = time.perf_counter()
        try:
            yield watch
        finally:
            watch.compute_ms = (time.perf_counter() - started) * 1e3 - watch.queue_ms
            self._clock.watch = Stopwatch()

    def decides(self, then: Walk | Propose) -> bool:
        """As Pass.then."""
        return hasattr(self.model, "decides") and self.model.decides(then)

    def verdict(self, cache: Any, tokens: Sequence[int], tree: TokenTree, sampling: Sampling) -> Verdict | None:
        """As passes.Walk; None where the engine gives logits alone."""
        then = Walk(sampling)
        found: Verdict | None = self.step(cache, tokens, tree, then=then) if self.decides(then) else None
        return found

    def step(
        self,
        cache: Any,
        tokens: Sequence[int],
        tree: TokenTree = EMPTY,
        cached_nodes: int = 0,
        then: Walk | Propose | None = None,
        states: torch.Tensor | None = None,
    ) -> Any:
        """One pass, as CausalLM.step, or what `then` says; waits for the model. A long prompt is fed in parts, between
        which others run.

        states: as Pass.states.

        Raises Stopped when the model is closed before the pass begins, Abandoned when the client has left (`timed`).
        The cache is as before then, as after any other error.
        """
        held, part = cache.length, self.model.prefill_tokens
        most = min(part, self.model.batch_tokens or part)
        is_prompt = len(tokens) > most
        work = Pass(cache, tokens, tree, cached_nodes, then, states)
        try:
            while len(work.tokens) > most:
                first, work = work.split(most)
                self._ask(first, is_prompt)
            return self._ask(work, is_prompt)
        except BaseException:
            cache.rollback(held)
            raise

    def expect_all(self) -> None:
        """Sessions will return at other times than before: wait for them again, though it gained nothing lately."""
        self._skips = self._skips_left = 0

    def close(self) -> None:
        """Refuse what waits and what comes, and end the thread. A pass that runs is finished."""
        with self._lock:
            self._closed = True
            self._arrivals.put(None)

    def _ask(self, work: Pass, is_prompt: bool) -> Any:
        watch: Stopwatch = getattr(self._clock, "watch", None) or Stopwatch()
        if work.steps:
            # So that others share the passes of its chain, which is then made pass by pass.
            work = replace(work, pause=lambda: watch.gone() or self.waiting > 0)
        request = _Request(work, watch.gone, is_prompt)
        with self._lock:
            if self._closed:
                raise _stopped()
            self._arrivals.put(request)
        request.done.get()
        watch.queue_ms += (request.began - request.arrived) * 1e3
        if request.error is not None:
            raise request.error
        return request.result

    # ---- the model's thread

    def _run(self) -> None:
        if self.model.uses_torch_threads:
            torch.set_num_threads(self.threads)  # PyTorch keeps a team of threads for every thread that calls it
        while self._collect():
            self._run_pass(self._batch())
        while not self._arrivals.empty():
            self._take()
        for request in self._waiting:
            request.began, request.error = time.perf_counter(), _stopped()
            request.done.put(None)
        self._waiting.clear()

    def _collect(self) -> bool:
        """Take all that has arrived, and wait for it when nothing waits. False when the model was closed."""
        while not self._closed and (not self._waiting or not self._arrivals.empty()):
            self._take()
        if not self._closed:
            self._await_returning()
        return not self._closed

    def _take(self, timeout_s: float | None = None) -> bool:
        """Wait for one arrival. False when none came or the model was closed."""
        try:
            request = self._arrivals.get(timeout=timeout_s)
        except Empty:
            return False
        if request is not None:
            self._waiting.append(request)
        return request is not None

    def _await_returning(self) -> None:
        """Wait briefly for the sessions of the last two passes, which return once their clients have the reply.

        Without this wait the sessions fall into two groups that take turns, each with half a batch.
        """
        expected, before = len(self._recent[0] | self._recent[1]), len(self._waiting)
        if before >= expected or time.perf_counter() > self._wait_until:
            return
        if self._skips_left:
            self._skips_left -= 1
            return
        while len(self._waiting) < expected and (left := self._wait_until - time.perf_counter()) > 0:
            if not self._take(left):
                break
        in_vain = len(self._waiting) == before
        self._skips = self._skips_left = min(2 * self._skips + 1, MAX_SKIPPED_WAITS) if in_vain else 0

    def _batch(self) -> list[_Request]:
        """The earliest requests, as many as fit into one pass.

        Those that waited while a part of a prompt ran come before the next part, so that between two tokens of a text
        there is one part at most, whatever the number of prompts.
        """
        self._waiting = deque(sorted(self._waiting, key=lambda request: id(request) not in self._overdue))
        batch = [self._waiting.popleft()]
        left = self.model.batch_tokens - batch[0].work.size
        while self._waiting and self._waiting[0].work.size <= left:
            batch.append(self._waiting.popleft())
            left -= batch[-1].work.size
        self._overdue -= {id(request) for request in batch}
        return batch

    def _run_pass(self, batch: Sequence[_Request]) -> None:
        """Run the requests of clients that are still there as one pass, and answer all."""
        began = time.perf_counter()
        running = []
        for request in batch:
            request.began = began
            if request.gone():
                request.error = Abandoned("the client is gone")
            else:
                running.append(request)
        if running:
            self._compute(running)
        ended = time.perf_counter()
        if any(request.is_prompt for request in running):
            while not self._arrivals.empty():
                self._take()
            self._overdue = {id(request) for request in self._waiting if not request.is_prompt}
        self._wait_until = ended + RETURN_WAIT * (ended - began)
        self._recent = {id(request.work.cache) for request in running}, self._recent[0]
        for request in batch:
            request.done.put(None)

    def _compute(self, batch: Sequence[_Request]) -> None:
        """One pass. When it fails it has happened for none of them, and each request gets a pass of its own, so that
        only what is wrong fails."""
        try:
            with all_or_none(request.work.cache for request in batch):
                results = self.model.step_many([request.work for request in batch])
                for request, own in zip(batch, results, strict=True):
                    request.result = own
        except BaseException as error:
            if len(batch) == 1:
                batch[0].result, batch[0].error = None, error
                return
            for request in batch:
                self._compute([request])


def _stopped() -> Stopped:
    return Stopped("this worker is stopping")
