"""Finding the workers and making sure that they belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from specsplit.config import OrchestratorConfig
from specsplit.errors import UserError
from specsplit.rpc.codec import CHANNEL_OPTIONS
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.rpc.v1 import specsplit_pb2_grpc as pb_grpc
from specsplit.workers.orchestrator.result import SpeculativeResult

STUBS: dict[str, Callable[[grpc.Channel], Any]] = {
    "draft": pb_grpc.DraftServiceStub,
    "target": pb_grpc.TargetServiceStub,
}


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


def connect(role: str, address: str, *, timeout_s: float = 10.0) -> Connection:
    """Open a channel to the `role` worker (draft | target) at host:port and ask it what it is.

    Raises WorkerError when nothing answers within `timeout_s` seconds or something else does.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"{address!r} is not an address: write host:port, as in 127.0.0.1:50051")
    channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    stub = STUBS[role](channel)
    try:
        description = stub.Describe(pb.DescribeRequest(), timeout=timeout_s, wait_for_ready=True)
    except grpc.RpcError as error:
        channel.close()
        if error.code() == grpc.StatusCode.UNIMPLEMENTED:
            raise WorkerError(
                f"what listens at {address} is not a {role} worker. "
                f"Check that the draft and target addresses are not swapped."
            ) from None
        if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            raise WorkerError(
                f"no {role} worker answers at {address} within {timeout_s:g} s. Start one with "
                f"`specsplit worker {role}`, or mend the address (--{role}-addr or "
                f"SPECSPLIT_ORCH_{role.upper()}_ADDRESS)."
            ) from None
        raise WorkerError(f"{role} worker at {address}: {error.code().name}: {error.details()}") from None
    return Connection(role, address, channel, stub, description)


@contextmanager
def connected_pair(config: OrchestratorConfig, tokenizer_sha256: str) -> Iterator[tuple[Connection | None, Connection]]:
    """Connections to the draft (None when config.max_draft_tokens is 0) and the target worker.

    tokenizer_sha256: of the tokenizer that makes the prompts. Raises UserError when a worker is missing or the
    tokenizers are not all the same.
    """
    with ExitStack() as stack:
        target = stack.enter_context(connect("target", config.target_address, timeout_s=config.connect_timeout_s))
        draft = None
        if config.max_draft_tokens:
            draft = stack.enter_context(connect("draft", config.draft_address, timeout_s=config.connect_timeout_s))
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
