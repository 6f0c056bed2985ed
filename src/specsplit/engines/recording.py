"""Passes as CUDA graphs: compiled and recorded, else recorded, else run as they are, with the reason in the log.

What is recorded keeps to the rules of capture: it reads and writes tensors that stay where they are, waits for nothing,
copies nothing from or to the host and does not branch on a value. It must give the same when it is run again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from specsplit.errors import is_out_of_memory, told

log = logging.getLogger(__name__)
Run = Callable[[], None]
Function = TypeVar("Function", bound=Callable[..., Any])
SHAPES = 1024  # of one function that may be compiled; each is a deliberate one, made before the first request
_RECORDING = threading.Lock()  # two models of one process record one after the other


class Recorder:
    """Records the passes of one model.

    compiles: whether functions are compiled by torch.compile (by default on a GPU).
    """

    def __init__(self, device: torch.device, compiles: bool | None = None) -> None:
        self.device = device
        self.records = device.type == "cuda"
        self.compiles = self.records if compiles is None else compiles
        self._worked = False  # A pass has been recorded.
        self._pool = torch.cuda.graph_pool_handle() if self.records else None

    def compiled(self, function: Function) -> Function:
        """The function, compiled for each shape at its first call."""
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
        torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, SHAPES)
        return torch.compile(function, dynamic=False, fullgraph=True)  # type: ignore[return-value]

    def recorded(self, run: Run, compiled: Run | None = None) -> Run:
        """A function that does what `run` does. compiled: the same with functions of `compiled`, which is taken if it
        works. Either may be run here, several times."""
        with _RECORDING, _one_state(self.records):
            if compiled is not None and self.compiles:
                try:
                    self._once(compiled)
                    run = compiled
                except Exception as error:  # a compiler may raise any error
                    self._give_up("compiled", error)
                    self.compiles = False
            if self.records:
                try:
                    run = self._captured(run)
                    self._worked = True
                except Exception as error:  # as of an operation that waits for the device
                    self._give_up("recorded as CUDA graphs", error)
                    self.records = self._worked  # a kind of pass may fail alone, but not the first
        return run

    def _give_up(self, how: str, error: Exception) -> None:
        if is_out_of_memory(error):
            raise error
        log.warning("a pass is not %s, and so slower: %s", how, told(error))

    def _once(self, run: Run) -> None:
        """Run on a stream of its own, as before a capture: libraries make their handles and workspaces at first use."""
        if self.device.type != "cuda":
            run()
            return
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def _captured(self, run: Run) -> Run:
        self._once(run)
        graph = torch.cuda.CUDAGraph()
        # Threads of other sessions may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        return graph.replay


@contextmanager
def _one_state(recording: bool) -> Iterator[None]:
    """Record in one state of PyTorch, whatever the thread: in another one, compiled functions would be compiled again.

    Without deterministic mode, which adds sorting before writes to indices and the filling of fresh memory: no recorded
    pass adds up what it writes to one place, so it gives the same results every time without them.
    """
    if not recording:
        yield
        return
    threads, enabled = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
