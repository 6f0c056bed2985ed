"""Throughput and goodput of many clients."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pandas as pd
import pytest

from specsplit.analysis.capacity_table import draw_capacity, summarize_capacity
from specsplit.experiment.capacity import CapacityRecord


def requests(clients: int, gamma: int, *times: tuple[float, float], tokens: int = 11, **more: Any) -> pd.DataFrame:
    """A request for each (start, latency): 10 ms of it TTFT."""
    rows = [
        {
            **{field.name: None for field in fields(CapacityRecord)},
            "mode": "sync",
            "gamma": gamma,
            "clients": clients,
            "started_ms": start,
            "generated_tokens": tokens,
            "ttft_ms": 10.0,
            "tpot_ms": (latency - 10) / (tokens - 1),
            "itl_ms": (latency - 10) / (tokens - 1),
            "total_latency_ms": latency,
            "queue_ms": latency / 4,
            "matches_single": True,
            **more,
        }
        for start, latency in times
    ]
    return pd.DataFrame(rows)


def test_throughput_is_of_the_wall_time_of_all() -> None:
    alone = requests(1, 0, (0, 110), (110, 110))
    both = requests(2, 0, (0, 120), (5, 135))
    summary = summarize_capacity(pd.concat([alone, both]))
    assert list(summary["clients"]) == [1, 2]
    assert list(summary["wall_s"]) == pytest.approx([0.22, 0.14])
    assert list(summary["tokens_per_second"]) == pytest.approx([100, 22 / 0.14])
    assert summary["gain"].iloc[1] == pytest.approx(0.22 / 0.14)
    assert list(summary["queue_share"]) == pytest.approx([0.25, 0.25])
    assert (summary["matches_single"] == 1).all()


def test_goodput_counts_what_kept_the_limit() -> None:
    table = requests(1, 0, (0, 110), (110, 310))  # TPOT 10 and 30 ms
    summary = summarize_capacity(table, 20.0).iloc[0]
    assert (summary["goodput_share"], summary["tpot_limit_ms"]) == (0.5, 20.0)
    assert summary["goodput_tokens_per_second"] == pytest.approx(11 / 0.42)
    assert summary["goodput_requests_per_second"] == pytest.approx(1 / 0.42)


def test_without_a_limit_it_is_twice_the_first_rows_median_for_all() -> None:
    table = pd.concat([requests(1, 0, (0, 110)), requests(2, 0, (0, 310)), requests(1, 3, (0, 60))])
    assert list(summarize_capacity(table)["tpot_limit_ms"]) == [20.0, 20.0, 20.0]


def test_a_text_that_differs_is_seen() -> None:
    table = pd.concat([requests(1, 0, (0, 110)), requests(2, 0, (0, 110), matches_single=False)])
    assert list(summarize_capacity(table)["matches_single"]) == [1.0, 0.0]


def test_texts_without_a_second_token_have_no_goodput(tmp_path) -> None:
    table = requests(1, 0, (0, 10), tokens=2, tpot_ms=None, itl_ms=None)
    table = table.astype({"tpot_ms": float, "itl_ms": float})
    summary = summarize_capacity(table, 20.0)
    assert summary["goodput_share"].isna().all()
    assert len(draw_capacity(summary, tmp_path / "capacity.png")) == 2
