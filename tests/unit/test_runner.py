"""The run folder of a benchmark: what its tables say, and what is left when a run fails."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specsplit.client.result import Failure, Round, SpeculativeResult
from specsplit.client.writer import TextWriter
from specsplit.errors import UserError, WorkerError
from specsplit.experiment.columns import REQUEST_COLUMNS, ROUND_COLUMNS, RequestRecord
from specsplit.experiment.dataset import Prompt
from specsplit.experiment.journal import JOURNAL, Journal
from specsplit.experiment.progress import Bar, Progress
from specsplit.experiment.records import Request, encode_prompts, request_config, request_record, round_records
from specsplit.experiment.run import Run
from specsplit.experiment.runner import run_requests
from specsplit.launch.endpoint import Endpoint, resolve_address
from specsplit.rpc.connection import Connection
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig

from waiting import wait_until

CONTRACT = (
    "request_id", "gamma", "prompt_length", "generated_tokens", "ttft_ms", "tpot_ms", "average_acceptance_rate",
    "total_network_idle_ms", "total_latency_ms", "num_rounds",
)  # fmt: skip
REQUESTS = [Request("a", "chat", [1, 2, 3]), Request("b", "code", [4]), Request("c", "chat", [5, 6])]
CONFIG = OrchestratorConfig(gamma=4, tree="2x2", seed=11)


class Words:
    """A codec whose tokens are numbers."""

    sha256 = "f" * 64
    has_template = False

    def encode(self, prompt: str, *, use_chat_template: bool) -> list[int]:
        return [int(word) for word in prompt.split()]

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))


CODEC: Any = Words()


def one_round(number: int, drafted: int, accepted: int, **times: float) -> Round:
    defaults = dict.fromkeys(
        ("draft_wall_ms", "draft_compute_ms", "draft_queue_ms", "verify_wall_ms", "verify_compute_ms",
         "verify_queue_ms", "network_ms"), 0.0,
    )  # fmt: skip
    return Round(number, drafted, accepted, tree_nodes=drafted, **{**defaults, **times})


TWO_ROUNDS = SpeculativeResult(
    output_tokens=[7, 8, 9, 10],
    finish_reason="length",
    rounds=[
        one_round(1, 4, 1, network_ms=3.0, draft_compute_ms=10.0, verify_compute_ms=20.0),
        one_round(2, 2, 1, network_ms=2.0, draft_compute_ms=5.0, verify_compute_ms=30.0),
    ],
    ttft_ms=40.0,
    total_ms=100.0,
)


# ---- one text


def test_the_contract_columns_come_first() -> None:
    assert REQUEST_COLUMNS[:10] == CONTRACT


def test_figures_of_a_text() -> None:
    record = request_record(REQUESTS[0], TWO_ROUNDS, CONFIG)
    assert (record.request_id, record.category, record.gamma, record.seed) == ("a", "chat", 4, 11)
    assert (record.prompt_length, record.generated_tokens, record.num_rounds) == (3, 4, 2)
    assert (record.ttft_ms, record.total_latency_ms) == (40.0, 100.0)
    assert record.tpot_ms == pytest.approx(60.0 / 3)
    assert record.average_acceptance_rate == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert (record.drafted_tokens, record.accepted_tokens) == (6, 2)
    assert record.mean_accepted_length == pytest.approx(2.0)
    assert record.total_network_idle_ms == pytest.approx(5.0)
    assert record.network_idle_fraction == pytest.approx(0.05)
    assert (record.draft_compute_ms, record.target_compute_ms) == (15.0, 50.0)
    assert (record.mode, record.tree, record.finish_reason) == ("sync", "2x2", "length")
    assert record.output_sha256 == hashlib.sha256(b"[7, 8, 9, 10]").hexdigest()


def test_time_between_tokens_leaves_out_those_of_the_first_round() -> None:
    # 60 ms after the first round, which brought two of the four tokens.
    assert request_record(REQUESTS[0], TWO_ROUNDS, CONFIG).itl_ms == pytest.approx(60.0 / 2)
    at_once = SpeculativeResult([7, 8], "length", [one_round(1, 4, 1)], 40.0, 40.0)
    assert request_record(REQUESTS[0], at_once, CONFIG).itl_ms is None


def test_without_a_draft_there_is_no_acceptance_rate() -> None:
    alone = SpeculativeResult([7, 8], "length", [one_round(1, 0, 0), one_round(2, 0, 0)], 10.0, 20.0)
    record = request_record(REQUESTS[0], alone, OrchestratorConfig(gamma=0))
    assert record.average_acceptance_rate is None
    assert (record.mean_accepted_length, record.tree) == (1.0, "chain")


def test_rounds_that_drafted_nothing_do_not_lower_the_acceptance_rate() -> None:
    last_is_short = SpeculativeResult([1, 2, 3], "length", [one_round(1, 2, 1), one_round(2, 0, 0)], 10.0, 20.0)
    assert request_record(REQUESTS[0], last_is_short, CONFIG).average_acceptance_rate == 0.5


@pytest.mark.parametrize(("tokens", "ttft"), [([], None), ([7], 10.0)])
def test_time_per_token_needs_two_tokens(tokens: list[int], ttft: float | None) -> None:
    short = SpeculativeResult(tokens, "eos", [one_round(1, 1, 0)], ttft, 20.0)
    record = request_record(REQUESTS[0], short, CONFIG)
    assert (record.ttft_ms, record.tpot_ms, record.generated_tokens) == (ttft, None, len(tokens))


@pytest.mark.parametrize(
    ("drafted", "accepted", "given", "counted"),
    [
        (4, 3, 1, (1, 1)),  # a token and the end of the text were drafted, and something after it
        (4, 2, 2, (4, 2)),  # two drafted tokens, then the target's own end of the text
        (1, 1, 0, (0, 0)),  # the end of the text was all that was drafted
    ],
)
def test_tokens_from_the_end_of_the_text_on_count_nowhere(
    drafted: int, accepted: int, given: int, counted: tuple[int, int]
) -> None:
    # The first round gives two drafted tokens and the target's own; the last one `given` tokens before the end.
    rounds = [one_round(1, 2, 2), one_round(2, drafted, accepted)]
    result = SpeculativeResult([5] * (3 + given), "eos", rounds, 10.0, 20.0)
    record = request_record(REQUESTS[0], result, CONFIG)
    assert (record.drafted_tokens, record.accepted_tokens) == (2 + counted[0], 2 + counted[1])
    assert record.mean_accepted_length == (3 + given) / 2
    assert record.acceptance_length == 1 + (2 + counted[1]) / 2
    assert record.verifications == 2
    assert record.draft_acceptance_rate == (2 + counted[1]) / (2 + counted[0])
    last = round_records(REQUESTS[0], result, CONFIG)[-1]
    assert (last.drafted, last.accepted, last.tree_nodes) == (*counted, drafted)


def test_every_text_has_a_seed_of_its_own() -> None:
    seeds = [
        request_config(OrchestratorConfig(seed=seed), Request(name, "", [])).seed
        for seed in (0, 1)
        for name in ("a", "b", "c")
    ]
    assert len(set(seeds)) == 6
    assert all(0 <= seed < 1 << 32 for seed in seeds)
    assert request_config(OrchestratorConfig(seed=0), Request("a", "", [])).seed == seeds[0]


def test_every_round_is_a_row() -> None:
    rows = round_records(REQUESTS[0], TWO_ROUNDS, CONFIG)
    assert [(row.request_id, row.gamma, row.round, row.drafted, row.accepted) for row in rows] == [
        ("a", 4, 1, 4, 1),
        ("a", 4, 2, 2, 1),
    ]
    assert {row.speculation for row in rows} == {"none"}


# ---- prompts and addresses


def test_prompts_become_tokens() -> None:
    prompts = [Prompt("a", "chat", "1 2 3"), Prompt("b", "code", "4")]
    assert encode_prompts(prompts, CODEC, chat=True, limit=4) == REQUESTS[:2]


def test_prompts_that_do_not_fit_are_named_before_any_work() -> None:
    prompts = [Prompt(f"p{i}", "x", "1 " * i) for i in range(1, 11)]
    with pytest.raises(UserError, match=r"8 prompts do not fit .* 3 tokens: p3 \(3 tokens\), p4.*p7 .*and 3 more\. "):
        encode_prompts(prompts, CODEC, chat=True, limit=3)


def test_an_address_may_be_an_endpoint_file(tmp_path: Path) -> None:
    Endpoint.of_running("gpu:50052", pb.DescribeReply()).write(tmp_path / "target.json")
    assert resolve_address("127.0.0.1:9") == "127.0.0.1:9"
    assert resolve_address(str(tmp_path / "target.json")) == "gpu:50052"
    (tmp_path / "hand.json").write_text('{"address": "gpu-1:50051"}')
    assert resolve_address(str(tmp_path / "hand.json")) == "gpu-1:50051"
    (tmp_path / "none.json").write_text('{"host": "gpu-1"}')
    with pytest.raises(UserError, match=r"none\.json: holds no address; wanted"):
        resolve_address(str(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"gone\.json: no such file"):
        resolve_address(str(tmp_path / "gone.json"))


# ---- a run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The prompts that the loop was called with; each time it writes TWO_ROUNDS."""
    seen: list[Any] = []

    def write(self: TextWriter, prompt_ids: list[int], config: OrchestratorConfig, **options: Any) -> SpeculativeResult:
        seen.append(prompt_ids)
        return TWO_ROUNDS

    monkeypatch.setattr(TextWriter, "write", write)
    return seen


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Run REQUESTS against workers that nobody calls; returns the run folder."""

    def start(**options: Any) -> Path:
        described = pb.DescribeReply(role="target", model="tiny", environment={"PYTHONHASHSEED": "0"})
        nobody: Any = SimpleNamespace(Describe=lambda *_, **__: pb.DescribeReply())
        target = Connection("target", "127.0.0.1:1", nobody, nobody, described)
        draft = Connection("draft", "127.0.0.1:2", nobody, nobody, pb.DescribeReply(role="draft"))
        how = {name: options.pop(name) for name in ("resume", "on_kept", "on_done") if name in options}
        workers = {"draft": draft, "target": target}
        run_requests(Run(REQUESTS, workers, CODEC, CONFIG, **options), tmp_path / "gamma_4", **how)
        return tmp_path / "gamma_4"

    return start


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Let the loop raise at its call `number`, counted from 1."""
    working, count = TextWriter.write, 0

    def write(*args: Any, **options: Any) -> SpeculativeResult:
        nonlocal count
        count += 1
        if count == number:
            raise error
        return working(*args, **options)

    monkeypatch.setattr(TextWriter, "write", write)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_leaves_tables_texts_and_its_record(calls: list[Any], run: Callable[..., Path]) -> None:
    done: list[RequestRecord] = []
    folder = run(warmup=1, inputs={"prompts": {"path": "p.jsonl", "sha256": "0"}}, on_done=done.append)
    assert files(folder) == {"requests.csv", "per_round.csv", "outputs.jsonl", "run.json"}
    assert calls == [[1, 2, 3], [1, 2, 3], [4], [5, 6]]  # the first one warms up
    assert [record.request_id for record in done] == ["a", "b", "c"]

    requests, rounds = rows(folder / "requests.csv"), rows(folder / "per_round.csv")
    assert tuple(requests[0]) == REQUEST_COLUMNS
    assert tuple(rounds[0]) == ROUND_COLUMNS
    assert [row["request_id"] for row in requests] == ["a", "b", "c"]
    assert [(row["request_id"], row["round"]) for row in rounds] == [(r, n) for r in "abc" for n in "12"]
    outputs = [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]
    assert outputs[1] == {
        "request_id": "b",
        "repeat": 1,
        "finish_reason": "length",
        "text": "7 8 9 10",
        "token_ids": [7, 8, 9, 10],
        "status": "ok",
    }

    record = json.loads((folder / "run.json").read_text())
    assert (record["exit_code"], record["error"]) == (0, None)
    assert (record["gamma"], record["seeds"], record["warmup_requests"]) == (4, {"orchestrator": 11}, 1)
    assert record["started"] < record["finished"]
    assert record["orchestrator"]["tree"] == "2x2"
    assert record["workers"]["target"]["address"] == "127.0.0.1:1"
    assert record["workers"]["target"]["environment"] == {"PYTHONHASHSEED": "0"}
    assert record["workers"]["draft"]["role"] == "draft"
    assert record["inputs"]["prompts"]["path"] == "p.jsonl"
    assert record["tokenizer_sha256"] == CODEC.sha256
    assert record["argv"][0] == "specsplit"


