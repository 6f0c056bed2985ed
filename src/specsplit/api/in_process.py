"""A worker in this process, called like one behind gRPC: the same handlers and messages, without sockets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from queue import SimpleQueue
from typing import Any, NoReturn

import grpc

from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.worker.servicer import WorkerServicer

Metadata = Iterable[tuple[str, str]]


class InProcessStub:
    """What the client needs of a grpc.aio stub: Describe, and StreamDrafts or StreamVerify."""

    def __init__(self, servicer: WorkerServicer) -> None:
        self._servicer = servicer
        for method in ("StreamDrafts", "StreamVerify"):
            if handler := getattr(servicer, method, None):
                setattr(self, method, partial(InProcessCall, handler))

    async def Describe(self, request: pb.DescribeRequest, **_: Any) -> pb.DescribeReply:
        return self._servicer.Describe(request, None)


class InProcessCall:
    """One call of a stream method, as grpc.aio's StreamStreamCall. The handler runs in a thread of its own."""

    in_process = True  # no message is serialized

    def __init__(self, handler: Callable[..., Iterator[Any]], metadata: Metadata = ()) -> None:
        self._handler = handler
        self._requests: SimpleQueue[Any] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._begun = asyncio.Event()
        self._context = _Context(tuple(metadata), lambda: self._loop.call_soon_threadsafe(self._begun.set))
        self._replies: asyncio.Queue[Any] = asyncio.Queue()
        threading.Thread(target=self._serve, name="call", daemon=True).start()

    async def write(self, message: Any) -> None:
        self._requests.put(message)

    async def read(self) -> Any:
        """The next reply, or grpc.aio.EOF when the handler has ended."""
        return await self._replies.get()

    async def initial_metadata(self) -> Metadata:
        """None; returns once the handler has sent it, or has ended."""
        await self._begun.wait()
        return ()

    async def done_writing(self) -> None:
        self._requests.put(None)

    def cancel(self) -> None:
        self._context.active = False
        self._requests.put(None)

    def done(self) -> bool:
        return not self._context.active

    async def code(self) -> grpc.StatusCode:
        return self._context.status

    async def details(self) -> str:
        return self._context.details

    async def trailing_metadata(self) -> Metadata:
        return self._context.trailing_metadata

    def _messages(self) -> Iterator[Any]:
        """What the client sends. As with gRPC, it breaks off with an error when the client cancels the call."""
        while (message := self._requests.get()) is not None:
            yield message
        if not self._context.active:
            raise grpc.RpcError

    def _serve(self) -> None:
        context = self._context
        try:
            for reply in self._handler(self._messages(), context):
                self._loop.call_soon_threadsafe(self._replies.put_nowait, reply)
        except _Aborted:
            pass  # the context has the status
        except Exception as error:
            context.status, context.details = grpc.StatusCode.UNKNOWN, f"{type(error).__name__}: {error}"
        context.active = False
        self._loop.call_soon_threadsafe(self._replies.put_nowait, grpc.aio.EOF)
        self._loop.call_soon_threadsafe(self._begun.set)


class _Aborted(Exception):
    """The handler ended the call with a status."""


class _Context:
    """What the handlers use of grpc.ServicerContext."""

    def __init__(self, metadata: Metadata, begun: Callable[[], object]) -> None:
        self._begun = begun
        self.active = True
        self.status, self.details = grpc.StatusCode.OK, ""
        self.trailing_metadata: Metadata = ()
        self._metadata = metadata

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    def is_active(self) -> bool:
        return self.active

    def peer(self) -> str:
        return "in-process"

    def send_initial_metadata(self, _: Metadata) -> None:
        self._begun()

    def cancel(self) -> None:
        self.active = False

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        self.trailing_metadata = metadata

    def abort(self, status: grpc.StatusCode, details: str) -> NoReturn:
        self.status, self.details = status, details
        raise _Aborted
