"""Workers that die, hang or come back changed, and networks that cut, stall, repeat: the text is right, or the failure
is named and what there is of the text is right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from specsplit.client import recovery
from specsplit.client.result import SpeculativeResult
from specsplit.client.writer import TextWriter
from specsplit.errors import WorkerError
from specsplit.models.sources import prepare_model
from specsplit.rpc.codec import CHANNEL_OPTIONS
from specsplit.rpc.credentials import STUBS, Access
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.rpc.v1.specsplit_pb2_grpc import TargetServiceStub
from specsplit.settings.run import OrchestratorConfig

import soak
from faulty_network import FaultyNetwork, faulty_network
from grpc_fixtures import Gate, Worker, serving
from waiting import wait_until

PROMPT = [65, 66, 67]
LENGTH = 40
MODES = ("sync", "overlap", "lookahead")
QUICK = {**dict(CHANNEL_OPTIONS), "grpc.keepalive_time_ms": 200, "grpc.http2.ping_timeout_ms": 200}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(recovery, "LAST_CHANCE_S", 0.1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A draft, a target, and another target. Their text depends on every token before."""
    folder = tmp_path_factory.mktemp("models")
    settings = {"draft": {"acceptance": 0.8}, "target": {"step_ms": 2.0}, "other": {"seed": 1}}
    for name, own in settings.items():
        prepare_model({"source": "synthetic", **own}, name, folder / name)
    return {name: folder / name for name in settings}


@pytest.fixture
def pair(models: dict[str, Path]) -> Iterator[tuple[Worker, Worker]]:
    with (
        serving("draft", models["draft"], drain_s=0.1) as draft,
        serving("target", models["target"], drain_s=0.1) as target,
    ):
        yield draft, target


def write(draft: Any, target: Any, *, on_tokens: Any = None, **settings: Any) -> SpeculativeResult:
    """One text; workers are given as addresses, or as things that have one."""
    given = {"gamma": 3, "max_output_tokens": LENGTH, "recovery_timeout_s": 20.0, **settings}
    addresses = [getattr(worker, "address", worker) for worker in (draft, target)]
    with TextWriter(*addresses) as writer:
        return writer.write(PROMPT, OrchestratorConfig(**given), on_tokens=on_tokens)


def alone(target: Worker, **settings: Any) -> list[int]:
    return write(None, target, gamma=0, **settings).output_tokens


def after(bursts: int, action: Callable[[], object]) -> Callable[[list[int]], None]:
    """For on_tokens: call `action` once, when the tokens of that many rounds have come."""
    seen: list[list[int]] = []

    def on_tokens(tokens: list[int]) -> None:
        seen.append(tokens)
        if len(seen) == bursts:
            action()

    return on_tokens


# ---- a worker that fails


@pytest.mark.parametrize(("mode", "temperature"), [("sync", 0.9), ("overlap", 0.0), ("lookahead", 0.9)])
def test_the_target_finishes_alone_when_the_draft_is_gone(
    pair: tuple[Worker, Worker], mode: str, temperature: float
) -> None:
    draft, target = pair
    expected = alone(target, temperature=temperature)
    settings: dict[str, Any] = {"mode": mode, "temperature": temperature, "on_draft_failure": "target_alone"}
    result = write(draft, target, on_tokens=after(3, draft.server.stop), **settings)
    assert result.output_tokens == expected
    assert [(f.worker, f.action) for f in result.failures] == [("draft", "target_alone")]
    number = result.failures[0].round
    assert all(row.drafted == 0 for row in result.rounds if row.round >= number)
    assert any(row.drafted for row in result.rounds if row.round < number)
    # The next text meets it at its start.
    result = write(draft, target, **settings)
    assert (result.output_tokens, result.failures[0].action) == (expected, "target_alone")


def test_a_failure_may_be_the_end_and_leaves_the_text_so_far(pair: tuple[Worker, Worker]) -> None:
    draft, target = pair
    with pytest.raises(WorkerError, match="draft worker failed in round 4: UNAVAILABLE") as caught:
        write(draft, target, on_tokens=after(3, draft.server.stop), on_draft_failure="fail")
    assert caught.value.code == "UNAVAILABLE"
    result = caught.value.result
    assert result is not None
    assert 3 <= len(result.output_tokens) < LENGTH
    assert result.output_tokens == alone(target)[: len(result.output_tokens)]
    assert [(f.worker, f.round, f.action) for f in result.failures] == [("draft", 4, "gave_up")]
    assert wait_until(lambda: len(target.servicer.sessions) == 0)


def test_rejection_sampling_writes_the_same_text_when_the_draft_comes_back(pair: tuple[Worker, Worker]) -> None:
    draft, target = pair
    settings: dict[str, Any] = {"temperature": 0.9, "sampling": "rejection", "seed": 3}
    undisturbed = write(draft, target, **settings)
    result = write(draft, target, on_tokens=after(3, draft.restart), **settings)
    assert result.output_tokens == undisturbed.output_tokens
    assert [f.worker for f in result.failures] == ["draft"]


@pytest.mark.parametrize("mode", MODES)
def test_another_model_at_the_same_address_is_refused(pair: tuple[Worker, Worker], models: Any, mode: str) -> None:
    draft, target = pair

    def change() -> None:
        target.settings["model"] = models["other"]
        target.restart()

    with pytest.raises(WorkerError, match="another target worker answers now: model other instead of target; weights"):
        write(draft, target, on_tokens=after(2, change), mode=mode)


