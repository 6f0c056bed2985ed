"""Merging the runs of an experiment, what is refused, and the numbers of the summary."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from specsplit.analysis.conclusions import faults_sentence, source_sentences
from specsplit.analysis.configurations import NETWORK
from specsplit.analysis.costs import cost_sentences
from specsplit.analysis.findings import find_best
from specsplit.analysis.measures import TIMES
from specsplit.analysis.merging import merge_runs, read_tables
from specsplit.analysis.tables import METRICS, summarize
from specsplit.client.result import LINK_BYTES, USAGE
from specsplit.errors import UserError
from specsplit.experiment.columns import LATER_COLUMNS, REQUEST_COLUMNS, ROUND_COLUMNS, RequestRecord, RoundRecord
from specsplit.io import write_csv
from specsplit.settings.axes import CONFIGURATION

SETTINGS: dict[str, Any] = {"confidence": 0.95, "bootstrap_samples": 100, "seed": 0}


def a_request(request_id: str, gamma: int | str, **changes: Any) -> RequestRecord:
    depth = 4 if gamma == "auto" else int(gamma)
    values: dict[str, Any] = {
        "prompt_length": 10,
        "generated_tokens": 10,
        "ttft_ms": 100.0,
        "tpot_ms": 100.0,
        "average_acceptance_rate": 0.5 if gamma else None,
        "total_network_idle_ms": 50.0,
        "total_latency_ms": 1000.0,
        "num_rounds": 2,
        "category": "code",
        "finish_reason": "length",
        "drafted_tokens": 2 * depth,
        "accepted_tokens": depth,
        "mean_accepted_length": 1.5,
        "network_idle_fraction": 0.05,
        "draft_compute_ms": 200.0,
        "target_compute_ms": 700.0,
        "mode": "sync",
        "tree": "chain",
        "draft": "draft",
        "sampling": "coupled",
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "rtt_ms": 0.0,
        "jitter_ms": 0.0,
        "seed": 0,
        "speculation_hits": 0,
        "speculation_misses": 0,
        "output_sha256": f"text-of-{request_id}",
    }
    return RequestRecord(request_id=request_id, gamma=gamma, **(values | changes))


def a_round(request_id: str, gamma: int | str, number: int, accepted: int, drafted: int | None = None) -> RoundRecord:
    depth = int(gamma) if drafted is None else drafted
    return RoundRecord(request_id, gamma, number, depth, accepted, depth, 9.0, 8.0, 0.1, 50.0, 48.0, 0.1, 2.8)


def write_run(folder: Path, requests: Sequence[RequestRecord], rounds: Sequence[RoundRecord] = ()) -> Path:
    folder.mkdir(parents=True)
    for name, columns, records in (
        ("requests.csv", REQUEST_COLUMNS, requests),
        ("per_round.csv", ROUND_COLUMNS, rounds),
    ):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(asdict(record) for record in records)
    return folder


def tables(requests: Sequence[RequestRecord], rounds: Sequence[RoundRecord] = ()) -> tuple[pd.DataFrame, pd.DataFrame]:
    """As merge_runs returns them, without the files."""
    frame = pd.DataFrame([asdict(record) for record in requests], columns=REQUEST_COLUMNS)
    frame["average_acceptance_rate"] = frame["average_acceptance_rate"].astype(float)
    text = frame[frame["gamma"] == 0].set_index("request_id")["output_sha256"]
    same = (frame["output_sha256"] == frame["request_id"].map(text)).astype("boolean")
    frame["matches_gamma0"] = same if len(text) else same.mask(same.notna())
    own = pd.DataFrame([asdict(record) for record in rounds], columns=ROUND_COLUMNS)
    return frame, own.merge(frame[[*CONFIGURATION, "request_id"]], how="left", on=["gamma", "request_id"])


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Gammas 0 and 2, two requests each; request b differs from the target alone at gamma 2."""
    alone = [a_request("b", 0), a_request("a", 0, ttft_ms=1 / 3)]
    drafted = [a_request("b", 2, output_sha256="other"), a_request("a", 2, tpot_ms=None)]
    return [
        write_run(tmp_path / "runs/gamma_2", drafted, [a_round("b", 2, 1, 2), a_round("a", 2, 0, 0)]),
        write_run(tmp_path / "runs/gamma_0", alone, [a_round("a", 0, 0, 0)]),
    ]


# merge_runs, write_csv, read_tables


def test_merge_sorts_by_gamma_and_keeps_the_order_of_the_files(runs):
    requests, rounds = merge_runs(runs)
    assert list(zip(requests["gamma"], requests["request_id"], strict=True)) == [
        (0, "b"),
        (0, "a"),
        (2, "b"),
        (2, "a"),
    ]
    assert list(zip(rounds["gamma"], rounds["request_id"], strict=True)) == [(0, "a"), (2, "b"), (2, "a")]
    assert tuple(requests.columns) == (*REQUEST_COLUMNS, "matches_gamma0")
    assert tuple(rounds.columns) == (*ROUND_COLUMNS, *CONFIGURATION[1:])
    assert math.isnan(requests["tpot_ms"].iloc[3])


def test_merge_compares_each_text_with_that_of_the_target_alone(runs):
    requests, _ = merge_runs(runs)
    assert requests["matches_gamma0"].to_list() == [True, True, False, True]