def test_repeats_go_through_all_requests_and_again(calls: list[Any], run: Callable[..., Path]) -> None:
    folder = run(warmup=0, repeats=2)
    assert calls == [[1, 2, 3], [4], [5, 6]] * 2
    requests, rounds = rows(folder / "requests.csv"), rows(folder / "per_round.csv")
    assert [(row["request_id"], row["repeat"]) for row in requests] == [(r, n) for n in "12" for r in "abc"]
    assert len({(row["request_id"], row["repeat"], row["round"]) for row in rounds}) == len(rounds) == 12
    outputs = [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]
    assert [(line["request_id"], line["repeat"]) for line in outputs] == [(r, n) for n in (1, 2) for r in "abc"]
    assert json.loads((folder / "run.json").read_text())["repeats"] == 2


def test_more_warm_up_than_requests(calls: list[Any], run: Callable[..., Path]) -> None:
    run(warmup=4)
    assert len(calls) == 7
    assert calls[3] == calls[0]


def test_a_run_that_is_cut_short_is_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any], run: Callable[..., Path], tmp_path: Path
) -> None:
    fail_at(monkeypatch, 3, WorkerError("target worker does not answer: UNAVAILABLE: gone"))
    with pytest.raises(WorkerError):
        run(warmup=1)
    folder = tmp_path / "gamma_4"
    assert files(folder) == {JOURNAL, "run.json"}
    record = json.loads((folder / "run.json").read_text())
    assert (record["exit_code"], record["error"]) == (1, "target worker does not answer: UNAVAILABLE: gone")
    assert record["requests"] == {"planned": 3, "ok": 1, "failed": 0, "kept": 0}

    calls.clear()
    kept: list[int] = []
    run(warmup=1, on_kept=kept.append)  # mended
    assert (kept, calls) == ([1], [[4], [4], [5, 6]])
    assert files(folder) == {"requests.csv", "per_round.csv", "outputs.jsonl", "run.json"}
    assert [row["request_id"] for row in rows(folder / "requests.csv")] == ["a", "b", "c"]
    record = json.loads((folder / "run.json").read_text())
    assert (record["exit_code"], len(record["attempts"])) == (0, 2)
    assert record["requests"] == {"planned": 3, "ok": 3, "failed": 0, "kept": 1}


