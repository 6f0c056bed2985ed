"""Texts that share a target are told which gamma to draft next, a text alone is not; what is written stays the same."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from specsplit.client.result import SpeculativeResult
from specsplit.client.writer import TextWriter
from specsplit.models.sources import prepare_model
from specsplit.settings.run import OrchestratorConfig

from grpc_fixtures import Worker, serving, verify_request

MODES = ("sync", "lookahead")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Worker, Worker]]:
    """A draft that costs as much as the target, which does not pay where passes are shared."""
    for name in ("draft", "target"):
        spec = {"source": "synthetic", "acceptance": 0.5, "step_ms": 2.0, "token_ms": 1.0}
        prepare_model(spec, name, tmp_path / name)
    with serving("draft", tmp_path / "draft") as draft, serving("target", tmp_path / "target") as target:
        yield draft, target


@pytest.mark.slow  # rests on times, which a busy machine changes
@pytest.mark.parametrize("mode", MODES)
def test_under_load_auto_stops_drafting_where_it_does_not_pay(pair: tuple[Worker, Worker], mode: str) -> None:
    draft, target = pair

    def write(number: int, gamma: int | str) -> SpeculativeResult:
        with TextWriter(draft.address, target.address) as writer:
            config = OrchestratorConfig(mode=mode, gamma=gamma, max_output_tokens=80)
            return writer.write([65, 66, number], config)

    right = [write(number, 0).output_tokens for number in range(4)]
    with ThreadPoolExecutor(4) as clients:
        results = list(clients.map(lambda number: write(number % 4, "auto"), range(12)))
    assert [result.output_tokens for result in results] == [right[number % 4] for number in range(12)]
    late = [r.gamma_asked for result in results[8:] for r in result.rounds[1:-2]]
    assert late.count(0) > 0.7 * len(late)


def test_a_text_alone_is_told_nothing(pair: tuple[Worker, Worker]) -> None:
    _, target = pair
    reply = target.stub.VerifyDrafts(verify_request([5]), timeout=20)
    assert not reply.HasField("gamma")
