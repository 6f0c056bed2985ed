"""The client's side of a session on one worker: what the worker holds, and how a call survives its failures."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from specsplit.client.recovery import Recovery, failure_of, reach
from specsplit.rpc.codec import tokens_crc32
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """A reply with its times in milliseconds: at the client, and as the server counted them."""

    reply: Any
    wall_ms: float

    @property
    def network_ms(self) -> float:
        """What was neither queue nor compute nor other server work."""
        return max(0.0, self.wall_ms - self.reply.timings.server_ms)


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
        """Note that the worker holds nothing: the next request opens a session."""
        self.id = uuid.uuid4().hex
        self.held = self._crc = 0


class RemoteSession:
    """Sends rounds to one worker and keeps count of the tokens that it has confirmed.

    verb: the method of the stub. rtt_ms: simulated round trip, spent asleep, half before and half after each call.
    """

    def __init__(
        self,
        role: str,
        stub: Any,
        verb: str,
        config: OrchestratorConfig,
        recovery: Recovery,
        *,
        rtt_ms: float = 0.0,
    ) -> None:
        self._role, self._stub, self._verb = role, stub, verb
        self._config = config
        self._recovery = recovery
        self._delay_s = rtt_ms / 2e3
        self._confirmed = Confirmed()
        self.holds = self._confirmed.holds

    def call(self, tokens: Sequence[int], build: Callable[..., Any]) -> Call:
        """One round: `build(context=...)` makes the request for `tokens`, the whole text so far.

        A round is idempotent, so it is sent again when the worker is back; when the worker lost the session, the whole
        context is sent. The time of the reply is that of the attempt that brought it. Raises WorkerError when it cannot
        be completed, WithoutDraft when it need not be.
        """
        confirmed = self._confirmed
        context = confirmed.context(tokens)
        while True:
            started = time.perf_counter()
            try:
                time.sleep(self._delay_s)
                rpc = getattr(self._stub, self._verb)
                if self._recovery.span is not None:
                    rpc = self._recovery.span.carry(rpc)
                reply = rpc(build(context=context), timeout=self._config.rpc_timeout_s)
                time.sleep(self._delay_s)
                return Call(reply, (time.perf_counter() - started) * 1e3)
            except grpc.RpcError as error:
                failed = failure_of(self._role, error.code(), error.details(), error.trailing_metadata())
            reach(self._recovery, self._role, self._stub, failed)
            if failed.remedy == "resend":
                confirmed.lost()
                context = confirmed.same_round(tokens)

    def end(self) -> None:
        """Free the worker's memory; a worker that is gone has freed it already."""
        if self._confirmed.round:
            try:
                request = pb.EndSessionRequest(session_id=self._confirmed.id)
                self._stub.EndSession(request, timeout=self._config.connect_timeout_s)
            except grpc.RpcError as error:
                log.debug("%s worker did not end the session: %s", self._role, error.code().name)
