"""The model of a worker, shared by its sessions.

Whoever finds the model free runs, in one pass, what all sessions are waiting for (continuous batching): the
verifications of several clients read the weights once. A moment after a pass is waited for the sessions that were in
it, which are back as soon as their clients have the reply; else the clients of a worker fall into two groups that take
turns, each with half a batch.
"""

from __future__ import annotations

import platform
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch

from specsplit.decoding.tree import TokenTree
from specsplit.engines.passes import EMPTY, Pass
from specsplit.worker.refusals import Abandoned, Stopped

if TYPE_CHECKING:
    from specsplit.engines.loading import LanguageModel

PATIENCE = 0.15  # of the time of a pass is waited for sessions to be back
LONGEST_DOUBT = 32  # passes without waiting, after waiting was in vain again and again


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


@dataclass
class Stopwatch:
    """Milliseconds of one request: waiting for the model, and all of its work without that.

    gone: whether nobody waits for the request any more; asked before every pass.
    """

    queue_ms: float = 0.0
    compute_ms: float = 0.0
    gone: Callable[[], bool] = lambda: False


@dataclass
class _Job:
    what: Pass
    logits: torch.Tensor | None = None
    error: BaseException | None = None
    began: float = 0.0
    done: bool = False


class SharedModel:
    """A model that any thread may step; the passes of several that wait are run as one where the model can do that.

    threads: compute threads of a pass. seed: of torch.
    """

    def __init__(self, model: LanguageModel, threads: int, seed: int) -> None:
        self.model = model
        self.threads = threads
        self.new_cache = model.new_cache
        self._waiting: deque[_Job] = deque()
        self._running = False  # whether one of the waiting threads runs passes, for all of them
        self._lock = threading.Lock()
        self._over = threading.Condition(self._lock)  # a pass, for those whose work was in it
        self._arrived = threading.Condition(self._lock)  # work, for the thread that gathers it
        self._sessions: tuple[set[int], set[int]] = (set(), set())  # in the last pass and the one before, by cache
        self._until = 0.0  # when nobody is waited for any longer, by time.perf_counter()
        self._doubt = self._skipped = 0  # passes before which nobody is waited for, and how many of them are over
        self._closed = False
        self._clock = threading.local()
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        # PyTorch keeps a team of threads for every thread that calls it, so its models are called from one only.
        self._thread = ModelThread(threads) if model.uses_torch_threads else None
        if self._thread is None:
            torch.set_num_threads(1)  # what else is computed is too little to share

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def max_context(self) -> int:
        return self.model.max_context

    @property
    def waiting(self) -> int:
        """Passes that wait for the model."""
        return len(self._waiting)

    @contextmanager
    def timed(self, gone: Callable[[], bool] = lambda: False) -> Iterator[Stopwatch]:
        """Times what this thread does; the numbers are there at the end.

        gone: once it says that nobody waits for the answer, the next pass raises Abandoned instead of being run.
        """
        watch = self._clock.watch = Stopwatch(gone=gone)
        started = time.perf_counter()
        try:
            yield watch
        finally:
            watch.compute_ms = (time.perf_counter() - started) * 1e3 - watch.queue_ms
            self._clock.watch = Stopwatch()

    def step(self, cache: Any, tokens: Sequence[int], tree: TokenTree = EMPTY, cached_nodes: int = 0) -> torch.Tensor:
        """One pass, as CausalLM.step; waits for the model. A long prompt is fed in parts, so that others get turns.

        Raises Stopped when the model is closed before it came to that, Abandoned when nobody waits any more (`timed`).
        """
        held, most = cache.length, self.model.batch_tokens or len(tokens)
        try:
            while len(tokens) > most:
                self._pass(Pass(cache, tokens[:most]))
                tokens = tokens[most:]
            return self._pass(Pass(cache, tokens, tree, cached_nodes))
        except BaseException:
            cache.rollback(held)
            raise

    def close(self) -> None:
        """Take no more work and drop what waits. A pass that runs cannot be interrupted."""
        self._closed = True

    def _pass(self, what: Pass) -> torch.Tensor:
        watch: Stopwatch = getattr(self._clock, "watch", None) or Stopwatch()
        if watch.gone():
            raise Abandoned("the client is gone")
        job, arrived = _Job(what), time.perf_counter()
        with self._lock:
            self._waiting.append(job)
            self._arrived.notify()
        while not job.done:
            with self._lock:
                while self._running and not job.done:
                    self._over.wait()
                if job.done:
                    break
                self._running = True
                self._gather()
            try:
                self._run_waiting()
            finally:
                with self._lock:
                    self._running = False
                    self._over.notify_all()
        watch.queue_ms += (job.began - arrived) * 1e3
        if job.error is not None:
            raise job.error
        assert job.logits is not None
        return job.logits

    def _gather(self) -> None:
        """Wait for the sessions of the last passes, if they are likely to be back in a moment."""
        expected, before = len(self._sessions[0] | self._sessions[1]), len(self._waiting)
        if before >= expected or time.perf_counter() > self._until:
            return
        if self._skipped < self._doubt:
            self._skipped += 1
            return
        while len(self._waiting) < expected and (left := self._until - time.perf_counter()) > 0:
            self._arrived.wait(left)
        in_vain = len(self._waiting) == before
        self._doubt = min(2 * self._doubt + 1, LONGEST_DOUBT) if in_vain else 0
        self._skipped = 0

    def _run_waiting(self) -> None:
        """The passes that came first, as many as fit into one."""
        jobs = [self._waiting.popleft()]
        room = self.model.batch_tokens - jobs[0].what.size
        while self._waiting and self._waiting[0].what.size <= room:
            jobs.append(self._waiting.popleft())
            room -= jobs[-1].what.size
        began = time.perf_counter()
        for job in jobs:
            job.began = began
        try:
            if self._closed:
                raise Stopped("this worker is stopping")
            for job, logits in zip(jobs, self._together([job.what for job in jobs]), strict=True):
                job.logits = logits
        except BaseException as error:
            if len(jobs) > 1 and not isinstance(error, Stopped):
                self._one_by_one(jobs)
            else:
                for job in jobs:
                    job.error = error
        ended = time.perf_counter()
        self._until = ended + PATIENCE * (ended - began)
        self._sessions = {id(job.what.cache) for job in jobs}, self._sessions[0]
        for job in jobs:
            job.done = True

    def _together(self, passes: Sequence[Pass]) -> Sequence[torch.Tensor]:
        if self._thread is not None:
            return self._thread.run(lambda: self.model.step_many(passes))
        return self.model.step_many(passes)

    def _one_by_one(self, jobs: Sequence[_Job]) -> None:
        """So that what is wrong with one pass fails that one alone."""
        for job in jobs:
            try:
                (job.logits,) = self._together([job.what])
            except BaseException as error:
                job.error = error


class ModelThread:
    """The one thread that calls PyTorch.

    Two plain queues, as a pass may take less than a ThreadPoolExecutor needs to hand it over: 0.17 ms where this takes
    0.04 on a machine whose cores had gone to sleep.
    """

    def __init__(self, threads: int) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]]] = SimpleQueue()
        threading.Thread(target=self._work, args=(threads,), name="model", daemon=True).start()

    def run(self, work: Callable[[], Any]) -> Any:
        """Run `work` and wait for it; its exceptions are raised here."""
        answer: SimpleQueue[Any] = SimpleQueue()
        self._jobs.put((work, answer))
        value, error = answer.get()
        if error is not None:
            raise error
        return value

    def _work(self, threads: int) -> None:
        torch.set_num_threads(threads)
        while True:
            work, answer = self._jobs.get()
            value = error = None
            try:
                value = work()
            except BaseException as raised:
                error = raised
            answer.put((value, error))
            del work, answer, value, error  # a traceback would keep the caller's frames