def test_without_gamma_0_there_is_nothing_to_compare_with(runs):
    requests, _ = merge_runs(runs[:1])
    assert requests["matches_gamma0"].isna().all()


def test_tables_survive_a_round_trip(runs, tmp_path):
    for run_dirs in (runs, runs[:1]):  # the second has an empty column matches_gamma0
        requests, rounds = merge_runs(run_dirs)
        write_csv(requests, tmp_path / "requests.csv")
        write_csv(rounds, tmp_path / "per_round.csv")
        again, rounds_again = read_tables(tmp_path)
        pd.testing.assert_frame_equal(again, requests)
        pd.testing.assert_frame_equal(rounds_again, rounds)


def test_names_that_look_like_missing_values_or_numbers_stay_text(tmp_path):
    run = write_run(tmp_path / "run", [a_request("NA", 0, category="null"), a_request("007", 0)])
    requests, _ = merge_runs([run])
    assert requests["request_id"].to_list() == ["NA", "007"]
    assert requests["category"].to_list() == ["null", "code"]


def test_a_run_without_rounds_is_a_run(tmp_path):
    requests, rounds = merge_runs([write_run(tmp_path / "run", [a_request("a", 0, num_rounds=0)])])
    assert len(requests) == 1
    assert rounds.empty
    assert rounds["accepted"].dtype == "int64"


def test_written_table_is_stable_and_whole(tmp_path):
    path = tmp_path / "new/folder/table.csv"
    frame = pd.DataFrame({"a": [0.1 + 0.2, math.nan], "b": [1274.0, 1e-9], "c": ["x,y", ""], "d": [1, 2]})
    write_csv(frame, path)
    assert path.read_bytes() == b'a,b,c,d\n0.3,1274,"x,y",1\n,1e-09,,2\n'
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left


def test_failed_write_keeps_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    write_csv(pd.DataFrame({"a": [1]}), path)

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_csv(pd.DataFrame({"a": [2]}), path)
    assert path.read_text() == "a\n1\n"
    assert list(tmp_path.iterdir()) == [path]


# What is refused


def refusal(*run_dirs: Path) -> str:
    with pytest.raises(UserError) as caught:
        merge_runs(run_dirs)
    return str(caught.value)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_no_run_is_refused():
    assert "no run folder given" in refusal()


@pytest.mark.parametrize("name", ["requests.csv", "per_round.csv"])
def test_missing_or_empty_file_says_what_makes_it(runs, name):
    path = runs[0] / name
    path.write_text("")
    assert f"{path}: is empty" in refusal(*runs)
    path.unlink()
    message = refusal(*runs)
    assert f"{path}: no such file" in message
    assert "`specsplit bench`" in message


@pytest.mark.parametrize("name", ["requests.csv", "per_round.csv"])
def test_read_tables_says_what_makes_a_missing_file(runs, tmp_path, name):
    requests, rounds = merge_runs(runs)
    write_csv(requests, tmp_path / "requests.csv")
    write_csv(rounds, tmp_path / "per_round.csv")
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name}: no such file; `specsplit bench` or the workflow"):
        read_tables(tmp_path)


def test_read_tables_wants_merged_tables(runs):
    with pytest.raises(UserError, match="lacks the columns matches_gamma0"):
        read_tables(runs[0])


def test_missing_columns_are_all_named(runs):
    edit(runs[0] / "requests.csv", "ttft_ms,tpot_ms", "ttft,tpot")
    message = refusal(*runs)
    assert f"{runs[0] / 'requests.csv'}: lacks the columns ttft_ms, tpot_ms" in message


def test_unknown_columns_are_left_out(runs):
    path = runs[0] / "requests.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([f"note,{lines[0]}", *(f"hello,{line}" for line in lines[1:])]) + "\n")
    requests, _ = merge_runs(runs)
    assert "note" not in requests.columns
    assert requests["request_id"].to_list() == ["b", "a", "b", "a"]


def test_header_without_requests_is_refused(runs, tmp_path):
    empty = write_run(tmp_path / "empty", [])
    assert f"{empty / 'requests.csv'}: has no request" in refusal(*runs, empty)


def test_cut_off_file_is_refused_with_its_line(runs):
    path = runs[1] / "requests.csv"
    path.write_text(path.read_text()[:-30])
    assert f"{path}, line 3: " in refusal(*runs)


@pytest.mark.parametrize(
    ("column", "text", "wanted"),
    [
        ("gamma", "two", "a whole number or auto"),
        ("num_rounds", "1.5", "a whole number"),
        ("top_p", "", "a finite number"),
        ("total_latency_ms", "", "a finite number"),
        ("total_latency_ms", "inf", "a finite number"),
        ("ttft_ms", "nan", "a finite number or empty"),
    ],
)
def test_bad_cell_is_refused_with_its_place(runs, column, text, wanted):
    path = runs[1] / "requests.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[1][column] = text
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, REQUEST_COLUMNS)
        table.writeheader()
        table.writerows(rows)
    assert f"{path}, line 3, column {column}: {text!r} is not {wanted}" in refusal(*runs)


def test_binary_file_is_refused(runs):
    (runs[0] / "per_round.csv").write_bytes(b"\xff\xfe\x00\x01")
    assert f"{runs[0] / 'per_round.csv'}: cannot be read as a CSV table" in refusal(*runs)


