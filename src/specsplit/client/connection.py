"""Finding the workers and making sure that they belong together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from specsplit.client.result import SpeculativeResult
from specsplit.errors import UserError
from specsplit.rpc.credentials import TLS_SCHEME, Access, split_address
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.processes import OrchestratorConfig

OPEN = Access()
POLL_S = 0.1


class WorkerError(UserError):
    """A worker did not answer, or refused; the message names it, the call and the status.

    code: name of the gRPC status. result: the text so far, None when it had not begun.
    """

    def __init__(self, message: str, *, code: str = "", result: SpeculativeResult | None = None) -> None:
        super().__init__(message)
        self.code, self.result = code, result


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
    """What the worker says of itself; asked again while it cannot be reached or loads its model."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return stub.Describe(pb.DescribeRequest(), timeout=max(deadline - time.monotonic(), 0.01))
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE or _failed_handshake(error):
                raise
            if time.monotonic() + POLL_S > deadline:
                raise
        time.sleep(POLL_S)


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


@contextmanager
def connected_pair(config: OrchestratorConfig, tokenizer_sha256: str) -> Iterator[tuple[Connection | None, Connection]]:
    """Connections to the draft (None when config.max_draft_tokens is 0) and the target worker.

    tokenizer_sha256: of the tokenizer that makes the prompts. Raises UserError when a worker is missing or the
    tokenizers are not all the same.
    """
    with ExitStack() as stack:
        known: dict[str, Any] = {"timeout_s": config.connect_timeout_s, "access": Access.of(config)}
        target = stack.enter_context(connect("target", config.target_address, **known))
        draft = None
        if config.max_draft_tokens:
            draft = stack.enter_context(connect("draft", config.draft_address, **known))
        check_tokenizers(
            {
                "--tokenizer": tokenizer_sha256,
                **{
                    f"the {c.role} worker ({c.description.model})": c.description.tokenizer_sha256
                    for c in (draft, target)
                    if c is not None
                },
            }
        )
        yield draft, target


def check_tokenizers(named: dict[str, str]) -> None:
    """Refuse to go on when the tokenizers differ. named: who -> tokenizer sha256."""
    if len(set(named.values())) > 1:
        lines = ", ".join(f"{who} has {sha[:12] or 'none'}" for who, sha in named.items())
        raise UserError(
            f"the tokenizers differ ({lines}): token ids would mean different text. "
            f"Use a draft and a target that share one tokenizer."
        )
