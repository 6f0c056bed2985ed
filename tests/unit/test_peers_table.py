"""The race against Hugging Face's decoding: whose turn it is, what is compared, and the ratios."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from specsplit.analysis.peers_table import summarize_peers, write_peers
from specsplit.client.pipeline import TextWriter
from specsplit.client.result import Round, SpeculativeResult
from specsplit.errors import UserError
from specsplit.experiment.peer_race import Ours, PeerRecord, check_peers, race
from specsplit.experiment.peers import Peer, PeerText
from specsplit.experiment.records import Request
from specsplit.settings.run import OrchestratorConfig

REQUESTS = [Request("a", "chat", [5, 6]), Request("b", "code", [7])]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("generate", "hf_generate"),
        ("assisted", "hf_assisted"),
        ("assisted-5", "hf_assisted_5"),
        ("prompt-lookup", "hf_prompt_lookup"),
    ],
)
def test_peers_have_names(text: str, label: str) -> None:
    assert Peer.parse(text).label == label


@pytest.mark.parametrize("text", ["", "assisted-0", "assisted-x", "generate-5", "beam"])
def test_other_peers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="none of generate, assisted, assisted-N, prompt-lookup"):
        Peer.parse(text)


class FakeHuggingFace:
    """Writes three tokens, the last one wrong for request b."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def write(self, peer: Peer, prompt_ids: Sequence[int], *, max_tokens: int, stop_ids: Sequence[int]) -> PeerText:
        self.log.append(peer.label)
        assert (max_tokens, list(stop_ids)) == (3, [2])
        last = 9 if list(prompt_ids) == [7] else 3
        return PeerText([1, 1, last], "length", [1, 1, 1], [10.0, 30.0, 50.0], 10.0)

    def margin(self, context: Sequence[int], token: int, other: int) -> float:
        assert (list(context), token, other) == ([7, 1, 1], 3, 9)
        return 0.25


@pytest.fixture
def raced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[list[str], list[dict[str, str]]]]:
    def run(**options: Any) -> tuple[list[str], list[dict[str, str]]]:
        log: list[str] = []

        def write(self: TextWriter, prompt_ids: list[int], config: OrchestratorConfig, **_: Any) -> SpeculativeResult:
            log.append(f"gamma_{config.gamma}")
            rounds = [Round(1, 1, 1, 1, *[0.0] * 7), Round(2, 0, 0, 0, *[0.0] * 7)]
            return SpeculativeResult([1, 1, 3], "length", rounds, 20.0, 40.0)

        monkeypatch.setattr(TextWriter, "__enter__", lambda self: self)
        monkeypatch.setattr(TextWriter, "__exit__", lambda *_: None)
        monkeypatch.setattr(TextWriter, "write", write)
        monkeypatch.setattr("specsplit.experiment.peer_race.SETTLE_S", 0.0)
        worker: Any = SimpleNamespace(address="x", description=SimpleNamespace(max_context=64, eos_token_ids=[2]))
        configs = [OrchestratorConfig(gamma=gamma, max_output_tokens=3) for gamma in (0, 4)]
        ours = [Ours(f"gamma_{c.gamma}", c, worker if c.gamma else None, worker) for c in configs]
        output = tmp_path / "peers_requests.csv"
        race(REQUESTS, ours, [Peer("generate")], FakeHuggingFace(log), output, **options)  # type: ignore[arg-type]
        with output.open(newline="") as file:
            return log, list(csv.DictReader(file))

    return run


def test_every_contender_takes_its_turn_on_every_request_in_a_moving_order(raced) -> None:
    log, rows = raced(warmup=1, repeats=2)
    names = ["gamma_0", "gamma_4", "hf_generate"]
    assert log[:3] == names  # the warm-up
    turns = [log[start : start + 3] for start in range(3, len(log), 3)]
    assert turns == [names, [*names[1:], names[0]], [*names[1:], names[0]], [names[2], *names[:2]]]
    assert [(row["contender"], row["place"]) for row in rows[3:6]] == [
        ("gamma_4", "1"),
        ("hf_generate", "2"),
        ("gamma_0", "3"),
    ]
    assert [(row["request_id"], row["repeat"]) for row in rows[::3]] == [("a", "1"), ("b", "1"), ("a", "2"), ("b", "2")]


def test_texts_are_compared_with_our_target_alone(raced) -> None:
    _, rows = raced(warmup=0, repeats=1)
    found = {(row["contender"], row["request_id"]): row for row in rows}
    assert all(row["identical"] == "True" for row in rows if row["engine"] == "specsplit")
    same, other = found["hf_generate", "a"], found["hf_generate", "b"]
    assert (same["identical"], same["first_divergence"], same["margin"]) == ("True", "", "")
    assert (other["identical"], other["first_divergence"], other["margin"]) == ("False", "2", "0.25")