def test_request_that_occurs_twice_is_refused_with_both_files(runs, tmp_path):
    again = write_run(tmp_path / "again", [a_request("a", 2)])
    message = refusal(*runs, again)
    assert "gamma 2, request_id a occurs 2 times" in message
    assert str(runs[0] / "requests.csv") in message
    assert str(again / "requests.csv") in message


def test_same_folder_twice_is_refused(runs):
    assert "occurs 2 times" in refusal(*runs, runs[0])


def test_round_that_occurs_twice_is_refused(tmp_path):
    run = write_run(tmp_path / "run", [a_request("a", 2)], [a_round("a", 2, 0, 1), a_round("a", 2, 0, 2)])
    assert "gamma 2, request_id a, round 0 occurs 2 times" in refusal(run)


def test_request_missing_at_one_gamma_is_named_with_its_file(runs, tmp_path):
    short = write_run(tmp_path / "gamma_5", [a_request("a", 5)])
    message = refusal(*runs, short)
    assert f"{short / 'requests.csv'}: gamma 5 lacks 1 of 2 requests" in message
    assert ": b;" in message


def test_long_lists_are_shortened(tmp_path):
    every = write_run(tmp_path / "gamma_0", [a_request(f"r{i}", 0) for i in range(9)])
    one = write_run(tmp_path / "gamma_1", [a_request("r0", 1)])
    assert "r1, r2, r3, r4, r5, and 3 more" in refusal(every, one)


def test_round_of_an_unknown_request_is_refused(tmp_path):
    run = write_run(tmp_path / "run", [a_request("a", 2)], [a_round("b", 2, 0, 1)])
    message = refusal(run)
    assert f"{run / 'per_round.csv'}: has a round of request b at gamma 2" in message


# summarize


def test_summary_has_one_row_a_gamma_and_its_columns():
    requests, rounds = tables([a_request(i, g) for g in (3, 0, 1) for i in "ab"], [a_round("a", 3, 0, 1)])
    summary = summarize(requests, rounds, bootstrap_samples=100)
    assert summary["gamma"].to_list() == [0, 1, 3]
    expected = ["gamma", "mode", "tree", "draft", "sampling", "temperature", "top_k", "top_p", *NETWORK]
    expected += ["setup", "requests", "compared", "repeats", "generated_tokens"]
    for name in ("speedup", "speedup_over_streamed", "speedup_over_colocated"):
        expected += [name, *(f"{name}_{kind}_{end}" for kind in ("ci", "joint") for end in ("low", "high"))]
    for metric in METRICS:
        expected += [f"{metric}_{part}" for part in ("mean", "ci_low", "ci_high", "median")]
        expected += [f"{metric}_{part}" for part in ("p90", "p99") if metric in TIMES]
    expected += ["inter_chunk_ms_median", "inter_chunk_ms_p90", "inter_chunk_ms_p99"]
    expected += ["tokens_per_second", *(f"{name}_per_{unit}" for name in LINK_BYTES for unit in ("token", "round"))]
    expected += [f"{name}_per_token" for name in USAGE]
    expected += ["speculation_hits", "speculation_misses"]
    expected += ["hit_rate", "hit_rate_ci_low", "hit_rate_ci_high"]
    expected += [f"acceptance_length{part}" for part in ("", "_ci_low", "_ci_high", "_mean")]
    expected += [f"draft_acceptance_rate{part}" for part in ("", "_ci_low", "_ci_high")]
    expected += [f"draft_share_{source}" for source in ("session", "global", "lookup", "model", "none")]
    for source in ("session", "global", "lookup", "model"):
        expected += [f"draft_acceptance_rate_{source}{part}" for part in ("", "_ci_low", "_ci_high")]
    expected += [f"{name}_{i}" for name in ("acceptance_at", "joint_acceptance_at") for i in (1, 2, 3)]
    expected += [f"rounds_accepting_{i}" for i in range(4)]
    expected += ["lossless", "lossless_compared", "reference_ms_per_token", "reference_drift", "reference_drifted"]
    expected += ["baselines_lossless", "baselines_compared", "baselines_failed", "failed_requests", "worker_failures"]
    assert list(summary.columns) == expected


def test_speedup_is_the_ratio_of_milliseconds_a_token():
    requests, rounds = tables(
        [
            a_request("a", 0, total_latency_ms=1000.0, generated_tokens=10),
            a_request("b", 0, total_latency_ms=3000.0, generated_tokens=30),  # 100 ms a token in all
            a_request("a", 4, total_latency_ms=600.0, generated_tokens=10),
            a_request("b", 4, total_latency_ms=1000.0, generated_tokens=22),  # 50 ms a token in all
        ]
    )
    alone, drafted = summarize(requests, rounds).to_dict("records")
    assert (alone["speedup"], alone["speedup_ci_low"], alone["speedup_ci_high"]) == (1.0, 1.0, 1.0)
    assert drafted["speedup"] == pytest.approx(2.0)
    assert math.isnan(drafted["speedup_ci_low"])  # of two requests
    assert drafted["tokens_per_second"] == pytest.approx(20.0)
    assert drafted["generated_tokens"] == 32


