"""What is measured beside a run: kept with it, compared within it, and what the sentences make of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pandas import DataFrame

from specsplit.analysis.conclusions import drift_sentence, faults_sentence, lossless_sentence, round_trip_sentences
from specsplit.analysis.findings import find_best
from specsplit.analysis.merging import merge_runs, read_tables
from specsplit.analysis.references import GAMMA0, REFERENCE, speedup_columns
from specsplit.analysis.summary_text import summary_table
from specsplit.analysis.tables import summarize
from specsplit.cli.main import main
from specsplit.client.result import Round, SpeculativeResult
from specsplit.client.writer import TextWriter
from specsplit.errors import UserError, WorkerError
from specsplit.experiment.baselines import Beside
from specsplit.experiment.columns import COLOCATED, FAILED, STREAMED, WORKERS, ReferenceRecord, RequestRecord
from specsplit.experiment.journal import JOURNAL
from specsplit.experiment.records import Request, request_record
from specsplit.experiment.run import Run
from specsplit.experiment.runner import run_requests
from specsplit.io import write_json
from specsplit.provenance.run_file import write_run
from specsplit.rpc.connection import Connection
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig

SETTINGS: dict[str, Any] = {"confidence": 0.95, "bootstrap_samples": 200, "seed": 0}
SETUPS = (STREAMED, COLOCATED)


class Machine:
    """Workers whose texts take as long as `speeds` says, on a machine that slows down by `slower` after `steady` texts.

    speeds: (setup, gamma) -> how many times as fast as gamma 0 in workers. texts: what was written, in order.
    """

    def __init__(self, speeds: dict[tuple[str, Any], float], steady: float = np.inf, slower: float = 1.0) -> None:
        self.speeds, self.steady, self.slower = speeds, steady, slower
        self.texts: list[tuple[str, Any, int]] = []
        self.fails: Callable[[tuple[str, Any, int]], bool] = lambda text: False
        self.random = np.random.default_rng(0)

    def text(self, setup: str, prompt: Sequence[int], config: OrchestratorConfig) -> SpeculativeResult:
        self.texts.append((setup, config.gamma, prompt[0]))
        usual = 100.0 * (1 + prompt[0] % 5) * float(np.exp(self.random.normal(0, 0.05)))
        total = usual / self.speeds[setup, config.gamma] * (self.slower if len(self.texts) > self.steady else 1.0)
        drafted = 3 if config.gamma == "auto" else int(config.gamma)
        first, second = (Round(n, drafted, 0, drafted, 0, 0, 0, 0, 0, 0, 0, arrived_ms=total * n / 2) for n in (1, 2))
        result = SpeculativeResult([7, prompt[0]], "length", [first, second], total / 2, total)
        if self.fails(self.texts[-1]):
            raise WorkerError("the worker is gone", code="UNAVAILABLE", result=result)
        return result

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(TextWriter, "write", lambda _, prompt, config, **more: self.text(WORKERS, prompt, config))
        monkeypatch.setattr(
            TextWriter, "stream_target", lambda _, prompt, config, **more: self.text(STREAMED, prompt, config)
        )

    async def write_tokens(
        self, prompt: Sequence[int], config: OrchestratorConfig, *, controller: Any, on_tokens: Any = None
    ) -> SpeculativeResult:
        assert (config.rtt_ms, config.jitter_ms) == (0, 0)
        return self.text(COLOCATED, prompt, config)


class Words:
    sha256 = "f" * 64

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))


def run(
    machine: Machine,
    folder: Path,
    gamma: int | str,
    prompts: int = 16,
    setups: Sequence[str] = SETUPS,
    repeats: int = 1,
    **settings: Any,
) -> Path:
    nobody: Any = SimpleNamespace(Describe=lambda *_, **__: pb.DescribeReply())
    pair: Any = machine
    codec: Any = Words()
    target = Connection("target", "127.0.0.1:1", nobody, nobody, pb.DescribeReply(role="target"))
    config = OrchestratorConfig(gamma=gamma, **settings)
    requests = [Request(f"p{i:02}", "chat", [i]) for i in range(prompts)]
    beside = Beside(setups, pair)
    run_requests(Run(requests, {"target": target}, codec, config, 0, repeats, beside=beside), folder)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


SPEEDS = {
    **{(WORKERS, 0): 1.0, (WORKERS, 2): 1.3, (WORKERS, 5): 0.8, (WORKERS, "auto"): 1.2},
    (STREAMED, 0): 1.1,
    **{(COLOCATED, 0): 1.2, (COLOCATED, 2): 1.5, (COLOCATED, 5): 0.9, (COLOCATED, "auto"): 1.4},
}


# ---- a run


def test_a_run_measures_its_baselines_request_by_request_in_alternating_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = Machine(SPEEDS)
    machine.patch(monkeypatch)
    folder = run(machine, tmp_path / "gamma_2", 2, prompts=5, rtt_ms=14.0)
    turns = [machine.texts[place : place + 4] for place in range(0, 20, 4)]
    assert [{prompt for _, _, prompt in turn} for turn in turns] == [{n} for n in range(5)]
    wanted = {(WORKERS, 2), (WORKERS, 0), (STREAMED, 0), (COLOCATED, 2)}
    assert all({text[:2] for text in turn} == wanted for turn in turns)
    assert [turn[0][:2] for turn in turns][:4] == [(WORKERS, 2), (WORKERS, 0), (STREAMED, 0), (COLOCATED, 2)]
    table = rows(folder / REFERENCE)
    assert [(row["request_id"], row["setup"], row["gamma"]) for row in table[:3]] == [
        ("p00", WORKERS, "0"),
        ("p00", STREAMED, "0"),
        ("p00", COLOCATED, "2"),
    ]
    assert len(table) == 15
    assert {row["rtt_ms"] for row in table} == {"14.0"}


def test_gamma_0_is_its_own_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(SPEEDS)
    machine.patch(monkeypatch)
    folder = run(machine, tmp_path / "gamma_0", 0, prompts=2)
    assert {text[:2] for text in machine.texts} == {(WORKERS, 0), (STREAMED, 0), (COLOCATED, 0)}
    assert len(machine.texts) == 6
    assert {row["setup"] for row in rows(folder / REFERENCE)} == set(SETUPS)
    run(machine, tmp_path / "bare", 0, prompts=2, setups=())
    assert rows(tmp_path / "bare" / REFERENCE) == []
    assert (tmp_path / "bare" / REFERENCE).exists()


@pytest.mark.parametrize(
    "stopped_at", [n if n in (5, 8) else pytest.param(n, marks=pytest.mark.slow) for n in range(1, 12)]
)
def test_a_run_that_is_cut_short_goes_on_turn_by_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stopped_at: int
) -> None:
    machine = Machine(SPEEDS)
    machine.patch(monkeypatch)

    def stop(text: tuple[str, Any, int]) -> bool:
        if len(machine.texts) == stopped_at:
            raise KeyboardInterrupt
        return False

    machine.fails = stop
    with pytest.raises(KeyboardInterrupt):
        run(machine, tmp_path / "gamma_2", 2, prompts=3)
    assert not (tmp_path / "gamma_2" / REFERENCE).exists()
    done = (stopped_at - 1) // 4
    machine.fails = lambda text: False
    machine.texts.clear()
    folder = run(machine, tmp_path / "gamma_2", 2, prompts=3)
    # A turn that was cut in two is measured anew: its texts are compared, so they are of one time.
    assert len(machine.texts) == (3 - done) * 4
    assert [row["request_id"] for row in rows(folder / REFERENCE)] == [f"p{n:02}" for n in range(3) for _ in range(3)]
    assert not (folder / JOURNAL).exists()


def test_a_baseline_that_fails_is_a_row_and_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(SPEEDS)
    machine.patch(monkeypatch)
    machine.fails = lambda text: text == (STREAMED, 0, 1)
    folder = run(machine, tmp_path / "gamma_2", 2, prompts=3)
    failed = [row for row in rows(folder / REFERENCE) if row["status"] == FAILED]
    assert [(row["setup"], row["request_id"]) for row in failed] == [(STREAMED, "p01")]
    assert failed[0]["error_code"] == "UNAVAILABLE"
    machine.fails = lambda text: False
    machine.texts.clear()
    run(machine, tmp_path / "gamma_2", 2, prompts=3)
    assert len(machine.texts) == 4
    assert {row["status"] for row in rows(folder / REFERENCE)} == {"ok"}
    machine.fails = lambda text: text[0] == COLOCATED
    with pytest.raises(UserError, match=r"every text of the reference colocated \(setups says"):
        run(machine, tmp_path / "other", 2, prompts=3)


# ---- tables


def sweep(machine: Machine, folder: Path, gammas: Sequence[int] = (0, 2, 5), **options: Any) -> DataFrame:
    """The requests of a sweep, merged and read again."""
    for gamma in gammas:
        rtt = options.get("rtt_ms", 0)
        run(machine, folder / "runs" / f"rtt{rtt}_gamma_{gamma}", gamma, **options)
    return merged(folder)


def read_run(table: Path) -> dict[str, Any]:
    """The run file beside a table, without its hashes."""
    run = json.loads(table.with_name("run.json").read_text())
    return {key: value for key, value in run.items() if key not in ("files", "sha256", "worker_code_sha256")}


def merged(folder: Path) -> DataFrame:
    main(["merge", "--results-dir", str(folder)])
    return read_tables(folder)[0]


def no_rounds(folder: Path) -> DataFrame:
    return read_tables(folder)[1]


def test_the_interval_covers_the_truth_when_the_machine_slows_down_half_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After half of the texts of the second of three runs everything takes 2.5 times as long."""
    machine = Machine(SPEEDS, steady=3 * 16 + 2 * 16, slower=2.5)
    machine.patch(monkeypatch)
    requests = sweep(machine, tmp_path)
    summary = summarize(requests, no_rounds(tmp_path), **SETTINGS)
    covered = []
    for _, row in summary.iterrows():
        own = SPEEDS[row["setup"], row["gamma"]]
        truth = {
            "speedup": own,
            "speedup_over_streamed": own / SPEEDS[STREAMED, 0],
            "speedup_over_colocated": np.nan if row["setup"] == STREAMED else own / SPEEDS[COLOCATED, row["gamma"]],
        }
        for name, value in truth.items():
            if not np.isnan(value):
                covered.append(row[f"{name}_ci_low"] <= value <= row[f"{name}_ci_high"])
                if row["setup"] == WORKERS:
                    assert row[f"{name}_joint_low"] <= row[f"{name}_ci_low"]
                    assert row[f"{name}_ci_high"] <= row[f"{name}_joint_high"]
    assert len(covered) == 20
    assert sum(covered) >= 18  # one in twenty misses by chance
    drift = summary[summary["setup"] == WORKERS]["reference_drift"]
    assert drift.max() - drift.min() > 0.5
    said = drift_sentence(summary)
    assert said.startswith("Warning: the machine was not steady. Gamma 0, which each of 3 runs measured")
    # Against gamma 0 of another run the same texts are off by far.
    plain, rounds = merge_runs([tmp_path / "runs" / f"rtt0_gamma_{gamma}" for gamma in (0, 2, 5)])
    apart = summarize(plain, rounds, **SETTINGS).set_index("gamma")
    assert apart.loc[5, "speedup_ci_high"] < 0.5 * SPEEDS[WORKERS, 5]


