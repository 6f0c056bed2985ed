"""Measurements that were killed: no row is lost, none is measured twice, and what goes on is as if nothing had been."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specsplit.client.result import SpeculativeResult
from specsplit.client.writer import TextWriter
from specsplit.decoding.adaptive import GammaController
from specsplit.errors import WorkerError
from specsplit.experiment import peer_race
from specsplit.experiment.capacity import CapacityRecord, Clients, measure_capacity
from specsplit.experiment.journal import Journal
from specsplit.experiment.peer_race import Ours, race
from specsplit.experiment.peers import Peer, PeerText
from specsplit.experiment.records import Request, request_record
from specsplit.experiment.run import Run
from specsplit.experiment.runner import run_requests
from specsplit.provenance.redaction import without_places
from specsplit.rpc.connection import Connection
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.measure import CapacitySettings
from specsplit.settings.run import OrchestratorConfig

from test_runner import CODEC, TWO_ROUNDS

REQUESTS = [Request(name, "chat", [number]) for number, name in enumerate("abcd")]


class Killed(BaseException):
    """What no `except Exception` catches."""


@pytest.fixture
def dies(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[list[int]]]:
    """Texts are TWO_ROUNDS, and the controller learns from them; the call of that number kills the process."""

    def start(number: int | None) -> list[list[int]]:
        seen: list[list[int]] = []

        def write(self: TextWriter, prompt: list[int], config: OrchestratorConfig, **more: Any) -> SpeculativeResult:
            seen.append(list(prompt))
            if len(seen) == number:
                raise Killed
            if controller := more.get("controller"):
                learn(controller, len(prompt))
            return TWO_ROUNDS

        monkeypatch.setattr(TextWriter, "write", write)
        monkeypatch.setattr(TextWriter, "__enter__", lambda self: self)
        monkeypatch.setattr(TextWriter, "__exit__", lambda *_: None)
        monkeypatch.setattr(peer_race, "SETTLE_S", 0.0)
        return seen

    return start


def learn(controller: GammaController, seed: int) -> None:
    for drafted, accepted in ((4, 3), (4, 4), (2, seed % 3)):
        controller.observe(
            gamma=4, drafted=drafted, accepted=accepted, verified_tokens=5, draft_ms=3, verify_ms=20, network_ms=2
        )


# ---- a run


def run_auto(folder: Path) -> Path:
    nobody: Any = SimpleNamespace(Describe=lambda *_, **__: pb.DescribeReply())
    target = Connection("target", "127.0.0.1:1", nobody, nobody, pb.DescribeReply(role="target"))
    draft = Connection("draft", "127.0.0.1:2", nobody, nobody, pb.DescribeReply(role="draft"))
    workers = {"draft": draft, "target": target}
    run_requests(Run(REQUESTS, workers, CODEC, OrchestratorConfig(gamma="auto")), folder)
    return folder


def test_an_auto_run_that_goes_on_has_the_controller_of_its_rows(
    dies: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[dict[str, Any]] = []
    learnt = GammaController.state
    monkeypatch.setattr(GammaController, "state", lambda self: states.append(learnt(self)) or states[-1])
    dies(None)
    run_auto(tmp_path / "whole")
    whole, states[:] = list(states), []
    dies(4)
    with pytest.raises(Killed):
        run_auto(tmp_path / "cut")
    dies(None)
    run_auto(tmp_path / "cut")
    assert states == whole  # warmed up twice, and still as in one run
    assert states[0] != states[-1]


def test_a_controller_that_is_restored_chooses_as_the_one_that_learnt() -> None:
    one = GammaController("lookahead", 12, fan_out=8)
    for seed in range(20):
        learn(one, seed)
    other = GammaController("lookahead", 12, fan_out=8)
    other.restore(json.loads(json.dumps(one.state())))
    for seed in range(20):
        assert (one.alpha, one.choose(12), one.state()) == (other.alpha, other.choose(12), other.state())
        learn(one, seed)
        learn(other, seed)


# ---- a race


class HuggingFace:
    def write(self, peer: Peer, prompt_ids: Any, *, max_tokens: int, stop_ids: Any) -> PeerText:
        return PeerText([7, 8, 9, 10], "length", [2, 2], [10.0, 30.0], 10.0)


def run_race(output: Path, **options: Any) -> list[dict[str, str]]:
    worker: Any = SimpleNamespace(address="x", description=SimpleNamespace(max_context=64, eos_token_ids=[2]))
    gammas = options.pop("gammas", (0, 4))
    configs = [OrchestratorConfig(gamma=gamma, max_output_tokens=4) for gamma in gammas]
    ours = [
        Ours(f"gamma_{c.gamma}", c, dict.fromkeys(("draft", "target") if c.gamma else ("target",), worker))
        for c in configs
    ]
    hugging_face: Any = HuggingFace()
    race(REQUESTS, ours, {Peer("generate"): hugging_face}, hugging_face, output, warmup=0, repeats=2, **options)
    with output.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_race_that_was_killed_loses_no_turn(dies: Callable[..., Any], tmp_path: Path) -> None:
    dies(None)
    whole = run_race(tmp_path / "whole.csv")
    dies(10)  # in the fifth turn
    with pytest.raises(Killed):
        run_race(tmp_path / "cut.csv")
    assert not (tmp_path / "cut.csv").exists()
    seen = dies(None)
    assert run_race(tmp_path / "cut.csv") == whole
    assert len(seen) == 8  # four turns of two of ours
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["cut.csv", "whole.csv"]


@pytest.mark.parametrize("options", [{"decides": {"code": "another"}}, {"gammas": (0, "auto")}])
def test_turns_that_do_not_belong_are_not_kept(dies: Callable[..., Any], tmp_path: Path, options: Any) -> None:
    dies(10)
    with pytest.raises(Killed):
        run_race(tmp_path / "cut.csv", **({} if "decides" in options else options))
    seen = dies(None)
    run_race(tmp_path / "cut.csv", **options)
    assert len(seen) == 16


# ---- many clients


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[str]]:
    """Loads that are measured at once; that of this number kills the process."""

    def start(number: int | None) -> list[str]:
        seen: list[str] = []

        def run(clients: Clients, load: Any) -> list[CapacityRecord]:
            seen.append(f"{clients.config.gamma}: {load}")
            if len(seen) == number:
                raise Killed
            rows = [asdict(request_record(request, TWO_ROUNDS, clients.config)) for request in clients.requests]
            place = {"client": 0, "started_ms": 1.0, "due_ms": 0.1 + len(seen)}
            return [CapacityRecord(**asdict(load), **place, **row) for row in rows]

        monkeypatch.setattr(Clients, "_run", run)
        monkeypatch.setattr(Clients, "_warm_up", lambda *_: None)
        return seen

    return start


def run_capacity(output: Path, **decides: Any) -> str:
    settings = CapacitySettings(clients=[1, 2], requests=16, saturation_steps=2)
    configs = [OrchestratorConfig(gamma=gamma) for gamma in (0, 4)]
    list(measure_capacity(REQUESTS, configs, lambda config: None, settings, output, decides=decides))
    return output.read_text()


def test_a_capacity_run_that_was_killed_loses_no_load(loads: Callable[..., Any], tmp_path: Path) -> None:
    every = loads(None)
    run_capacity(tmp_path / "whole.csv")
    loads(6)
    with pytest.raises(Killed):
        run_capacity(tmp_path / "cut.csv")
    journal = tmp_path / "cut_unfinished.jsonl"
    kept = journal.read_text()
    journal.write_text(kept + '{"part": [1')  # killed while it wrote
    left = loads(None)
    run_capacity(tmp_path / "cut.csv")
    assert left == every[5:]
    assert not journal.exists()
    loads(6)
    with pytest.raises(Killed):
        run_capacity(tmp_path / "cut.csv", code="one")
    seen = loads(None)
    run_capacity(tmp_path / "cut.csv", code="another")
    assert seen == every


def test_parts_are_measured_once(tmp_path: Path) -> None:
    def fail() -> None:
        raise AssertionError("measured again")

    with Journal(tmp_path / "a.jsonl", {"x": 1}) as parts:
        assert parts.measured([1, "a"], lambda: [0.1]) == [0.1]
    with Journal(tmp_path / "a.jsonl", {"x": 1}) as parts:
        assert parts.measured([1, "a"], fail) == [0.1]
        with pytest.raises(WorkerError):
            parts.measured([1, "b"], lambda: (_ for _ in ()).throw(WorkerError("gone")))
    with Journal(tmp_path / "a.jsonl", {"x": 2}) as parts, pytest.raises(AssertionError):
        parts.measured([1, "a"], fail)


# ---- places


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ("{root}/prompts.jsonl", "prompts.jsonl"),
        ("{root}", "."),
        (
            "specsplit bench --prompts={root}/a/b.jsonl --tokenizer {root}/m",
            "specsplit bench --prompts=a/b.jsonl --tokenizer m",
        ),
        ("{home}/models/m", "~/models/m"),
        ("{root}-2/a", "{root}-2/a"),
        ("/data{root}/a", "/data{root}/a"),
        ("./a and ../b", "a and ../b"),
        ("grpcs://host:1/x", "grpcs://host:1/x"),
        ("a/b", "a/b"),
    ],
)
def test_what_is_told_names_no_place_of_this_machine(
    told: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/somewhere/user")
    places = {"root": str(tmp_path), "home": "/somewhere/user"}
    value = {"a": [told.format(**places), 1, None]}
    assert without_places(value, tmp_path) == {"a": [kept.format(**places), 1, None]}


def test_a_run_tells_no_absolute_path(
    dies: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies(None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["specsplit", "bench", "--prompts", str(tmp_path / "p.jsonl")])
    folder = run_auto(tmp_path / "runs" / "gamma_auto")
    assert str(tmp_path) not in (folder / "run.json").read_text()
    assert json.loads((folder / "run.json").read_text())["command"] == "specsplit bench --prompts p.jsonl"