def test_speedup_pairs_requests_by_name_not_by_place():
    slow = {name: 100.0 * 2**place for place, name in enumerate("abcdef")}
    requests, rounds = tables(
        [a_request(i, 0, total_latency_ms=slow[i]) for i in "abcdef"]
        + [a_request(i, 2, total_latency_ms=slow[i] / 2) for i in "cabfed"]
    )
    row = summarize(requests, rounds, bootstrap_samples=200).iloc[1]
    assert row["speedup_ci_low"] == pytest.approx(2.0)
    assert row["speedup_ci_high"] == pytest.approx(2.0)
    assert (row["speedup_joint_low"], row["speedup_joint_high"]) == pytest.approx((2.0, 2.0))


def test_without_gamma_0_speedup_and_lossless_are_empty():
    summary = summarize(*tables([a_request("a", 1), a_request("b", 1)]), bootstrap_samples=50)
    assert summary[["speedup", "speedup_ci_low", "speedup_ci_high", "lossless"]].isna().all(axis=None)


def test_lossless_is_the_share_of_equal_texts():
    requests, rounds = tables(
        [a_request(i, 0) for i in "abcd"]
        + [a_request(i, 2, output_sha256="other" if i == "c" else f"text-of-{i}") for i in "abcd"]
    )
    assert summarize(requests, rounds, bootstrap_samples=50)["lossless"].to_list() == [1.0, 0.75]


def test_mean_median_and_percentiles():
    times = [*[20.0] * 4, 30.0, *[30.0] * 4, 130.0]
    requests, rounds = tables([a_request(str(i), 0, ttft_ms=time) for i, time in enumerate(times)])
    row = summarize(requests, rounds).iloc[0]
    assert row["ttft_ms_mean"] == pytest.approx(36.0)
    assert row["ttft_ms_median"] == 30.0
    assert row["ttft_ms_p90"] == pytest.approx(40.0)  # 0.1 of the way from 30 to 130
    assert math.isnan(row["ttft_ms_p99"])  # of ten requests none is above it
    assert 10.0 < row["ttft_ms_ci_low"] < 36.0 < row["ttft_ms_ci_high"] < 130.0


def test_repeats_count_once_with_their_median(tmp_path):
    def run(gamma: int, *latencies: float, **last: Any) -> list[RequestRecord]:
        return [
            a_request(name, gamma, repeat=repeat, total_latency_ms=ms, **(last if repeat == len(latencies) else {}))
            for repeat, ms in enumerate(latencies, start=1)
            for name in "ab"
        ]

    drafted = run(2, 400.0, 500.0, 90000.0, output_sha256="other")
    runs = [write_run(tmp_path / "a", run(0, 1000.0, 9000.0, 1000.0)), write_run(tmp_path / "b", drafted)]
    requests, rounds = merge_runs(runs)
    assert len(requests) == 12
    summary = summarize(requests, rounds, bootstrap_samples=100)
    assert list(summary["requests"]) == [2, 2]
    assert list(summary["repeats"]) == [3, 3]
    assert list(summary["generated_tokens"]) == [20, 20]
    assert list(summary["total_latency_ms_mean"]) == [1000.0, 500.0]
    assert summary["speedup"].iloc[1] == pytest.approx(2.0)
    assert list(summary["lossless"]) == [1.0, 0.0]  # one repeat that differs is enough


def test_a_repeat_that_is_missing_is_named(tmp_path):
    full = [a_request("a", 0), a_request("a", 0, repeat=2)]
    message = refusal(write_run(tmp_path / "a", full), write_run(tmp_path / "b", [a_request("a", 2)]))
    assert "gamma 2 lacks 1 of 2 requests that other runs have: a (repeat 2)" in message


def test_chunks_are_apart_by_the_time_between_arrivals():
    rounds = [
        replace(a_round(name, 3, number, 1), arrived_ms=ms, repeat=repeat)
        for name, repeat, times in (("a", 1, (100.0, 140.0, 200.0)), ("a", 2, (50.0, 90.0)), ("b", 1, (70.0,)))
        for number, ms in enumerate(times, start=1)
    ]
    summary = summarize(*tables([a_request("a", 3), a_request("b", 3)], rounds), bootstrap_samples=100)
    row = summary.iloc[0]
    assert row["inter_chunk_ms_median"] == pytest.approx(40.0)
    assert math.isnan(row["inter_chunk_ms_p90"])  # of three gaps


def test_missing_values_are_left_out_and_an_empty_metric_is_empty():
    requests, rounds = tables([a_request("a", 0, tpot_ms=None), a_request("b", 0, tpot_ms=80.0)])
    row = summarize(requests, rounds, bootstrap_samples=50).iloc[0]
    assert row["tpot_ms_mean"] == row["tpot_ms_median"] == 80.0
    assert math.isnan(row["tpot_ms_ci_low"])  # one value has no interval
    assert row.filter(like="average_acceptance_rate").isna().all()


def test_acceptance_at_a_position_counts_only_rounds_that_reached_it():
    rounds = [
        a_round("a", 3, 0, accepted=3),
        a_round("a", 3, 1, accepted=1),
        a_round("a", 3, 2, accepted=0),
        a_round("a", 3, 3, accepted=1, drafted=1),  # a short last draft says nothing about position 2
    ]
    requests, per_round = tables([a_request("a", 0), a_request("a", 1), a_request("a", 3)], rounds)
    summary = summarize(requests, per_round, bootstrap_samples=50)
    assert summary.iloc[2][["acceptance_at_1", "acceptance_at_2", "acceptance_at_3"]].to_list() == [
        3 / 4,
        1 / 2,
        1.0,
    ]
    assert summary.iloc[:2].filter(like="acceptance_at_").isna().all(axis=None)


