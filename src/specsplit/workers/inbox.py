"""The messages of a stream, read as they come, so that a handler can see that a newer one waits."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc


class Inbox:
    """Reads `requests` on a thread of its own until the client has sent all or is gone.

    Iterating gives (message, time.perf_counter() of its arrival). session_ids: noted by the handler.
    """

    def __init__(self, requests: Iterator[Any]) -> None:
        self.session_ids: set[str] = set()
        self._messages: queue.SimpleQueue[tuple[Any, float] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(requests,), name="stream", daemon=True).start()

    def _read(self, requests: Iterator[Any]) -> None:
        with suppress(grpc.RpcError):  # the client is gone
            for message in requests:
                self._messages.put((message, time.perf_counter()))
        self._messages.put(None)

    def __iter__(self) -> Iterator[tuple[Any, float]]:
        while (item := self._messages.get()) is not None:
            yield item

    def waiting(self) -> bool:
        """Whether something has come that was not taken yet, the end included."""
        return not self._messages.empty()
