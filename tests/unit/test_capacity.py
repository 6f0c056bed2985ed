"""Throughput, goodput and speedup of many requests at once, in closed and open loops."""

from __future__ import annotations

import heapq
import random
from dataclasses import fields
from typing import Any

import pandas as pd
import pytest

from specsplit.analysis.capacity_table import capacity_sentences, draw_capacity, summarize_capacity
from specsplit.errors import UserError
from specsplit.experiment.capacity import CapacityRecord, arrival_times, latency_limits
from specsplit.settings.measure import CapacitySettings


def requests(clients: int, gamma: int, *times: tuple[float, float], tokens: int = 11, **more: Any) -> pd.DataFrame:
    """A request for each (start, latency), by the clients in turn: 10 ms of it TTFT. All of its tokens are timed."""
    rows = [
        {
            **{field.name: None for field in fields(CapacityRecord)},
            "request_id": f"p{number}",
            "repeat": 1,
            "status": "ok",
            "mode": "sync",
            "gamma": gamma,
            "arrivals": "closed",
            "clients": clients,
            "client": number % clients if clients else number,
            "started_ms": start,
            "due_ms": start,
            "generated_tokens": tokens,
            "ttft_ms": 10.0,
            "tpot_ms": (latency - 10) / (tokens - 1),
            "itl_ms": (latency - 10) / (tokens - 1),
            "total_latency_ms": latency,
            "queue_ms": latency / 4,
            "matches_single": True,
            **more,
        }
        for number, (start, latency) in enumerate(times)
    ]
    return pd.DataFrame(rows)


def closed_loop(clients: int, latencies: list[float], slowdown: float = 1.0) -> pd.DataFrame:
    """What a system writes that takes `slowdown` times as long for each request when so many clients are at work."""
    free = [(0.0, client) for client in range(clients)]
    table = []
    for latency in latencies:
        start, client = heapq.heappop(free)
        table.append((start, latency * slowdown, client))
        heapq.heappush(free, (start + latency * slowdown, client))
    rows = requests(clients, 0, *((start, took) for start, took, _ in table))
    rows["client"] = [client for _, _, client in table]
    return rows


@pytest.mark.parametrize("clients", [2, 4, 8, 16, 64])
@pytest.mark.parametrize("slowdown", [1.0, 2.5])
def test_the_gain_of_a_system_of_which_it_is_known(clients: int, slowdown: float) -> None:
    """It starts with all clients at once, and ends with ever fewer: neither is part of what it can do."""
    chance = random.Random(clients)
    latencies = [chance.uniform(60, 300) for _ in range(4 * clients)]
    alone, together = closed_loop(1, latencies), closed_loop(clients, latencies, slowdown)
    row = summarize_capacity(pd.concat([alone, together])).iloc[1]
    assert row["gain"] == pytest.approx(clients / slowdown, rel=0.05)
    assert row["concurrency"] == pytest.approx(clients, rel=0.01)
    assert row["window_s"] < row["wall_s"]
    per_second = clients * 11e3 / slowdown / (sum(latencies) / len(latencies))
    assert row["tokens_per_second"] == pytest.approx(per_second, rel=0.2)  # other requests than on average


def test_one_client_counts_what_follows_its_first_request() -> None:
    row = summarize_capacity(requests(1, 0, (0, 110), (110, 110), (220, 330))).iloc[0]
    assert (row["wall_s"], row["window_s"], row["gain"]) == pytest.approx((0.55, 0.44, 1))
    assert row["tokens_per_second"] == pytest.approx(22 / 0.44)


def test_goodput_counts_what_kept_both_limits() -> None:
    table = requests(1, 0, (0, 110), (110, 110), (220, 310))  # ITL 10, 10 and 30 ms
    summary = summarize_capacity(table, 20.0, 15.0).iloc[0]
    assert (summary["goodput_share"], summary["tpot_limit_ms"]) == (pytest.approx(2 / 3), 20.0)
    assert summary["goodput_tokens_per_second"] == pytest.approx(11 / 0.42)
    assert not summary["kept_up"]
    assert summarize_capacity(table, 20.0, 5.0).iloc[0]["goodput_share"] == 0  # the first token comes after 10 ms
    assert summarize_capacity(table.iloc[:2], 20.0, 15.0).iloc[0]["kept_up"]


def test_failed_requests_are_no_goodput_and_take_their_time() -> None:
    table = requests(1, 0, (0, 110), (110, 110), (220, 110))
    table.loc[1, "status"] = "failed"
    row = summarize_capacity(table).iloc[0]
    assert (row["requests"], row["failed_requests"], row["goodput_share"]) == (2, 1, pytest.approx(2 / 3))
    assert row["tokens_per_second"] == pytest.approx(11 / 0.22)


@pytest.mark.filterwarnings("error")
def test_nothing_that_was_written_is_no_goodput() -> None:
    summary = summarize_capacity(requests(1, 0, (0, 110), (110, 110), status="failed", ttft_ms=float("nan")))
    assert (summary.iloc[0]["goodput_share"], summary.iloc[0]["kept_up"]) == (0, False)


