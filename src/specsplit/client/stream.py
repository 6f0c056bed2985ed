"""The client's side of one stream to a worker, with the network in between simulated when that is asked for."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc

from specsplit.client.recovery import WorkerFailed, failure_of

SPIN_S = 0.001  # an event loop sleeps in whole milliseconds, which is too coarse for a simulated network


class Stream:
    """Messages to and from one worker, in order.

    rpc: a stream method of a grpc.aio stub. rtt_ms, jitter_ms: each message is late by half of rtt_ms and by up to
    jitter_ms more, drawn from `seed`; a late message holds up none that goes the other way. timeout_s: the longest
    wait for a message.
    """

    def __init__(
        self,
        name: str,
        rpc: Callable[[], Any],
        *,
        timeout_s: float,
        rtt_ms: float = 0.0,
        jitter_ms: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.name = name
        self._call = rpc()
        self._timeout_s = timeout_s
        self._delay_s = rtt_ms / 2e3
        self._jitter_s = jitter_ms / 1e3
        self._random = random.Random(seed)
        self._inbox: asyncio.Queue[tuple[float, Any]] = asyncio.Queue()
        self._outbox: asyncio.Queue[tuple[float, Any]] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._read())]
        if self._delay_s or self._jitter_s:
            self._tasks.append(asyncio.create_task(self._write()))

    async def send(self, message: Any) -> None:
        """Send a message; that it could not be sent is told by `receive`."""
        if self._delay_s or self._jitter_s:
            self._outbox.put_nowait((self._due(), message))
        else:
            await self._put(message)

    async def receive(self) -> Any:
        """The next message. Raises WorkerFailed when the stream has ended or nothing came in time."""
        try:
            async with asyncio.timeout(self._timeout_s):
                due, message = await self._inbox.get()
        except TimeoutError:
            late = f"no answer within {self._timeout_s:g} s"
            raise WorkerFailed(self.name, grpc.StatusCode.DEADLINE_EXCEEDED.name, late, "wait") from None
        await _until(due)
        if isinstance(message, WorkerFailed):
            # Whoever asks next has to learn of it too: this one may have been cancelled meanwhile.
            self._inbox.put_nowait((0.0, message))
            raise message
        return message

    async def admitted(self) -> None:
        """Wait until the worker has a session for this stream, which it says by its initial metadata; at the latest
        with its first message, or its end."""
        with suppress(grpc.aio.AioRpcError):
            await self._call.initial_metadata()

    async def finish(self) -> None:
        """Tell the worker that nothing more is sent."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._call.done_writing()

    async def close(self) -> None:
        """End the stream, and with it the worker's session."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._call.cancel()

    async def _read(self) -> None:
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self._inbox.put_nowait((self._due(), message))
        except grpc.aio.AioRpcError:
            pass  # the status of the call says more than this error, which may be that a read was cut off
        code, details = await self._call.code(), await self._call.details()
        if code == grpc.StatusCode.OK:
            code, details = grpc.StatusCode.UNAVAILABLE, "the worker closed the stream"
        failed = failure_of(self.name, code, details, await self._call.trailing_metadata())
        self._inbox.put_nowait((0.0, failed))

    async def _write(self) -> None:
        while True:
            due, message = await self._outbox.get()
            await _until(due)
            await self._put(message)

    async def _put(self, message: Any) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the reader has the reason
            await self._call.write(message)

    def _due(self) -> float:
        if not (self._delay_s or self._jitter_s):
            return 0.0
        return time.perf_counter() + self._delay_s + self._random.random() * self._jitter_s


async def _until(due: float) -> None:
    """Wait for a time of time.perf_counter(), to a fraction of a millisecond."""
    while (left := due - time.perf_counter()) > 0:
        await asyncio.sleep(left - SPIN_S if left > 2 * SPIN_S else 0)