def test_summary_repeats_with_its_seed():
    requests, rounds = tables(
        [a_request(str(i), gamma, total_latency_ms=1e3 + i * i * gamma) for gamma in (0, 1, 2) for i in range(20)]
    )
    first = summarize(requests, rounds, bootstrap_samples=200, seed=3)
    pd.testing.assert_frame_equal(summarize(requests, rounds, bootstrap_samples=200, seed=3), first)
    other = summarize(requests, rounds, bootstrap_samples=200, seed=4)
    assert other["speedup_joint_low"][1] != first["speedup_joint_low"][1]
    assert other["speedup_ci_low"][1] == first["speedup_ci_low"][1]


def test_no_token_at_all_gives_empty_ratios_not_an_error():
    silent = {"generated_tokens": 0, "ttft_ms": None, "tpot_ms": None, "mean_accepted_length": None}
    requests, rounds = tables([a_request(i, g, **silent) for g in (0, 2) for i in "ab"])
    row = summarize(requests.astype({"mean_accepted_length": float}), rounds, bootstrap_samples=50).iloc[1]
    assert math.isnan(row["speedup"])
    assert math.isnan(row["speedup_ci_low"])
    assert row["tokens_per_second"] == 0.0


# More axes than gamma


def write_sweep(folder: Path, *runs: Sequence[RequestRecord]) -> list[Path]:
    """One run folder for each configuration, with a round for each request that drafted."""
    folders = []
    for number, requests in enumerate(runs):
        rounds = [a_round(r.request_id, r.gamma, 1, 1, 4) for r in requests if r.gamma != 0]
        folders.append(write_run(folder / f"run-{number}", requests, rounds))
    return folders


def test_configurations_of_one_gamma_are_kept_apart(tmp_path):
    sync = [a_request("a", 2)]
    ahead = [a_request("a", 2, mode="lookahead", tree="3x2", speculation_hits=3, speculation_misses=1)]
    alone = [a_request("a", 0)]
    auto = [a_request("a", "auto")]
    requests, rounds = merge_runs(write_sweep(tmp_path, ahead, auto, sync, alone))
    assert requests[["gamma", "mode", "tree"]].to_numpy().tolist() == [
        [0, "sync", "chain"],
        [2, "sync", "chain"],
        ["auto", "sync", "chain"],
        [2, "lookahead", "3x2"],
    ]
    named = ["gamma", "mode", "tree"]
    assert rounds[named].to_numpy().tolist() == requests[named].to_numpy().tolist()[1:]
    summary = summarize(requests, rounds, bootstrap_samples=50)
    assert summary["gamma"].to_list() == [0, 2, "auto", 2]
    assert summary["speculation_hits"].to_list() == [0, 0, 0, 3]
    assert summary["hit_rate"].isna().to_list() == [True, True, True, False]
    assert summary["hit_rate"].iloc[3] == 0.75
    write_csv(summary, tmp_path / "summary.csv")
    gammas = [line.split(",")[0] for line in (tmp_path / "summary.csv").read_text().splitlines()]
    assert gammas == ["gamma", "0", "2", "auto", "2"]


def test_curves_stand_together_in_order_of_sampling_network_mode_tree_and_gamma(tmp_path):
    axes = [
        {},
        {"mode": "overlap"},
        {"mode": "lookahead"},
        {"tree": "3x2"},
        {"rtt_ms": 5.0},
        {"rtt_ms": 14.0},
        {"temperature": 0.7},
    ]
    runs = [[a_request("a", gamma, **axis)] for axis in axes[::-1] for gamma in ("auto", 12, 2)]
    requests, _ = merge_runs(write_sweep(tmp_path, *runs))
    found = requests[["temperature", "rtt_ms", "mode", "tree", "gamma"]].to_numpy().tolist()
    curves = [
        [0.0, 0.0, "sync", "chain"],
        [0.0, 0.0, "sync", "3x2"],
        [0.0, 0.0, "overlap", "chain"],
        [0.0, 0.0, "lookahead", "chain"],
        [0.0, 5.0, "sync", "chain"],
        [0.0, 14.0, "sync", "chain"],
        [0.7, 0.0, "sync", "chain"],
    ]
    assert found == [[*curve, gamma] for curve in curves for gamma in (2, 12, "auto")]


def test_swept_tables_survive_a_round_trip(tmp_path):
    runs = [
        [a_request(i, g, mode=m, rtt_ms=0.1 + 0.2) for i in "ab"]
        for g, m in ((0, "sync"), (3, "overlap"), ("auto", "lookahead"))
    ]
    requests, rounds = merge_runs(write_sweep(tmp_path, *runs))
    write_csv(requests, tmp_path / "requests.csv")
    write_csv(rounds, tmp_path / "per_round.csv")
    again, rounds_again = read_tables(tmp_path)
    pd.testing.assert_frame_equal(again, requests)
    pd.testing.assert_frame_equal(rounds_again, rounds)