def failure(tokens: list[int]) -> WorkerError:
    """A text that ended after `tokens`."""
    result = SpeculativeResult(output_tokens=tokens, rounds=TWO_ROUNDS.rounds[:1], ttft_ms=40.0, total_ms=90.0)
    result.failures = [Failure("draft", 1, "UNAVAILABLE", "gone", lost_ms=5.0)]
    result.failures.append(Failure("target", 2, "INTERNAL", "it broke\non two lines", "gave_up", lost_ms=2.0))
    return WorkerError(
        "target worker failed in round 2: INTERNAL: it broke\non two lines", code="INTERNAL", result=result
    )


def test_a_request_that_fails_is_a_row_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any], run: Callable[..., Path]
) -> None:
    fail_at(monkeypatch, 2, failure([7, 8]))
    done: list[RequestRecord] = []
    folder = run(warmup=0, on_done=done.append)
    assert files(folder) == {"requests.csv", "per_round.csv", "outputs.jsonl", "run.json", JOURNAL}
    table = rows(folder / "requests.csv")
    assert [(row["request_id"], row["status"]) for row in table] == [("a", "ok"), ("b", "failed"), ("c", "ok")]
    failed = table[1]
    assert failed["error_code"] == "INTERNAL"
    assert failed["error_message"] == "target worker failed in round 2: INTERNAL: it broke on two lines"
    assert failed["events"] == "draft UNAVAILABLE in round 1: reconnect; target INTERNAL in round 2: gave_up"
    assert [failed[name] for name in ("draft_failures", "target_failures", "recovery_ms")] == ["1", "1", "7.0"]
    assert [failed[name] for name in ("generated_tokens", "num_rounds", "finish_reason")] == ["2", "1", "error"]
    means = ("ttft_ms", "tpot_ms", "itl_ms", "average_acceptance_rate", "mean_accepted_length")
    assert [failed[name] for name in means] == [""] * len(means)
    assert json.loads((folder / "outputs.jsonl").read_text().splitlines()[1])["text"] == "7 8"
    assert len(rows(folder / "per_round.csv")) == 2 + 1 + 2
    assert json.loads((folder / "run.json").read_text())["requests"]["failed"] == 1

    calls.clear()
    run(warmup=0)
    assert calls == [[4]]
    assert [row["status"] for row in rows(folder / "requests.csv")] == ["ok"] * 3
    assert JOURNAL not in files(folder)


