"""The event loop of the client: it runs in a thread of its own, so code with and without asyncio can use it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")
CANCEL_S = 5.0  # the longest wait for work that was cancelled to close its streams


class EventLoop:
    """An event loop in a daemon thread, for as long as the process lives."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._serve, name="client", daemon=True).start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine there. Cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for it. When the wait is interrupted, as by Ctrl-C, the work is cancelled."""
        over = threading.Event()

        async def settled() -> T:
            try:
                return await work
            finally:
                over.set()

        future = self.submit(settled())
        try:
            return future.result()
        except BaseException:
            if not over.is_set():
                future.cancel()
                over.wait(CANCEL_S)
            raise

    def _serve(self) -> None:
        while True:
            # Raised by a callback of the caller, who gets it from the future; the loop goes on for the others.
            with suppress(KeyboardInterrupt, SystemExit):
                self._loop.run_forever()


def event_loop() -> EventLoop:
    """The one loop of this process: grpc.aio wants all of its channels on one."""
    with _making:  # of two threads that ask first, one makes it
        return _made()


_making = threading.Lock()
_made = cache(EventLoop)