def test_speedup_is_against_the_target_alone_on_the_same_network_and_at_the_same_temperature(tmp_path):
    def run(gamma: int, latency: float, **axis: Any) -> list[RequestRecord]:
        return [a_request(i, gamma, total_latency_ms=latency, **axis) for i in "ab"]

    far, warm = {"rtt_ms": 50.0}, {"temperature": 0.7, "top_k": 20}
    requests, rounds = merge_runs(
        write_sweep(
            tmp_path,
            run(0, 1000.0),
            run(4, 500.0, mode="overlap"),
            run(0, 3000.0, **far),
            run(4, 1000.0, mode="overlap", **far),
            run(0, 1200.0, **warm),
            run(4, 2400.0, tree="3x2", **warm),
            run(4, 500.0, jitter_ms=2.0),
        )
    )
    summary = summarize(requests, rounds, bootstrap_samples=50)
    named = summary.set_index(["temperature", "rtt_ms", "jitter_ms", "gamma"])["speedup"]
    assert named[0.0, 0.0, 0.0, 4] == pytest.approx(2.0)
    assert named[0.0, 50.0, 0.0, 4] == pytest.approx(3.0)
    assert named[0.7, 0.0, 0.0, 4] == pytest.approx(0.5)
    assert math.isnan(named[0.0, 0.0, 2.0, 4])  # nothing was run alone on that network


def test_text_is_compared_over_networks_but_not_over_temperatures(tmp_path):
    warm = {"temperature": 0.7, "output_sha256": "warm"}
    requests, rounds = merge_runs(
        write_sweep(
            tmp_path,
            [a_request("a", 0)],
            [a_request("a", 3, rtt_ms=14.0)],  # no target alone there
            [a_request("a", 3, mode="overlap", output_sha256="other")],
            [a_request("a", 0, **warm)],
            [a_request("a", 3, **warm)],
            [a_request("a", 3, top_k=5, temperature=1.5)],  # nor with this sampling
        )
    )
    matches = requests.set_index(["temperature", "rtt_ms", "mode", "gamma"])["matches_gamma0"]
    assert matches[0.0, 14.0, "sync", 3]
    assert not matches[0.0, 0.0, "overlap", 3]
    assert matches[0.7, 0.0, "sync", 3]
    assert pd.isna(matches[1.5, 0.0, "sync", 3])
    lossless = summarize(requests, rounds, bootstrap_samples=50).set_index(["temperature", "mode", "gamma"])["lossless"]
    assert lossless[0.0, "overlap", 3] == 0.0
    assert math.isnan(lossless[1.5, "sync", 3])


@pytest.mark.parametrize(("temperature", "expected"), [(0.0, [True, False]), (0.7, [None, None])])
def test_rejection_sampling_is_compared_only_where_it_is_greedy(tmp_path, temperature, expected):
    runs = [
        [a_request("a", gamma, sampling="rejection", temperature=temperature, output_sha256=text)]
        for gamma, text in ((0, "x"), (2, "y"))
    ]
    requests, rounds = merge_runs(write_sweep(tmp_path, *runs))
    assert [None if pd.isna(match) else match for match in requests["matches_gamma0"]] == expected
    summary = summarize(requests, rounds, bootstrap_samples=50)
    assert summary["lossless"].isna().all() == (temperature > 0)
    assert summary["speedup"].to_list() == [1.0, 1.0]


def test_greedy_runs_are_compared_whatever_the_other_sampling_settings_say(tmp_path):
    runs = [[a_request("a", 0)], [a_request("a", 2, top_k=40, top_p=0.9, sampling="rejection")]]
    requests, rounds = merge_runs(write_sweep(tmp_path, *runs))
    assert requests["matches_gamma0"].all()
    assert summarize(requests, rounds, bootstrap_samples=50)["speedup"].notna().all()


def test_acceptance_columns_reach_as_deep_as_auto_drafted(tmp_path):
    runs = [[a_request("a", 0)], [a_request("a", 2)], [a_request("a", "auto")]]
    requests, rounds = merge_runs(write_sweep(tmp_path, *runs))  # each round drafts 4 and accepts 1
    summary = summarize(requests, rounds, bootstrap_samples=50)
    auto = summary[summary["gamma"] == "auto"].iloc[0]
    assert [name for name in summary if name.startswith("acceptance_at_")][-1] == "acceptance_at_4"
    assert auto[["acceptance_at_1", "acceptance_at_2"]].to_list() == [1.0, 0.0]
    assert math.isnan(auto["acceptance_at_3"])


def test_folder_of_two_configurations_is_refused(tmp_path):
    run = write_run(tmp_path / "run", [a_request("a", 1), a_request("b", 1, mode="overlap")])
    assert f"{run / 'requests.csv'}: mixes requests with mode overlap, sync" in refusal(run)


def test_a_configuration_is_named_by_what_is_not_plain(tmp_path):
    axis = {"mode": "overlap", "rtt_ms": 14.0}
    runs = write_sweep(tmp_path, [a_request("a", 2, **axis)], [a_request("a", 2, **axis)])
    assert "gamma 2, mode overlap, rtt_ms 14.0, request_id a occurs 2 times" in refusal(*runs)


# Settings


def test_settings_are_checked():
    requests, rounds = tables([a_request("a", 0)])
    with pytest.raises(UserError, match="confidence is 2"):
        summarize(requests, rounds, confidence=2)


# Requests that failed.