def test_a_run_without_one_text_fails(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any], run: Callable[..., Path], tmp_path: Path
) -> None:
    def write(*_: Any, **__: Any) -> SpeculativeResult:
        raise failure([])

    monkeypatch.setattr(TextWriter, "write", write)
    with pytest.raises(UserError, match="every request failed, the first one with: target worker failed in round 2"):
        run(warmup=0)
    assert files(tmp_path / "gamma_4") == {JOURNAL, "run.json"}


def unfinished(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Path], tmp_path: Path) -> Path:
    """The journal of a run that was stopped after its second request."""
    with monkeypatch.context() as patch:
        fail_at(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(warmup=0)
    return tmp_path / "gamma_4" / JOURNAL


def test_rows_of_other_settings_are_not_kept(
    monkeypatch: pytest.MonkeyPatch,
    calls: list[Any],
    run: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    journal = unfinished(monkeypatch, run, tmp_path)
    content = journal.read_text()
    calls.clear()
    journal.write_text(content.replace('"max_output_tokens": 128', '"max_output_tokens": 64'))
    run(warmup=0)
    assert calls == [[1, 2, 3], [4], [5, 6]]
    assert "made with other settings (orchestrator.max_output_tokens) and are dropped" in caplog.text
    calls.clear()
    journal.write_text(content)
    run(warmup=0, resume=False)
    assert calls == [[1, 2, 3], [4], [5, 6]]


@pytest.mark.parametrize("cut", [1, 40, 10_000_000])
def test_a_journal_that_was_cut_off_loses_what_is_not_whole(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any], run: Callable[..., Path], tmp_path: Path, cut: int
) -> None:
    journal = unfinished(monkeypatch, run, tmp_path)
    content = journal.read_bytes()
    journal.write_bytes(content[: max(0, len(content) - cut)])
    calls.clear()
    folder = run(warmup=0)
    assert calls == ([[4], [5, 6]] if cut < len(content) else [[1, 2, 3], [4], [5, 6]])
    assert [row["request_id"] for row in rows(folder / "requests.csv")] == ["a", "b", "c"]


def test_a_run_is_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / JOURNAL, {"a": 1}),
        pytest.raises(UserError, match=r"unfinished\.jsonl: another process writes this run"),
        Journal(tmp_path / JOURNAL, {"a": 1}),
    ):
        pass


