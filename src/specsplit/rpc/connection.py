"""A connection to one worker: opening it, and what the worker says of itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import grpc

from specsplit.errors import WorkerError
from specsplit.rpc.credentials import TLS_SCHEME, Access, split_address
from specsplit.rpc.statuses import meaning
from specsplit.rpc.v1 import specsplit_pb2 as pb

OPEN = Access()
POLL_S = 0.1


@dataclass
class Connection:
    """A channel to one worker that has answered. Use as a context manager, or call `close`."""

    role: str
    address: str
    channel: grpc.Channel
    stub: Any
    description: pb.DescribeReply

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.channel.close()


def connect(role: str, address: str, *, timeout_s: float = 10.0, access: Access = OPEN) -> Connection:
    """Open a channel to the `role` worker (draft | target) at an address and ask it what it is.

    access: how we show who we are. Raises WorkerError when nothing answers within `timeout_s` seconds, something else
    does, or it lets nobody in who shows that.
    """
    split_address(address)
    channel = access.channel(address)
    stub = access.stub(role, channel)
    try:
        description = _describe(stub, timeout_s)
    except grpc.RpcError as error:
        channel.close()
        status, where = error.code(), f"the {role} worker at {address}"
        if status == grpc.StatusCode.UNIMPLEMENTED:
            raise WorkerError(
                f"what listens at {address} is not a {role} worker. "
                f"Check that the draft and target addresses are not swapped. ({error.details()})"
            ) from None
        if status == grpc.StatusCode.UNAUTHENTICATED:
            shown = "the token that was sent is none of its own" if access.token else "no token was sent"
            raise WorkerError(
                f"{where} asks for a token and {shown}: set --token-file, workers.token_file or SPECSPLIT_TOKEN"
            ) from None
        if _failed_handshake(error):
            last = error.details().rpartition("last error: ")[2]
            raise WorkerError(
                f"no TLS with {where}: {last[:300]}. Its certificate must be from --tls-ca and for that name"
            ) from None
        if status in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
            raise WorkerError(
                f"no {role} worker answers at {address} within {timeout_s:g} s. Start one with "
                f"`specsplit worker {role}`, or mend the address (--{role}-addr or "
                f"SPECSPLIT_ORCH_{role.upper()}_ADDRESS).{_why_not(error.details(), address)}"
            ) from None
        raise WorkerError(f"{where}: {status.name}: {error.details()}") from None
    return Connection(role, address, channel, stub, description)


def _describe(stub: Any, timeout_s: float) -> pb.DescribeReply:
    """What the worker says of itself; asked again while it cannot be reached, loads its model, or has no room."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return stub.Describe(pb.DescribeRequest(), timeout=max(deadline - time.monotonic(), 0.01))
        except grpc.RpcError as error:
            meant = meaning(error.code(), error.details(), error.trailing_metadata())
            pause_s = max(POLL_S, meant.after_s)
            if meant.rule.remedy != "wait" or _failed_handshake(error) or time.monotonic() + pause_s > deadline:
                raise
        time.sleep(pause_s)


def _failed_handshake(error: grpc.RpcError) -> bool:
    """What a second try does not mend: no TLS there, or a certificate that we do not trust."""
    return any(words in error.details() for words in ("handshake failed", "verification check failed"))


def _why_not(details: str, address: str) -> str:
    """What gRPC says of a connection that did not come about, where it is more than that nobody listens."""
    if "Socket closed" in details or "SETTINGS" in details:
        if address.startswith(TLS_SCHEME):
            return " It closes the connection: it may want a certificate of ours, --tls-cert and --tls-key."
        return f" It closes the connection: it may want TLS, {TLS_SCHEME}{address}."
    return f" ({details})" if "loaded" in details else ""
