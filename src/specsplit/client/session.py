"""What a worker holds of a text in one session."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Self

from specsplit.rpc.codec import tokens_crc32
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig


class HeldPrefix:
    """The beginning of the text that a worker holds in one session, and the contexts that build on it.

    wait_s: how long a request may wait in line at the worker; None leaves it to the worker.
    """

    @classmethod
    def of(cls, config: OrchestratorConfig) -> Self:
        """Nothing yet. A place in line is given up before the client takes the worker for hung."""
        return cls(min(config.recovery_timeout_s, config.rpc_timeout_s / 2))

    def __init__(self, wait_s: float | None = None) -> None:
        self._wait_ms = None if wait_s is None else min(int(wait_s * 1e3), (1 << 32) - 1)
        self.id = uuid.uuid4().hex
        self.round = 0
        self.length = 0  # tokens
        self.whole = False  # whether the last context was the whole text
        self._crc = 0

    def context(self, tokens: Sequence[int]) -> pb.Context:
        """The context of the next round, for `tokens`, the whole text so far; its last token is always sent."""
        self.round += 1
        if self.length >= len(tokens):  # the round before was for this text as well, and did not come to its end
            self.length = len(tokens) - 1
            self._crc = tokens_crc32(tokens[: self.length])
        self.whole = self.length == 0
        return pb.Context(
            session_id=self.id,
            round=self.round,
            prefix_length=self.length,
            prefix_crc32=self._crc,
            new_tokens=tokens[self.length :],
            wait_ms=self._wait_ms,
        )

    def extend_to(self, tokens: Sequence[int]) -> None:
        """Note that the worker now holds `tokens`, which continue what it held before."""
        self._crc = tokens_crc32(tokens[self.length :], self._crc)
        self.length = len(tokens)