def test_the_search_has_the_limits_of_the_table() -> None:
    table = requests(1, 0, (0, 110), (110, 310))  # the median of two is between them
    level = [CapacityRecord(**row) for row in table.to_dict("records")]
    row = summarize_capacity(table).iloc[0]
    assert latency_limits(level, None, None) == (row["ttft_limit_ms"], row["tpot_limit_ms"])
    assert latency_limits([], 5.0, None) == (5.0, float("inf"))


def test_without_a_limit_it_is_twice_the_first_rows_median_for_all() -> None:
    table = pd.concat([requests(1, 0, (0, 110)), requests(2, 0, (0, 310), (0, 310)), requests(1, 3, (0, 60))])
    assert list(summarize_capacity(table)["tpot_limit_ms"]) == [20.0, 20.0, 20.0]


def test_a_text_that_differs_is_seen() -> None:
    table = pd.concat([requests(1, 0, (0, 110)), requests(2, 0, (0, 110), matches_single=False)])
    assert list(summarize_capacity(table)["matches_single"]) == [1.0, 0.0]


def test_texts_without_a_second_token_keep_the_limit_of_itl(tmp_path) -> None:
    table = requests(1, 0, (0, 10), tokens=2, tpot_ms=None, itl_ms=None)
    table = table.astype({"tpot_ms": float, "itl_ms": float})
    summary = summarize_capacity(table, 20.0)
    assert summary["goodput_share"].iloc[0] == 1
    assert len(draw_capacity(summary, tmp_path / "capacity.png")) == 2


def opened(gamma: int, rate: float, *times: tuple[float, float], late: float = 0.0) -> pd.DataFrame:
    rows = requests(0, gamma, *times, arrivals="poisson", rate=rate)
    return rows.assign(due_ms=rows["started_ms"] - late)


def test_an_open_loop_counts_from_when_a_request_was_due(tmp_path) -> None:
    alone = requests(1, 0, (0, 110), (110, 110))
    summary = summarize_capacity(pd.concat([alone, opened(0, 5.0, (30, 110), (230, 110), late=30)]))
    row = summary.iloc[1]
    assert (row["arrivals"], row["clients"], row["rate"], row["lag_ms_max"]) == ("poisson", 0, 5.0, 30)
    assert (row["ttft_ms_median"], row["total_latency_ms_median"]) == (40, 140)
    assert (row["window_s"], row["concurrency"]) == (pytest.approx(0.34), pytest.approx(0.28 / 0.34))
    assert (row["goodput_share"], row["kept_up"]) == (0, False)  # a first token after 40 ms where one client has 10
    assert pd.isna(row["gain"])
    assert pd.isna(summary.iloc[0]["lag_ms_max"])
    assert len(draw_capacity(summary, tmp_path / "capacity.png")) == 2


def test_drafting_is_compared_with_the_target_alone_at_equal_load() -> None:
    starts = [(110.0 * i, 110.0) for i in range(8)]
    faster = [(start, latency / 2) for start, latency in starts]
    slower = [(start, latency * 2) for start, latency in starts]
    table = [requests(1, 0, *starts), requests(4, 0, *starts), opened(0, 2.0, *starts)]
    table += [requests(1, 3, *faster), requests(4, 3, *slower), opened(3, 2.0, *faster), opened(3, 4.0, *faster)]
    summary = summarize_capacity(pd.concat(table))
    drafted = summary[summary["gamma"] == 3]
    assert list(drafted["speedup_at_load"])[:3] == pytest.approx([2, 0.5, 2])
    assert pd.isna(drafted["speedup_at_load"].iloc[3])  # the target alone was not measured at this rate
    assert summary.loc[summary["gamma"] == 0, "speedup_at_load"].isna().all()
    sentences = capacity_sentences(summary)
    assert sentences[0] == (
        "Drafting with gamma 3 (sync) pays at 1 (2.00); it costs at 4 (0.50) clients (speedup at equal load)."
    )
    assert sentences[1] == "Drafting with gamma 3 (sync) pays at 2 (2.00) requests/s (speedup at equal load)."
    assert sentences[2:] == [
        "The target alone kept the limits up to 2 requests/s, the highest rate measured.",
        "Gamma 3 (sync) kept the limits up to 4 requests/s, the highest rate measured.",
    ]


@pytest.mark.parametrize("pattern", ["constant", "poisson", "gamma"])
def test_arrivals_have_the_rate_and_repeat(pattern: Any) -> None:
    times = arrival_times(4000, 5.0, pattern, 0.5, seed=3)
    assert times == arrival_times(4000, 5.0, pattern, 0.5, seed=3)
    assert times[0] == 0
    assert times == sorted(times)
    assert times[-1] / 3999 == pytest.approx(1 / 5.0, rel=0.06)
    gaps = pd.Series(times).diff().dropna()
    assert gaps.std() / gaps.mean() == pytest.approx({"constant": 0, "poisson": 1, "gamma": 2**0.5}[pattern], abs=0.08)


def test_a_load_that_is_asked_for_twice_is_measured_once() -> None:
    asked = CapacitySettings(rates=[2, 1, 2], clients=[4, 4])
    assert (asked.rates, asked.clients) == ([2, 1], [4])


def test_too_few_requests_for_the_clients_are_refused() -> None:
    with pytest.raises(UserError, match="requests is 32: 64 clients need at least 256, four each"):
        CapacitySettings.load({"clients": [64], "requests": 32})
    assert CapacitySettings.load({"clients": [8], "requests": 32}).requests == 32