def failed(request_id: str, gamma: int, **changes: Any) -> RequestRecord:
    means = dict.fromkeys(("ttft_ms", "tpot_ms", "average_acceptance_rate", "mean_accepted_length"))
    error = {"status": "failed", "error_code": "UNAVAILABLE", "error_message": "target worker failed in round 2: gone"}
    values = {**means, **error, "finish_reason": "error", "output_sha256": "part", "total_latency_ms": 9e6, **changes}
    return a_request(request_id, gamma, **{"target_failures": 1, **values})


def test_failed_requests_are_rows_and_in_no_mean(tmp_path):
    alone = [a_request("a", 0), a_request("b", 0), failed("c", 0)]
    drafted = [a_request("a", 2, tpot_ms=50.0), failed("b", 2), a_request("c", 2, draft_failures=2, tpot_ms=70.0)]
    runs = [
        write_run(tmp_path / "0", alone, [a_round(r, 0, 0, 0) for r in "abc"]),
        write_run(tmp_path / "2", drafted, [a_round("a", 2, 1, 2), a_round("b", 2, 0, 2), a_round("c", 2, 1, 2)]),
    ]
    requests, rounds = merge_runs(runs)
    write_csv(requests, tmp_path / "requests.csv")
    write_csv(rounds, tmp_path / "per_round.csv")
    requests, rounds = read_tables(tmp_path)
    assert list(requests["status"]) == ["ok", "ok", "failed", "ok", "failed", "ok"]
    assert requests["matches_gamma0"].astype(object).tolist() == [True, True, pd.NA, True, pd.NA, pd.NA]
    assert requests["error_message"].iloc[2] == "target worker failed in round 2: gone"

    first, second = (row for _, row in summarize(requests, rounds).iterrows())
    assert list(first.index[-2:]) == ["failed_requests", "worker_failures"]
    assert (first["requests"], first["failed_requests"], first["worker_failures"]) == (2, 1, 1)
    assert (second["requests"], second["failed_requests"], second["worker_failures"]) == (2, 1, 3)
    # Compared is a alone: what one of the two configurations did not finish would make it look faster or slower.
    assert (first["compared"], second["compared"]) == (1, 1)
    assert (second["tpot_ms_mean"], second["total_latency_ms_mean"]) == (50.0, 1000.0)
    assert second["acceptance_at_1"] == 1.0  # the round of b drafted one and had none accepted
    assert (second["speedup"], second["lossless"]) == (1.0, 1.0)  # over a alone

    said = faults_sentence(summarize(requests, rounds))
    assert said.startswith(
        "2 requests failed and are in no mean (the target alone: 1; γ = 2: 1); requests.csv says why."
    )
    assert "Workers failed in 4 rounds" in said
    for finding in find_best(requests, rounds, summarize(requests, rounds), **SETTINGS):
        assert finding.sentences()


def test_a_configuration_whose_slowest_requests_failed_does_not_become_the_best():
    slow = {f"p{i}": 1000.0 * (1 + 3 * (i < 6)) for i in range(16)}
    alone = [a_request(name, 0, total_latency_ms=ms) for name, ms in slow.items()]
    equal = [a_request(name, 2, total_latency_ms=ms * 0.9, itl_ms=ms / 10) for name, ms in slow.items()]
    lost = [failed(n, 4) if ms > 1e3 else a_request(n, 4, total_latency_ms=ms, itl_ms=ms / 9) for n, ms in slow.items()]
    requests, rounds = tables([*alone, *equal, *lost])
    summary = summarize(requests, rounds, **SETTINGS)
    assert summary["requests"].to_list() == [16, 16, 10]
    assert summary["compared"].to_list() == [10, 10, 10]
    assert summary["itl_ms_mean"].to_list()[1:] == pytest.approx([100.0, 1000 / 9])
    (finding,) = find_best(requests, rounds, summary, **SETTINGS)
    assert finding.name == "γ = 2"
    assert finding.sentences()[0] == "Compared on the 10 of 16 prompts that every configuration finished."


def test_a_time_that_one_configuration_lacks_is_compared_on_neither_side():
    requests, rounds = tables(
        [
            a_request(n, g, itl_ms=None if (n, g) == ("a", 4) else ms)
            for g in (0, 4)
            for n, ms in (("a", 90.0), ("b", 50.0))
        ]
    )
    summary = summarize(requests, rounds, **SETTINGS)
    assert summary["itl_ms_mean"].to_list() == [50.0, 50.0]
    assert summary["compared"].to_list() == [2, 2]


def test_acceptance_length_is_pooled_and_positions_are_conditional_and_joint():
    rounds = [a_round("a", 3, 1, 3), a_round("a", 3, 2, 1), a_round("b", 3, 1, 0), a_round("b", 3, 2, 0, drafted=0)]
    counts = {"a": (6, 4, 2), "b": (3, 0, 1)}
    requests, per_round = tables(
        [
            a_request(n, 3, drafted_tokens=d, accepted_tokens=k, verifications=v, acceptance_length=1 + k / v)
            for n, (d, k, v) in counts.items()
        ],
        rounds,
    )
    row = summarize(requests, per_round, **SETTINGS).iloc[0]
    assert row["acceptance_length"] == pytest.approx(1 + 4 / 3)  # the round without a draft verifies none
    assert row["acceptance_length_mean"] == pytest.approx((3 + 1) / 2)
    assert row["draft_acceptance_rate"] == pytest.approx(4 / 9)
    assert [row[f"acceptance_at_{i}"] for i in (1, 2, 3)] == pytest.approx([2 / 3, 1 / 2, 1])
    assert [row[f"joint_acceptance_at_{i}"] for i in (1, 2, 3)] == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert [row[f"rounds_accepting_{i}"] for i in range(4)] == [1, 1, 0, 1]
    assert 1 + sum(row[f"joint_acceptance_at_{i}"] for i in (1, 2, 3)) == pytest.approx(row["acceptance_length"])