@pytest.mark.parametrize("prompts", [8, 16])
@pytest.mark.parametrize("change", [0.0, 0.5])
def test_coverage_with_a_change_in_the_run(prompts: int, change: float) -> None:
    rng = np.random.default_rng(prompts)
    truth, covered, trials = 1.2, 0, 400
    for _ in range(trials):
        usual = np.exp(rng.normal(0, 0.3, prompts))
        slow = np.where(np.arange(prompts) >= change * prompts, 2.0, 1.0)
        noise = np.exp(rng.normal(0, 0.1, (2, prompts)))
        own = DataFrame(
            {
                "total_latency_ms": usual * slow * noise[0] / truth,
                "generated_tokens": 64,
                "gamma0_ms": usual * slow * noise[1],
                "gamma0_tokens": 64,
                "setup": WORKERS,
            }
        )
        row = speedup_columns(own, GAMMA0, 0.95, {}, itself=False)
        covered += row["speedup_ci_low"] <= truth <= row["speedup_ci_high"]
    assert 0.92 <= covered / trials <= 0.985


def test_rows_of_the_summary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(SPEEDS)
    machine.patch(monkeypatch)
    requests = sweep(machine, tmp_path)
    summary = summarize(requests, no_rounds(tmp_path), **SETTINGS)
    assert list(summary[["setup", "gamma"]].itertuples(index=False, name=None)) == [
        *((WORKERS, gamma) for gamma in (0, 2, 5)),
        (STREAMED, 0),
        *((COLOCATED, gamma) for gamma in (0, 2, 5)),
    ]
    by = summary.set_index(["setup", "gamma"])
    assert by.loc[(WORKERS, 0), "speedup"] == 1
    assert by.loc[(STREAMED, 0), "speedup_over_streamed"] == 1
    assert (by.loc[COLOCATED, "speedup_over_colocated"] == 1).all()
    assert by.loc[(WORKERS, 2), "speedup_over_colocated"] == pytest.approx(1.3 / 1.5, rel=0.1)
    assert by.loc[(COLOCATED, 5), "speedup"] == pytest.approx(0.9, rel=0.1)
    assert (by["lossless"] == 1).all()
    assert by.loc[WORKERS, "baselines_compared"].to_list() == [32, 48, 48]
    assert by.loc[STREAMED, "reference_drift"].isna().all()
    assert "None of the 128 texts of baselines" in lossless_sentence(summary)
    (finding,) = find_best(requests, no_rounds(tmp_path), summary, **SETTINGS)
    assert (finding.base, finding.name) == ("streamed", "γ = 2")
    first = finding.sentences()[0]
    assert first.startswith(
        "Compared on the 16 prompts that every configuration finished, γ = 2 is fastest: a speedup of 1."
    )
    assert "over the target that streams by itself (target_streamed)" in first
    headings, cells = summary_table(summary)
    assert headings[:4] == ["γ", "setup", "speedup", "over streamed"]
    assert len(cells) == 7