def test_a_second_text_is_written_by_the_model_of_the_first(pair: tuple[Worker, Worker], models: Any) -> None:
    draft, target = pair
    config = OrchestratorConfig(gamma=3, max_output_tokens=4)
    with TextWriter(draft.address, target.address) as writer:
        writer.write(PROMPT, config)
        draft.settings["model"] = models["other"]
        draft.restart()
        with pytest.raises(WorkerError, match="another draft worker answers now: model other instead of draft"):
            writer.write(PROMPT, config)


def test_a_worker_whose_sessions_are_all_busy_is_waited_for(models: dict[str, Path]) -> None:
    with serving("target", models["target"], max_sessions=1) as target:
        expected = alone(target)
        gate = Gate(target)
        call = target.stub.VerifyDrafts.future(
            pb.VerifyDraftsRequest(context=pb.Context(session_id="other", round=1, new_tokens=[65])), timeout=30
        )
        gate.wait()
        with pytest.raises(WorkerError, match="RESOURCE_EXHAUSTED: 1 session is in use") as caught:
            write(None, target, gamma=0, recovery_timeout_s=0.2)
        assert caught.value.code == "RESOURCE_EXHAUSTED"
        threading.Timer(0.3, gate.open).start()
        result = write(None, target, gamma=0)
        assert (result.output_tokens, call.result().round) == (expected, 1)
        assert result.failures == []  # it waited in line


# ---- the network in between


Trouble = Callable[[FaultyNetwork], None]
TROUBLES: dict[str, Trouble] = {
    "cut": FaultyNetwork.cut,
    "half-open": FaultyNetwork.go_silent,
    "twice": FaultyNetwork.repeat_next,
}


@pytest.mark.parametrize("role", ["draft", "target"])
@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("mode", ["sync", "lookahead"])
def test_a_connection_that_breaks(
    pair: tuple[Worker, Worker], mode: str, trouble: str, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, target = pair
    channel = Access.aio_channel

    def open_channel(access: Access, address: str) -> Any:
        """The one that breaks is looked after quickly. A busy machine makes another one answer late as well."""
        return channel(access, address, list(QUICK.items()) if address == network.address else CHANNEL_OPTIONS)

    expected = alone(target)
    ends: dict[str, Any] = {"draft": draft, "target": target}
    with faulty_network(ends[role].address) as network:
        ends[role] = network
        monkeypatch.setattr(Access, "aio_channel", open_channel)
        result = write(**ends, mode=mode, on_tokens=after(3, lambda: TROUBLES[trouble](network)))
    assert result.output_tokens == expected
    # What was repeated may be something that can be: gRPC's own messages about its windows.
    assert {f.worker for f in result.failures} in ([{role}] if trouble != "twice" else [{role}, set()])


def test_a_slow_network_and_late_replies_change_nothing(pair: tuple[Worker, Worker]) -> None:
    draft, target = pair
    with faulty_network(draft.address) as to_draft, faulty_network(target.address) as to_target:
        to_draft.delay_s, to_target.delay_s, to_target.bytes_per_s = 0.005, 0.01, 50_000
        result = write(to_draft, to_target, mode="lookahead")
    assert (result.output_tokens, result.failures) == (alone(target), [])


def test_a_reply_later_than_the_deadline_is_asked_for_again(pair: tuple[Worker, Worker]) -> None:
    draft, target = pair
    expected = alone(target)
    impatient: dict[str, Any] = {"rpc_timeout_s": 0.2, "connect_timeout_s": 0.3}
    with faulty_network(target.address) as network:

        def stall_for_a_while() -> None:
            network.stall()
            threading.Timer(0.6, network.resume).start()

        result = write(draft, network, on_tokens=after(3, stall_for_a_while), **impatient)
        assert result.output_tokens == expected
        assert [(f.worker, f.round) for f in result.failures] == [("target", 4)]
        with pytest.raises(WorkerError, match="target worker failed in round 4: ") as caught:
            write(draft, network, on_tokens=after(3, network.stall), recovery_timeout_s=0.5, **impatient)
    assert caught.value.result is not None
    tokens = caught.value.result.output_tokens
    assert (len(tokens) > 0, tokens) == (True, expected[: len(tokens)])


class Twice:
    """A target's stub whose replies come twice each."""

    def __init__(self, channel: Any) -> None:
        stub = TargetServiceStub(channel)
        self.Describe, self._stream = stub.Describe, stub.StreamVerify

    def StreamVerify(self) -> Any:
        call = self._stream()
        read, again = call.read, []

        async def read_twice() -> Any:
            if again:
                return again.pop()
            message = await read()
            again.append(message)
            return message

        call.read = read_twice
        return call


def test_a_reply_that_comes_twice_is_taken_once(pair: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch) -> None:
    draft, target = pair
    expected = alone(target)
    monkeypatch.setitem(STUBS, "target", Twice)
    assert write(draft, target, mode="lookahead").output_tokens == expected


# ---- processes that are killed


def test_workers_killed_at_random_moments() -> None:
    figures = soak.kill_workers(2, seed=1, downtime_s=0.1, prompts=3)
    assert figures["ok"], figures
    assert sum(figures["kills"].values()) == 2
    assert figures["texts"].get("right", 0) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("own", "kills"), [(False, 3), (True, 1)])
def test_bench_killed_at_random_moments(own: bool, kills: int) -> None:
    figures = soak.kill_bench(kills, seed=2, own=own, prompts=6)
    assert figures["ok"], figures
    assert (figures["kills"], figures["rows"]) == (kills, 6 * figures["runs"])


@pytest.mark.slow
def test_workflow_killed_at_random_moments() -> None:
    figures = soak.kill_workflow(3, seed=3, prompts=3)
    assert figures["ok"], figures
    assert (sum(figures["kills"].values()), figures["rows"]) == (3, 6 * figures["runs"])
