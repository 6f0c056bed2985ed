"""What the events of the load client say."""

from __future__ import annotations

from typing import Any

import pytest

from specsplit.errors import RunError
from specsplit.experiment.openai_load import measured_load


def events(*requests: tuple[int, float, float, float, int]) -> list[dict[str, Any]]:
    """Of requests as (batch, start, first token, end, tokens); seconds."""
    told: list[dict[str, Any]] = [{"type": "header", "ts": 0.0}, {"type": "latency_measured", "ts": 0.0}]
    for number, (batch, start, first, end, tokens) in enumerate(requests):
        told += [
            {"type": "request_start", "request_id": number, "run_index": batch, "ts": start},
            {"type": "request_first_token", "request_id": number, "ttft_s": first - start, "ts": first},
            {"type": "tokens", "request_id": number, "count": 1, "ts": first},
            {
                **{"type": "request_end", "request_id": number, "total_tokens": tokens, "ts": end},
                "decode_seconds": end - first,
            },
        ]
    return told


def test_throughput_is_over_the_time_of_the_batches() -> None:
    measured = measured_load(events((1, 0.0, 0.1, 1.1, 11), (1, 0.0, 0.3, 2.0, 11), (2, 5.0, 5.1, 6.0, 10)))
    assert measured["requests"] == 3
    assert measured["tokens_per_second"] == pytest.approx(32 / 3)
    assert (measured["ttft_ms_median"], measured["ttft_ms_max"]) == pytest.approx((100, 300))
    assert (measured["tpot_ms_median"], measured["tpot_ms_max"]) == pytest.approx((100, 170))


def test_a_text_of_one_token_has_no_time_a_token() -> None:
    assert measured_load(events((1, 0.0, 0.1, 0.1, 1)))["tpot_ms_median"] is None


def test_no_request_is_a_failure() -> None:
    with pytest.raises(RunError, match="no request that got a token"):
        measured_load(events())