def test_repeats_and_no_gamma_0(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(SPEEDS)
    machine.patch(monkeypatch)
    requests = sweep(machine, tmp_path, gammas=[2, 5], repeats=3)
    summary = summarize(requests, no_rounds(tmp_path), **SETTINGS).set_index(["setup", "gamma"])
    assert summary.loc[(WORKERS, 2), "speedup"] == pytest.approx(1.3, rel=0.05)
    assert summary.loc[(STREAMED, 0), "speedup"] == pytest.approx(1.1, rel=0.05)
    assert summary.loc[(STREAMED, 0), ["compared", "repeats"]].to_list() == [16, 3]
    assert (summary["lossless"] == 1).all()


def test_modes_trees_and_gamma_auto_have_their_own_pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(SPEEDS)
    machine.patch(monkeypatch)
    run(machine, tmp_path / "runs" / "0", 0)
    points: list[dict[str, Any]] = [
        {"gamma": "auto", "mode": "overlap"},
        {"gamma": 2, "tree": "2x2"},
        {"gamma": 2, "draft_name": "int8"},
    ]
    for number, point in enumerate(points):
        run(machine, tmp_path / "runs" / f"{number + 1}", **point)
    requests = merged(tmp_path)
    summary = summarize(requests, no_rounds(tmp_path), **SETTINGS)
    pairs = summary[summary["setup"] == COLOCATED]
    own = summary[(summary["setup"] == WORKERS)]
    keys = ["gamma", "mode", "tree", "draft"]
    assert pairs[keys].astype(str).to_numpy().tolist() == own[keys].astype(str).to_numpy().tolist()
    assert (summary["setup"] == STREAMED).sum() == 1
    assert own["speedup_over_colocated"].notna().all()
    auto = own[own["gamma"] == "auto"].iloc[0]
    assert auto["speedup_over_colocated"] == pytest.approx(1.2 / 1.4, rel=0.1)


def test_what_failed_beside_one_configuration_is_compared_in_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = Machine(SPEEDS)
    machine.patch(monkeypatch)
    count = iter(range(10_000))
    machine.fails = lambda text: text[0] == STREAMED and text[2] == 3 and next(count) == 1  # in the run of gamma 2
    requests = sweep(machine, tmp_path)
    summary = summarize(requests, no_rounds(tmp_path), **SETTINGS)
    assert set(summary["compared"]) == {15}
    assert summary["baselines_failed"].to_list() == [0, 1, 0, 0, 0, 0, 0]
    assert "1 text of baselines failed; reference.csv says why" in faults_sentence(summary)


def test_a_text_of_a_baseline_that_differs_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(SPEEDS)
    machine.patch(monkeypatch)
    text = machine.text

    def other(setup: str, prompt: Sequence[int], config: OrchestratorConfig) -> SpeculativeResult:
        result = text(setup, prompt, config)
        return replace(result, output_tokens=[1, 2]) if (setup, prompt[0]) == (COLOCATED, 3) else result

    machine.text = other  # type: ignore[method-assign]
    requests = sweep(machine, tmp_path)
    summary = summarize(requests, no_rounds(tmp_path), **SETTINGS).set_index("setup")
    assert (summary.loc[COLOCATED, "lossless"] == 15 / 16).all()
    assert (summary.loc[[WORKERS, STREAMED], "lossless"] == 1).all()
    assert "3 of the 128 texts of baselines" in lossless_sentence(summary.reset_index())


def test_runs_of_an_earlier_version_are_compared_with_the_run_of_gamma_0(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = Machine(SPEEDS)
    machine.patch(monkeypatch)
    sweep(machine, tmp_path)
    (tmp_path / REFERENCE).unlink(missing_ok=True)
    for path in tmp_path.rglob(REFERENCE):
        path.unlink()
        write_json(path.with_name("run.json"), read_run(path))
    requests = merged(tmp_path)
    assert not (tmp_path / REFERENCE).exists()
    summary = summarize(requests, no_rounds(tmp_path), **SETTINGS)
    assert summary["gamma"].to_list() == [0, 2, 5]
    assert summary["speedup_over_streamed"].isna().all()
    assert summary["speedup"].notna().all()
    assert "2 of 3 configurations have no gamma 0 of their own run" in drift_sentence(summary)
    (finding,) = find_best(requests, no_rounds(tmp_path), summary, **SETTINGS)
    assert finding.sentences()[1].startswith("γ = 2 is fastest: a speedup of 1.")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table[:-1], "its rows of colocated are not those of the requests"),
        (lambda table: [*table, table[0]], "its rows of workers are not those of the requests"),
        (lambda table: [{**table[0], "request_id": "other"}, *table[1:]], "its rows of workers are not those"),
        (lambda table: [{**row, "setup": "elsewhere"} for row in table], "its rows of elsewhere are not those"),
        (lambda table: [{**row, "total_latency_ms": "fast"} for row in table], "column total_latency_ms"),
    ],
)
def test_a_reference_of_another_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: Callable[[Any], Any], said: str
) -> None:
    machine = Machine(SPEEDS)
    machine.patch(monkeypatch)
    folder = run(machine, tmp_path / "runs" / "gamma_2", 2, prompts=4)
    table = change(rows(folder / REFERENCE))
    with (folder / REFERENCE).open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    write_run(folder / "run.json", read_run(folder / REFERENCE), [folder / REFERENCE])
    with pytest.raises(UserError, match=said):
        merge_runs([folder])


