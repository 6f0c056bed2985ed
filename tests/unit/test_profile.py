"""The parts of a round add up to its time, whatever was hidden behind other work."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pandas as pd
import pytest

from specsplit.analysis.context_figure import draw_context_curve, summarize_contexts
from specsplit.analysis.profile import PARTS, bar_label, draw_profile, profile, round_parts, summarize_overhead
from specsplit.client.result import Round
from specsplit.experiment.context_curve import ContextText
from specsplit.settings.axes import CONFIGURATION, PLAIN

ROW: dict[str, Any] = {**PLAIN, "request_id": "a", "repeat": 1}


def a_round(number: int, arrived: float, draft: tuple[float, ...], verify: tuple[float, ...], network: float) -> Round:
    """draft, verify: wall, compute and queue ms."""
    return Round(number, 3, 2, 3, *draft, *verify, network, arrived_ms=arrived)


# A first round; one whose draft was waited for; one whose draft was made ahead.
ROUNDS = [
    a_round(1, 100.0, (20.0, 15.0, 1.0), (70.0, 60.0, 1.0), 10.0),
    a_round(2, 150.0, (12.0, 10.0, 0.5), (36.0, 30.0, 0.5), 4.0),
    a_round(3, 185.0, (0.0, 10.0, 0.5), (34.0, 32.0, 0.2), 1.5),
]


def frame(gamma: int = 3, **about: Any) -> pd.DataFrame:
    return pd.DataFrame([{**ROW, "gamma": gamma, **about, **asdict(row)} for row in ROUNDS])


def test_parts_add_up_to_the_time_between_arrivals() -> None:
    parts = round_parts(frame(), ["request_id"])
    assert list(parts["round_ms"]) == [100.0, 50.0, 35.0]
    assert list(parts[list(PARTS)].sum(axis=1)) == pytest.approx([100.0, 50.0, 35.0])
    assert (parts >= 0).all().all()
    second = parts.iloc[1]
    assert (second["draft_compute_ms"], second["verify_compute_ms"], second["network_ms"]) == (10.0, 30.0, 4.0)
    assert second["worker_ms"] == pytest.approx(48 - 40 - 1 - 4)
    assert second["orchestrator_ms"] == pytest.approx(2.0)


def test_a_draft_made_ahead_costs_its_round_nothing() -> None:
    third = round_parts(frame(), ["request_id"]).iloc[2]
    assert (third["draft_compute_ms"], third["draft_queue_ms"], third["hidden_ms"]) == (0.0, 0.0, 10.0)


def test_texts_are_kept_apart() -> None:
    both = pd.concat([frame(), frame(request_id="b")], ignore_index=True)
    assert list(round_parts(both, ["request_id"])["round_ms"]) == [100.0, 50.0, 35.0] * 2


def test_first_rounds_have_a_row_of_their_own(tmp_path) -> None:
    table = profile(pd.concat([frame(3), frame(5, mode="overlap")], ignore_index=True))
    assert list(zip(table["mode"], table["gamma"], table["phase"], table["rounds"], strict=True)) == [
        ("sync", 3, "prefill", 1),
        ("sync", 3, "decode", 2),
        ("overlap", 5, "prefill", 1),
        ("overlap", 5, "decode", 2),
    ]
    decode = table.iloc[1]
    assert decode["round_ms"] == pytest.approx(42.5)
    assert decode["ms_per_token"] == pytest.approx(42.5 / 3)
    paths = draw_profile(table, tmp_path / "profile.png")
    assert "overlap_gamma_5" in paths[1].read_text()


def test_overhead_is_what_no_model_computed() -> None:
    rows = frame().assign(text=0, bare_grpc_ms=0.4)
    (row,) = summarize_overhead(rows).to_dict("records")
    assert (row["rounds"], row["bare_grpc_ms"]) == (2, 0.4)
    assert row["overhead_ms_median"] == pytest.approx(((50 - 40) + (35 - 32)) / 2)
    assert row["round_ms_median"] == pytest.approx(42.5)


def test_cost_is_relative_to_the_shortest_context(tmp_path) -> None:
    texts = [
        ContextText(gamma, length, text, 8, 10.0 * length, itl, 2.0, 5.0, 1.0)
        for gamma in (12, 3, 0)
        for length, itl in ((64, 10.0), (640, 15.0))
        for text in range(3)
    ]
    table = summarize_contexts(pd.DataFrame(texts))
    assert list(table["gamma"]) == [0, 0, 3, 3, 12, 12]
    assert list(table["relative_length"])[:2] == [1.0, 10.0]
    assert list(table["relative_cost"])[:2] == [1.0, 1.5]
    assert [path.suffix for path in draw_context_curve(table, tmp_path / "curve.png")] == [".png", ".svg"]


def test_no_two_configurations_have_one_label() -> None:
    """Every column that tells configurations apart, the draft among them, is in the label where it varies."""
    others = {"draft": "small", "mode": "overlap", "tree": "3x2", "sampling": "rejection", "temperature": 0.7}
    others |= {"top_k": 5, "top_p": 0.9, "rtt_ms": 14.0, "jitter_ms": 2.0, "bandwidth_mbit": 100.0, "series": 2}
    plain = {**PLAIN, "gamma": 4, "series": 1}
    assert set(others) == {*CONFIGURATION[1:], "series"}
    rows = pd.DataFrame([plain, *({**plain, name: value} for name, value in others.items())])
    varied = [name for name in (*CONFIGURATION, "series") if rows[name].nunique() > 1]
    labels = [bar_label(row, varied) for _, row in rows.iterrows()]
    assert len(set(labels)) == len(labels), labels
