"""Which status is tried again: each row of the table against a server, or a proxy, that answers so."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from specsplit.client import recovery
from specsplit.client.event_loop import event_loop
from specsplit.client.pipeline import run_speculative_loop_async
from specsplit.client.result import SpeculativeResult
from specsplit.client.writer import TextWriter
from specsplit.errors import WorkerError
from specsplit.models.sources import prepare_model
from specsplit.rpc.connection import connect
from specsplit.rpc.statuses import RETRY_AFTER, RULES, meaning
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.rpc.v1 import specsplit_pb2_grpc as pb_grpc
from specsplit.settings.run import OrchestratorConfig

from grpc_fixtures import Worker, serving
from waiting import wait_until

Code = grpc.StatusCode
PROMPT = [65, 66, 67]
RST = "Received RST_STREAM with error code 2"
Row = tuple[Code, str, tuple[tuple[str, str], ...], str]

# (status, details, metadata, what is done). The next status is one line.
ROWS: list[Row] = [
    # a worker of ours
    (Code.RESOURCE_EXHAUSTED, "1 session is in use", ((RETRY_AFTER, "10"),), "wait"),
    (Code.RESOURCE_EXHAUSTED, "4 calls and streams run already", ((RETRY_AFTER, "10"),), "wait"),
    (Code.RESOURCE_EXHAUSTED, "a tree of 300 nodes is over the limit of 256", (), "none"),
    (Code.RESOURCE_EXHAUSTED, "not enough memory on this worker", (), "none"),
    (Code.UNAVAILABLE, "this worker is stopping", (), "wait"),
    (Code.UNAVAILABLE, "the model is still being loaded", (), "wait"),
    (Code.FAILED_PRECONDITION, "this worker does not know the session", (), "resend"),
    (Code.ABORTED, "round 3 is over", (), "resend"),
    (Code.NOT_FOUND, "", (), "resend"),
    (Code.INVALID_ARGUMENT, "new_tokens is empty", (), "none"),
    (Code.UNAUTHENTICATED, "this worker wants a token that it knows", (), "none"),
    (Code.INTERNAL, "ZeroDivisionError: a fault of ours", (), "none"),
    # gRPC itself
    (Code.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!", (), "wait"),
    (Code.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (9 vs. 8)", (), "none"),
    (Code.UNAVAILABLE, "Socket closed", (), "wait"),
    (Code.UNAVAILABLE, RST, (), "wait"),
    (Code.INTERNAL, RST, (), "wait"),
    (Code.UNKNOWN, "Stream removed", (), "wait"),
    (Code.INTERNAL, "Internal error from Core", (), "wait"),
    (Code.DEADLINE_EXCEEDED, "Deadline Exceeded", (), "wait"),
    (Code.CANCELLED, "CANCELLED", (), "wait"),
    (Code.UNKNOWN, "Exception calling application: x", (), "none"),
    (Code.UNIMPLEMENTED, "Method not found!", (), "none"),
    (Code.OUT_OF_RANGE, "", (), "none"),
    (Code.DATA_LOSS, "", (), "none"),
    (Code.ALREADY_EXISTS, "", (), "none"),
    # a proxy
    (Code.UNAVAILABLE, "no healthy upstream", (), "wait"),
    (Code.UNAVAILABLE, "upstream connect error or disconnect/reset before headers", (), "wait"),
    (Code.UNAVAILABLE, "local_rate_limited", (("grpc-retry-pushback-ms", "10"),), "wait"),
    (Code.RESOURCE_EXHAUSTED, "local_rate_limited", (), "wait"),
    (Code.RESOURCE_EXHAUSTED, "envoy overloaded", (), "wait"),
    (Code.RESOURCE_EXHAUSTED, "try later", (("grpc-retry-pushback-ms", "10"),), "wait"),
    (Code.RESOURCE_EXHAUSTED, "never", (("grpc-retry-pushback-ms", "-1"),), "none"),
    (Code.RESOURCE_EXHAUSTED, "a time that is none", ((RETRY_AFTER, "soon"),), "none"),
    (Code.UNKNOWN, "Received http2 header with status: 500", (), "wait"),
    (Code.PERMISSION_DENIED, "RBAC: access denied", (), "none"),
]
# What gRPC makes of the HTTP statuses of a proxy that is no gRPC server.
HTTP_ROWS = [(429, "wait"), (500, "wait"), (502, "wait"), (503, "wait"), (504, "wait")]
HTTP_ROWS += [(400, "none"), (401, "none"), (403, "none"), (404, "none")]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(recovery, "LAST_CHANCE_S", 0.1)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    folder = tmp_path_factory.mktemp("models")
    prepare_model({"source": "synthetic", "step_ms": 1.0}, "target", folder)
    with serving("target", folder) as worker:
        yield worker


def write(address: str, **settings: Any) -> SpeculativeResult:
    given = {"gamma": 0, "max_output_tokens": 8, "recovery_timeout_s": 20.0, **settings}
    with TextWriter(None, address) as writer:
        return writer.write(PROMPT, OrchestratorConfig(**given))


class AnsweringFirst(pb_grpc.TargetServiceServicer):
    """A worker whose streams end with one status before they say anything, the first `times` of them."""

    def __init__(self, worker: Worker, row: Row, times: int) -> None:
        self.row, self.left, self.streams = row, times, 0
        self._servicer = worker.servicer
        self.Describe = worker.servicer.Describe

    def StreamVerify(self, requests: Any, context: grpc.ServicerContext) -> Any:
        self.streams += 1
        if self.left:
            self.left -= 1
            code, details, metadata, _ = self.row
            context.set_trailing_metadata(metadata)
            context.abort(code, details)
        return self._servicer.StreamVerify(requests, context)


@contextmanager
def answering(servicer: AnsweringFirst) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_TargetServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0].name}-{row[1][:24]}")
def test_each_status_is_final_or_not(target: Worker, row: Row) -> None:
    expected = write(target.address).output_tokens
    servicer = AnsweringFirst(target, row, times=1000 if row[3] == "none" else 2)
    with answering(servicer) as address:
        if row[3] == "none":
            with pytest.raises(WorkerError, match="target worker failed in round 1: ") as caught:
                write(address)
            assert caught.value.code == row[0].name
            # grpc.aio may meet the end of a stream while it writes, and then does not know the status of it.
            assert servicer.streams == 1 or "Internal error from Core" in str(caught.value)
            return
        result = write(address)
    assert (result.output_tokens, servicer.streams, len(result.failures)) == (expected, 3, 1)
    assert result.failures[0].worker == "target"
    # A worker that says so again and again is given up, and named.
    servicer = AnsweringFirst(target, row, times=1000)
    failed = pytest.raises(WorkerError, match="target worker failed in round 1: ")
    with answering(servicer) as address, failed as caught:
        write(address, recovery_timeout_s=0.3)
    assert caught.value.code in (meaning(*row[:2]).code.name, "UNAVAILABLE")
    assert 2 <= servicer.streams <= 20


def test_every_rule_has_a_row() -> None:
    assert {meaning(*row[:3]).rule for row in ROWS} == set(RULES)


# ---- a proxy


@contextmanager
def http_proxy(status: int, address: str, times: int) -> Iterator[str]:
    """Answers the first `times` connections with an HTTP status; relays later ones."""
    listener = socket.create_server(("127.0.0.1", 0))
    host, _, port = address.rpartition(":")

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload

    def read(connection: socket.socket, count: int) -> bytes:
        data = b""
        while len(data) < count:
            if not (more := connection.recv(count - len(data))):
                raise OSError
            data += more
        return data

    def refuse(connection: socket.socket) -> None:
        read(connection, 24)  # the preface of HTTP/2
        connection.sendall(frame(4, 0, 0, b"") + frame(4, 1, 0, b""))
        while True:
            head = read(connection, 9)
            kind, _, stream = struct.unpack(">BBI", head[3:])
            read(connection, int.from_bytes(head[:3], "big"))
            if kind == 1:  # HEADERS: `:status` and the end of the stream
                connection.sendall(frame(1, 5, stream, b"\x08\x03" + str(status).encode()))

    def relay(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve(connection: socket.socket, number: int) -> None:
        with suppress(OSError):
            if number < times:
                refuse(connection)
            else:
                far = socket.create_connection((host, int(port)))
                threading.Thread(target=relay, args=(far, connection), daemon=True).start()
                relay(connection, far)

    def accept() -> None:
        number = 0
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=serve, args=(connection, number), daemon=True).start()
                number += 1

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


@pytest.mark.parametrize(("status", "remedy"), HTTP_ROWS)
def test_the_http_status_of_a_proxy_is_final_or_not(target: Worker, status: int, remedy: str) -> None:
    with http_proxy(status, target.address, times=1) as address, grpc.insecure_channel(address) as channel:
        error: Any = pb_grpc.TargetServiceStub(channel).Describe.future(pb.DescribeRequest(), timeout=10).exception()
    found = meaning(error.code(), error.details(), error.trailing_metadata())
    assert (found.rule.remedy, found.after_s) == (remedy, 0.0), (error.code(), error.details())


# ---- gRPC's own bound, for real


@contextmanager
def crowded(worker: Worker, calls: int) -> Iterator[str]:
    """The worker behind a server of gRPC that takes so many calls at once, and has no other bound."""
    server = grpc.server(ThreadPoolExecutor(calls), maximum_concurrent_rpcs=calls)
    pb_grpc.add_TargetServiceServicer_to_server(worker.servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def test_over_grpcs_own_bound_texts_and_connections_wait(target: Worker) -> None:
    expected = write(target.address).output_tokens
    assert wait_until(lambda: not len(target.servicer.open_calls))
    with crowded(target, 1) as address, grpc.insecure_channel(address) as channel:
        silent = pb_grpc.TargetServiceStub(channel).StreamVerify(_nothing(over := threading.Event()))
        assert wait_until(lambda: len(target.servicer.open_calls) == 1)
        with pytest.raises(WorkerError, match="RESOURCE_EXHAUSTED: Concurrent RPC limit exceeded!"):
            connect("target", address, timeout_s=0.3)
        threading.Timer(0.5, over.set).start()
        connect("target", address, timeout_s=20).close()
        assert write(address).output_tokens == expected
        silent.cancel()


def _nothing(over: threading.Event) -> Iterator[pb.StreamVerifyRequest]:
    over.wait(30)
    yield from ()


def texts_at_once(address: str, count: int, **settings: Any) -> list[list[int]]:
    """The same text from so many clients, each with a connection of its own."""
    config = OrchestratorConfig(gamma=0, max_output_tokens=8, **settings)

    async def write_one() -> list[int]:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            stub = pb_grpc.TargetServiceStub(channel)
            return (await run_speculative_loop_async(None, stub, PROMPT, config)).output_tokens

    async def everything() -> list[list[int]]:
        return await asyncio.gather(*(write_one() for _ in range(count)))

    return event_loop().run(everything())


def test_two_hundred_clients_on_four_calls_all_end_with_their_text(tmp_path: Path) -> None:
    prepare_model({"source": "synthetic", "step_ms": 1.0}, "target", tmp_path / "target")
    with serving("target", tmp_path / "target", max_calls=4) as worker:
        expected = write(worker.address).output_tokens
        assert texts_at_once(worker.address, 200) == [expected] * 200