def test_acceptance_is_told_by_where_drafts_came_from():
    """A draft with prompt lookup is two kinds of drafts: neither stands for the other, and both are said."""
    plan = {"lookup": [(3, 3), (3, 2)], "model": [(3, 0), (2, 1), (1, 0)]}
    rounds = [
        replace(a_round("a", 3, number, accepted, drafted), draft_source=source)
        for number, (source, (drafted, accepted)) in enumerate((s, each) for s, own in plan.items() for each in own)
    ]
    counts = {"drafts_from_lookup": 2, "drafts_from_model": 3, "drafts_from_session": 0}
    requests, per_round = tables([a_request("a", 3, draft="d-lookup2", **counts)], rounds)
    row = (summary := summarize(requests, per_round, **SETTINGS)).iloc[0]
    assert [row[f"draft_share_{source}"] for source in plan] == [0.4, 0.6]
    assert [row[f"draft_acceptance_rate_{source}"] for source in plan] == pytest.approx([5 / 6, 1 / 6])
    assert math.isnan(row["draft_acceptance_rate_session"])
    (said,) = source_sentences(summary)
    assert "d-lookup2 40.0 % were looked up in the text (accepted / drafted tokens: 83.3 %); 60.0 % were the " in said
    assert "not known" in source_sentences(summarize(requests, per_round[:0], **SETTINGS))[0]
    assert source_sentences(summary.assign(draft_share_lookup=math.nan)) == []


def test_tables_of_an_earlier_version_are_read_and_their_acceptance_is_counted_as_now(tmp_path):
    # Five tokens and the end of the text, which the last draft foresaw: accepted 3, of which the user gets 1.
    old = a_request("a", 4, generated_tokens=5, num_rounds=2, finish_reason="eos", accepted_tokens=6, drafted_tokens=8)
    rounds = [a_round("a", 4, 1, 3), a_round("a", 4, 2, 3)]
    run = write_run(tmp_path / "run", [old], rounds)
    lines = list(csv.DictReader((run / "requests.csv").open()))
    kept = [name for name in REQUEST_COLUMNS if name not in LATER_COLUMNS]
    with (run / "requests.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, kept, extrasaction="ignore")
        table.writeheader()
        table.writerows(lines)
    requests, per_round = merge_runs([run])
    row = requests.iloc[0]
    assert (row["accepted_tokens"], row["drafted_tokens"], row["verifications"]) == (4, 5, 2)
    assert (row["acceptance_length"], row["mean_accepted_length"], row["draft_acceptance_rate"]) == (3.0, 2.5, 0.8)
    assert per_round[["drafted", "accepted"]].to_numpy().tolist() == [[4, 3], [1, 1]]
    assert row["bandwidth_mbit"] == 0
    summary = summarize(requests, per_round)
    assert summary["target_sent_bytes_per_token"].isna().all()
    assert cost_sentences(summary) == []


def test_bytes_of_a_token_and_of_a_round_are_over_all_requests():
    alone = [a_request(name, 0, target_sent_bytes=1000, target_received_bytes=300) for name in "ab"]
    sent = {"draft_sent_bytes": 500, "draft_received_bytes": 700, "target_sent_bytes": 240}
    drafted = [a_request("a", 2, **sent), a_request("b", 2, **sent, generated_tokens=30, num_rounds=10)]
    summary = summarize(*tables([*alone, *drafted]))
    row = summary[summary["gamma"] == 2].iloc[0]
    assert row["draft_sent_bytes_per_token"] == 1000 / 40
    assert row["draft_received_bytes_per_round"] == pytest.approx(1400 / 12)
    assert cost_sentences(summary) == [
        "Bytes per token: with the target alone 100 to the target worker, 30.0 from it; with a draft 12.0 to the "
        "target worker, 0.00 from it and 25.0 to the draft worker, 35.0 from it (messages as serialized, prompts "
        "included, without the headers of gRPC and TCP)."
    ]


def test_without_faults_there_is_nothing_to_say(runs):
    assert faults_sentence(summarize(*merge_runs(runs))) == ""


def test_a_configuration_whose_requests_all_failed_is_refused(tmp_path):
    run = write_run(tmp_path / "2", [failed("a", 2), failed("b", 2)])
    with pytest.raises(UserError, match="every request of gamma 2 failed, the first one with: target worker failed"):
        merge_runs([run])


def test_a_repeat_that_failed_is_not_in_the_median(tmp_path):
    rows = [a_request("a", 0, repeat=n, total_latency_ms=100.0 * n) for n in (1, 2)]
    run = write_run(tmp_path / "0", [*rows, failed("a", 0, repeat=3)])
    (summary,) = (row for _, row in summarize(*merge_runs([run])).iterrows())
    assert (summary["requests"], summary["total_latency_ms_mean"], summary["failed_requests"]) == (1, 150.0, 1)
