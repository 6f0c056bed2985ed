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


class Confirmed:
    """What a worker holds of the text in one session, and the contexts that build on it."""

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex
        self.round = 0
        self.held = 0  # tokens of the text that the worker holds
        self._crc = 0

    def context(self, tokens: Sequence[int]) -> pb.Context:
        """The context of the next round, for `tokens`, the whole text so far."""
        self.round += 1
        return self.same_round(tokens)

    def same_round(self, tokens: Sequence[int]) -> pb.Context:
        return pb.Context(
            session_id=self.id,
            round=self.round,
            prefix_length=self.held,
            prefix_crc32=self._crc,
            new_tokens=tokens[self.held :],
        )

    def holds(self, tokens: Sequence[int]) -> None:
        """Note that the worker now holds `tokens`, which continue what it held before."""
        self._crc = tokens_crc32(tokens[self.held :], self._crc)
        self.held = len(tokens)

    def lost(self) -> None:
        """Note that the worker holds nothing."""
        self.held = self._crc = 0


class RemoteSession:
    """Sends rounds to one worker and keeps count of the tokens that it has confirmed.

    rtt_ms: simulated round trip, spent asleep, half before and half after each call.
    """

    def __init__(self, name: str, rpc: Callable[..., Any], config: OrchestratorConfig, *, rtt_ms: float = 0.0) -> None:
        self._name = name
        self._rpc = rpc
        self._config = config
        self._delay_s = rtt_ms / 2e3
        self._confirmed = Confirmed()
        self.holds = self._confirmed.holds

    def call(self, tokens: Sequence[int], build: Callable[..., Any]) -> Call:
        """One round: `build(context=...)` makes the request for `tokens`, the whole text so far.

        A round is idempotent, so it is sent again when the worker was unavailable; when the worker lost the
        session, the whole context is sent. Raises WorkerError when it cannot be completed.
        """
        confirmed = self._confirmed
        started = time.perf_counter()
        context = confirmed.context(tokens)
        while True:
            try:
                request = build(context=context)
                time.sleep(self._delay_s)
                reply = resend(self._name, self._rpc, request, self._config, timeout_s=self._config.rpc_timeout_s)
                time.sleep(self._delay_s)
                return Call(reply, (time.perf_counter() - started) * 1e3)
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.FAILED_PRECONDITION and confirmed.held:
                    log.warning("%s worker lost the session; sending the whole context again", self._name)
                    confirmed.lost()
                    context = confirmed.same_round(tokens)
                    continue
                raise WorkerError(
                    f"{self._name} worker failed in round {confirmed.round}: {error.code().name}: {error.details()}"
                ) from None

    def end(self, end_session: Callable[..., Any]) -> None:
        """Free the worker's memory; a worker that is gone has freed it already."""
        if self._confirmed.round:
            try:
                end_session(pb.EndSessionRequest(session_id=self._confirmed.id), timeout=self._config.connect_timeout_s)
            except grpc.RpcError as error:
                log.debug("%s worker did not end the session: %s", self._name, error.code().name)
