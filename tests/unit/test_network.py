"""The simulated network: when messages arrive, by their bytes."""

from __future__ import annotations

import asyncio
import time

import pytest

from specsplit.client.network import Link, simulated, until
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig


def message(size: int) -> pb.Context:
    """One of `size` bytes when serialized."""
    made = pb.Context(session_id="x" * (size - 3 if size > 129 else size - 2))
    assert len(made.SerializeToString()) == size
    return made


@pytest.mark.parametrize(
    ("settings", "sent", "arrives"),
    [
        ((0, 0, 0), [(0.0, 1000), (0.0, 1000)], [0.0, 0.0]),
        ((20, 0, 0), [(0.0, 1000), (1.0, 10)], [0.010, 1.010]),
        ((0, 0, 1), [(0.0, 1000)], [0.008]),  # 8000 bit at a megabit a second
        ((0, 0, 1), [(0.0, 1000), (0.0, 500), (0.004, 125)], [0.008, 0.012, 0.013]),  # each after the one before
        ((0, 0, 1), [(0.0, 1000), (1.0, 500)], [0.008, 1.004]),  # the line was free again
        ((0, 0, 8), [(0.0, 1000)] * 3, [0.001, 0.002, 0.003]),
        ((50, 0, 1), [(0.0, 1000), (0.0, 1000)], [0.033, 0.041]),  # the way takes its time beside the next one
    ],
)
def test_when_messages_arrive(settings: tuple[float, ...], sent: list[tuple[float, int]], arrives: list[float]) -> None:
    rtt_ms, jitter_ms, bandwidth_mbit = settings
    link = Link(rtt_ms, jitter_ms, bandwidth_mbit)
    assert [link.due(message(size), now) for now, size in sent] == pytest.approx(arrives)


def test_each_direction_has_a_line_of_its_own() -> None:
    links = simulated(OrchestratorConfig(bandwidth_mbit=1))
    assert links
    there, back = links
    assert [there.due(message(1000), 0.0), back.due(message(500), 0.0)] == pytest.approx([0.008, 0.004])


def test_jitter_is_drawn_from_the_seed() -> None:
    def times(seed: int) -> list[float]:
        link = Link(0.0, 10.0, 0.0, seed)
        return [link.due(message(100), 0.0) for _ in range(20)]

    assert times(1) == times(1) != times(2)
    assert 0 <= min(times(1)) < max(times(1)) <= 0.010


def test_no_network_is_simulated_unless_asked_for() -> None:
    assert simulated(OrchestratorConfig()) is None


def test_the_time_is_really_waited() -> None:
    began = time.perf_counter()
    asyncio.run(until(Link(bandwidth_mbit=1.0).due(message(2500), began)))
    assert time.perf_counter() - began >= 0.020