# ---- round trips


@pytest.mark.parametrize(
    ("speeds", "said"),
    [
        ([1.5, 1.3, 0.7], "loses from a round trip of 50 ms on (0 ms: faster"),
        ([1.5, 1.4, 1.3], "loses for certain at no round trip that was measured (0 ms: faster"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ([0.5, 0.5, 0.5], "loses from a round trip of 0 ms on (0 ms: slower"),
                ([1.5, 0.8, 0.7], "loses from a round trip of 14 ms on (0 ms: faster"),
                ([1.5, 0.7, 1.3], "loses at 14 ms (0 ms: faster"),
                ([1.5, 1.0, 0.7], "loses from a round trip of 50 ms on (0 ms: faster"),
            )
        ),
    ],
)
def test_from_which_round_trip_on_it_loses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, speeds: list[float], said: str
) -> None:
    for rtt, speed in zip((0, 14, 50), speeds, strict=True):
        machine = Machine({**dict.fromkeys(SPEEDS, 1.0), (WORKERS, 2): speed})
        machine.patch(monkeypatch)
        requests = sweep(machine, tmp_path, gammas=[2], rtt_ms=rtt)
    summary = summarize(requests, no_rounds(tmp_path), **SETTINGS)
    sentences = round_trip_sentences(summary, 0.95)
    assert len(sentences) == 2
    assert sentences[0].startswith("Against the target that streams by itself (target_streamed), the best pair in")
    assert sentences[1].startswith("Against the same pair in one process (colocated), the best pair in workers")
    for sentence in sentences:
        assert said in sentence
        assert "prompts compared: 16" in sentence
        for verdict, speed in zip(("0 ms: ", "14 ms: ", "50 ms: "), speeds, strict=True):
            if speed != 1:
                assert f"{verdict}{'faster' if speed > 1 else 'slower'}" in sentence
    few = summary.assign(**{name: np.nan for name in summary if name.endswith(("_joint_low", "_joint_high"))})
    assert "0 ms: too few prompts to say, " in round_trip_sentences(few, 0.95)[0]
    assert round_trip_sentences(summary[summary["rtt_ms"] == 0], 0.95) == []


def test_a_row_of_the_reference_has_the_columns_of_a_request() -> None:
    assert [*asdict(a_record())] == [*(field for field in RequestRecord.__dataclass_fields__), "setup"]


def a_record() -> ReferenceRecord:
    machine = Machine(SPEEDS)
    config = OrchestratorConfig(gamma=0)
    record = request_record(Request("a", "chat", [1]), machine.text(WORKERS, [1], config), config)
    return ReferenceRecord(**vars(record))


def test_tables_without_references_are_as_before() -> None:
    requests = pd.DataFrame([vars(a_record())]).drop(columns="setup").assign(matches_gamma0=True)
    summary = summarize(requests, pd.DataFrame(columns=["request_id", "repeat", *summary_columns()]), **SETTINGS)
    assert summary["setup"].to_list() == [WORKERS]
    assert drift_sentence(summary) == "Not known: no network had two runs whose gamma 0 can be compared."


def summary_columns() -> list[str]:
    from specsplit.experiment.columns import ROUND_COLUMNS
    from specsplit.settings.axes import CONFIGURATION

    return [name for name in (*ROUND_COLUMNS, *CONFIGURATION[1:]) if name not in ("request_id", "repeat")]
