"""The client's side of one stream to a worker, with the network in between simulated when that is asked for."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc

from specsplit.client.network import Links, until
from specsplit.client.recovery import WorkerFailed, failure_of


class Spent(defaultdict[str, Any]):
    """What was spent on a text since it was last taken, by the names that a Round has for it.

    Bytes are those of serialized messages. Within one process none is serialized, so none is counted.
    """

    def __init__(self) -> None:
        super().__init__(int)

    def take(self) -> dict[str, Any]:
        """All of it, and begin anew."""
        taken = dict(self)
        self.clear()
        return taken


class Stream:
    """Messages to and from one worker, in order.

    rpc: a stream method of a grpc.aio stub. timeout_s: the longest wait for a message. links: a simulated network; a
    late message holds up none that goes the other way. spent: where bytes are counted.
    """

    def __init__(
        self, name: str, rpc: Callable[[], Any], *, timeout_s: float, spent: Spent, links: Links | None = None
    ) -> None:
        self.name = name
        self._call = rpc()
        self._timeout_s = timeout_s
        self._links = links
        self._spent = None if getattr(self._call, "in_process", False) else spent
        self._inbox: asyncio.Queue[tuple[float, Any]] = asyncio.Queue()
        self._outbox: asyncio.Queue[tuple[float, Any]] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._read())]
        if links:
            self._tasks.append(asyncio.create_task(self._write()))

    async def send(self, message: Any) -> None:
        """Send a message; that it could not be sent is told by `receive`."""
        if self._links:
            self._outbox.put_nowait((self._links[0].due(message, time.perf_counter()), message))
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
        await until(due)
        if isinstance(message, WorkerFailed):
            # Whoever asks next has to learn of it too: this one may have been cancelled meanwhile.
            self._inbox.put_nowait((0.0, message))
            raise message
        return message

    async def admitted(self) -> bool:
        """Wait until the worker has a session for this stream, which it says by its initial metadata, at the latest
        with its first message. False when the stream has ended instead."""
        with suppress(grpc.aio.AioRpcError):
            await self._call.initial_metadata()
        return not self._call.done()

    async def finish(self) -> None:
        """Tell the worker that nothing more is sent."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._call.done_writing()

    def end(self) -> None:
        """End the stream, and with it the worker's session. Waits for nothing, so nothing can come between."""
        self._call.cancel()
        for task in self._tasks:
            task.cancel()

    async def ended(self) -> None:
        """Wait until nothing runs any more of a stream that was ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _read(self) -> None:
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                if self._spent is not None:
                    self._spent[f"{self.name}_received_bytes"] += message.ByteSize()
                due = self._links[1].due(message, time.perf_counter()) if self._links else 0.0
                self._inbox.put_nowait((due, message))
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
            await until(due)
            await self._put(message)

    async def _put(self, message: Any) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the reader has the reason
            await self._call.write(message)
            if self._spent is not None:
                self._spent[f"{self.name}_sent_bytes"] += message.ByteSize()
