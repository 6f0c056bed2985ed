"""A network to the target worker that is simulated: round trip, jitter and bandwidth."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

from specsplit.settings.run import OrchestratorConfig

SPIN_S = 0.001  # an event loop sleeps in whole milliseconds, which is too coarse for a simulated network


class Link:
    """One direction of the network, for the messages of one stream.

    A message takes its serialized bytes at bandwidth_mbit (10^6 bit/s; 0: no time), which begin once the message before
    has left; half of rtt_ms; and up to jitter_ms more, drawn from `seed`.
    """

    def __init__(self, rtt_ms: float = 0.0, jitter_ms: float = 0.0, bandwidth_mbit: float = 0.0, seed: int = 0) -> None:
        self._delay_s, self._jitter_s = rtt_ms / 2e3, jitter_ms / 1e3
        self._s_per_byte = 8 / (bandwidth_mbit * 1e6) if bandwidth_mbit else 0.0
        self._random = random.Random(seed)
        self._free_at = 0.0

    def due(self, message: Any, now: float) -> float:
        """When a protobuf message that is sent at `now`, in seconds, arrives."""
        if self._s_per_byte:
            self._free_at = now = max(now, self._free_at) + message.ByteSize() * self._s_per_byte
        return now + self._delay_s + self._random.random() * self._jitter_s


Links = tuple[Link, Link]


def simulated(config: OrchestratorConfig) -> Links | None:
    """The way to the target and the way back; None when none is simulated."""
    settings = config.rtt_ms, config.jitter_ms, config.bandwidth_mbit, config.seed
    return (Link(*settings), Link(*settings)) if any(settings[:3]) else None


async def until(due: float) -> None:
    """Wait for a time of time.perf_counter(), to a fraction of a millisecond."""
    while (left := due - time.perf_counter()) > 0:
        await asyncio.sleep(left - SPIN_S if left > 2 * SPIN_S else 0)