def test_a_run_that_fails_leaves_no_tables_of_an_earlier_one(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any], run: Callable[..., Path]
) -> None:
    folder = run(warmup=0)
    fail_at(monkeypatch, 1, WorkerError("gone"))
    with pytest.raises(WorkerError):
        run(warmup=1)
    assert files(folder) == {"run.json", JOURNAL}


def test_a_run_that_is_stopped_says_by_what(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any], run: Callable[..., Path], tmp_path: Path
) -> None:
    fail_at(monkeypatch, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(warmup=0)
    record = json.loads((tmp_path / "gamma_4" / "run.json").read_text())
    assert (record["exit_code"], record["error"]) == (1, "KeyboardInterrupt()")


def test_progress_in_a_log_is_a_line_a_request(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total=2) as progress:
        for request in REQUESTS[:2]:
            progress.done(request_record(request, TWO_ROUNDS, CONFIG))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[1/2] gamma 4 a: 4 tokens, 40.0 tokens/s; 40.0 tokens/s so far, about ")
    assert lines[1].endswith("about 0 s left")
    assert lines[2].startswith("2 of 2 prompts in 0 s: 40.0 tokens/s")


def test_progress_of_a_run_that_is_gone_on_with_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total=3) as progress:
        progress.kept(1)
        error = failure([7])
        assert error.result is not None
        progress.done(request_record(REQUESTS[1], error.result, CONFIG, error=error))
        progress.done(request_record(REQUESTS[2], TWO_ROUNDS, CONFIG))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 done by an earlier run with the same settings are kept"
    assert lines[1].startswith("[1/2] gamma 4 b: failed: target worker failed in round 2: INTERNAL: it broke on two li")
    assert lines[2].startswith("[2/2] gamma 4 c: 4 tokens")
    assert lines[-1].startswith("1 failed: requests.csv says why")


def test_progress_of_a_step_is_a_line_where_there_is_something_to_tell(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(30, "step") as bar:
        bar.to(10, "went on from here")
        bar.to(20, "not told", show=False)
        bar.to(33, "more than was wanted")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["[10/30] went on from here", "[33/30] more than was wanted, about 0 s left"]


def test_progress_on_the_terminal_behind_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))  # a bar needs room
    os.set_blocking(ours, False)
    try:
        with Progress(2, theirs) as progress:
            progress.done(request_record(REQUESTS[0], TWO_ROUNDS, CONFIG))
        shown = []

        def speed_arrived() -> bool:
            """The kernel hands on what was written in its own time, in parts."""
            with suppress(BlockingIOError):
                shown.append(os.read(ours, 10_000))
            return b"gamma 4, 40.0 tokens/s" in b"".join(shown)

        assert wait_until(speed_arrived), shown
    finally:
        os.close(ours)
        os.close(theirs)
    assert capsys.readouterr().out.startswith("[1/2] gamma 4")
