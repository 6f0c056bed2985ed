"""The client's side of a session on one worker: what the worker holds, and how a call survives its failures."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from specsplit.config import OrchestratorConfig
from specsplit.rpc.codec import tokens_crc32
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.workers.orchestrator.connection import WorkerError

log = logging.getLogger(__name__)
RETRY_WAIT_S = 0.4


@dataclass(frozen=True)
class Call:
    """A reply with its times in milliseconds: at the client, and as the server counted them."""

    reply: Any
    wall_ms: float

    @property
    def network_ms(self) -> float:
        """What was neither queue nor compute nor other server work."""
        return max(0.0, self.wall_ms - self.reply.timings.server_ms)


def resend(name: str, rpc: Callable[..., Any], request: Any, config: OrchestratorConfig, *, timeout_s: float) -> Any:
    """Send an idempotent request, and again while the `name` worker is unavailable; returns the reply.

    Raises grpc.RpcError for any other status, and after config.rpc_retries more attempts.
    """
    for attempt in range(config.rpc_retries + 1):
        try:
            return rpc(request, timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE or attempt == config.rpc_retries:
                raise
            log.warning("%s worker unavailable, attempt %d", name, attempt + 2)
            time.sleep(RETRY_WAIT_S * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def describe(name: str, stub: Any, config: OrchestratorConfig) -> pb.DescribeReply:
    """What the worker behind a stub says of itself. Raises WorkerError when it does not answer."""
    try:
        return resend(name, stub.Describe, pb.DescribeRequest(), config, timeout_s=config.connect_timeout_s)
    except grpc.RpcError as error:
        raise WorkerError(f"{name} worker does not answer: {error.code().name}: {error.details()}") from None


class RemoteSession:
    """Sends rounds to one worker and keeps count of the tokens that it has confirmed."""

    def __init__(self, name: str, rpc: Callable[..., Any], config: OrchestratorConfig) -> None:
        self.id = uuid.uuid4().hex
        self._name = name
        self._rpc = rpc
        self._config = config
        self._round = 0
        self._held = 0  # tokens of the text that the worker holds
        self._held_crc = 0

    def call(self, tokens: Sequence[int], build: Callable[..., Any]) -> Call:
        """One round: `build(context=...)` makes the request for `tokens`, the whole text so far.

        A round is idempotent, so it is sent again when the worker was unavailable; when the worker lost the
        session, the whole context is sent. Raises WorkerError when it cannot be completed.
        """
        self._round += 1
        started = time.perf_counter()
        while True:
            context = pb.Context(
                session_id=self.id,
                round=self._round,
                prefix_length=self._held,
                prefix_crc32=self._held_crc,
                new_tokens=tokens[self._held :],
            )
            try:
                request = build(context=context)
                reply = resend(self._name, self._rpc, request, self._config, timeout_s=self._config.rpc_timeout_s)
                return Call(reply, (time.perf_counter() - started) * 1e3)
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.FAILED_PRECONDITION and self._held:
                    log.warning("%s worker lost the session; sending the whole context again", self._name)
                    self._held = self._held_crc = 0
                    continue
                raise WorkerError(
                    f"{self._name} worker failed in round {self._round}: {error.code().name}: {error.details()}"
                ) from None

    def holds(self, tokens: Sequence[int]) -> None:
        """Note that the worker now holds `tokens`, which continue what it held before."""
        self._held_crc = tokens_crc32(tokens[self._held :], self._held_crc)
        self._held = len(tokens)

    def end(self, end_session: Callable[..., Any]) -> None:
        """Free the worker's memory; a worker that is gone has freed it already."""
        if self._round:
            try:
                end_session(pb.EndSessionRequest(session_id=self.id), timeout=self._config.connect_timeout_s)
            except grpc.RpcError as error:
                log.debug("%s worker did not end the session: %s", self._name, error.code().name)