def test_times_mean_the_same_for_both_engines(raced) -> None:
    _, rows = raced(warmup=0, repeats=1)
    ours = next(row for row in rows if row["contender"] == "gamma_4")
    theirs = next(row for row in rows if row["contender"] == "hf_generate")
    # Ours: two tokens after 20 ms, one after 40. Theirs: one after 10, 30 and 50 ms each.
    assert [float(ours[name]) for name in ("ttft_ms", "tpot_ms", "itl_ms", "total_latency_ms")] == [20, 10, 20, 40]
    assert [float(theirs[name]) for name in ("ttft_ms", "tpot_ms", "itl_ms", "total_latency_ms")] == [10, 20, 20, 50]
    assert (ours["num_rounds"], theirs["num_rounds"]) == ("2", "3")


def table(rows: Sequence[tuple[str, str, int, float, bool]]) -> pd.DataFrame:
    """contender, request, repeat, total latency (10 ms of it TTFT), identical; 11 tokens each."""
    return pd.DataFrame(
        [
            {
                **dict.fromkeys(field.name for field in fields(PeerRecord)),
                "contender": contender,
                "engine": "transformers" if contender.startswith("hf") else "specsplit",
                "request_id": request,
                "repeat": repeat,
                "generated_tokens": 11,
                "num_rounds": 5,
                "ttft_ms": 10.0,
                "tpot_ms": (total - 10) / 10,
                "itl_ms": (total - 10) / 10,
                "total_latency_ms": total,
                "identical": identical,
            }
            for contender, request, repeat, total, identical in rows
        ]
    )


def test_ratios_are_of_medians_over_repeats() -> None:
    rows = []
    times = (("a", 110.0, 210.0), ("b", 60.0, 110.0), ("c", 210.0, 410.0))
    for request, ours, theirs in (*times, *((name + "2", *both) for name, *both in times)):
        for repeat, noise in ((1, 0.0), (2, 500.0), (3, 0.0)):  # one slow repeat decides nothing
            rows.append(("hf_assisted", request, repeat, theirs + noise, request[0] != "c"))
            rows.append(("gamma_5", request, repeat, ours + noise, True))
            rows.append(("gamma_0", request, repeat, 2 * theirs, True))
    summary = summarize_peers(table(rows), bootstrap_samples=200).set_index("contender")
    assert list(summary.index) == ["gamma_0", "gamma_5", "hf_assisted"]
    assert summary.loc["gamma_5", "itl_vs_hf_assisted"] == pytest.approx(10 / 20)
    assert summary.loc["gamma_5", "itl_vs_hf_assisted_ci_low"] == pytest.approx(0.5)  # half on every prompt
    assert summary.loc["gamma_5", "latency_vs_hf_assisted"] == pytest.approx(380 / 730)
    assert summary.loc["hf_assisted", "itl_vs_hf_assisted"] == 1
    assert summary.loc["hf_assisted", "identical"] == pytest.approx(2 / 3)
    assert summary.loc["gamma_5", "tpot_ms_median"] == pytest.approx(10.0)
    assert list(summary["repeats"]) == [3, 3, 3]


def test_texts_too_short_for_a_time_per_token_count_on_neither_side() -> None:
    requests = table([(name, request, 1, 110.0, True) for name in ("gamma_0", "hf_generate") for request in "ab"])
    short = (requests["contender"] == "hf_generate") & (requests["request_id"] == "a")
    requests.loc[short, ["generated_tokens", "tpot_ms", "itl_ms"]] = [1, math.nan, math.nan]
    summary = summarize_peers(requests, bootstrap_samples=100).set_index("contender")
    assert summary.loc["gamma_0", "itl_vs_hf_generate"] == pytest.approx(1.0)
    assert math.isnan(summary.loc["gamma_0", "itl_vs_hf_generate_ci_low"])  # one request is left


def test_table_and_figure_are_made_from_the_rows(raced, tmp_path: Path) -> None:
    raced(warmup=0, repeats=1)
    written = write_peers(tmp_path, bootstrap_samples=100)
    assert [path.name for path in written] == ["peers.csv", "peers.png", "peers.svg"]
    assert all(path.stat().st_size for path in written)


def test_missing_rows_say_what_makes_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; `specsplit bench --baseline`"):
        write_peers(tmp_path)


def manifest(source: str, weights: str) -> dict[str, Any]:
    return {"name": "m", "source": {"source": source}, "fingerprint": {"weights_sha256": weights}}


@pytest.mark.parametrize(
    ("target", "draft", "message"),
    [
        (None, None, "--target-model is missing"),
        (manifest("local", "w" * 64), None, "--draft-model is missing"),
        (manifest("synthetic", "w" * 64), None, "no weights that Hugging Face could run: name a target with weights"),
        (manifest("local", "w" * 64), manifest("ngram", "w" * 64), "take the peers generate and prompt-lookup"),
        (manifest("local", "x" * 64), None, "a race is between the same models"),
    ],
)
def test_a_race_that_cannot_be_run_is_refused(target: Any, draft: Any, message: str) -> None:
    worker: Any = SimpleNamespace(address="x", description=SimpleNamespace(weights_sha256="w" * 64))
    ours = [Ours("gamma_0", OrchestratorConfig(gamma=0), None, worker)]
    with pytest.raises(UserError, match=message):
        check_peers([Peer("assisted")], ours, {"target": target, "draft": draft})
