"""More clients than sessions, and clients that take all they can get: everybody else still gets a text."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from specsplit.client.event_loop import event_loop
from specsplit.client.pipeline import run_speculative_loop_async
from specsplit.client.result import SpeculativeResult
from specsplit.client.stream import Spent, Stream
from specsplit.client.writer import TextWriter
from specsplit.errors import WorkerError
from specsplit.models.sources import prepare_model
from specsplit.rpc.credentials import Access
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.rpc.v1 import specsplit_pb2_grpc as pb_grpc
from specsplit.settings.run import OrchestratorConfig
from specsplit.worker import calls, server, sessions

from grpc_fixtures import Worker, serving, verify_request
from waiting import wait_until

PROMPT = [65, 66, 67]
MODES = ("sync", "overlap", "lookahead")
MAYBE = {"UNAVAILABLE"}  # grpc.aio may meet the end of a stream while it writes, and then does not know its status
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "IDLE_S", 0.3)
    monkeypatch.setattr(calls, "QUIET_S", 0.3)
    monkeypatch.setattr(server, "SWEEP_S", 0.05)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, own in {"draft": {"acceptance": 0.8}, "target": {"step_ms": 2.0}}.items():
        prepare_model({"source": "synthetic", **own}, name, folder / name)
    return {name: folder / name for name in ("draft", "target")}


@contextmanager
def workers(models: dict[str, Path], **settings: Any) -> Iterator[tuple[Worker, Worker]]:
    with (
        serving("draft", models["draft"], **settings) as draft,
        serving("target", models["target"], **settings) as target,
    ):
        yield draft, target


def write(draft: Worker | None, target: Worker, *, on_tokens: Any = None, **settings: Any) -> SpeculativeResult:
    given = {"gamma": 3 if draft else 0, "max_output_tokens": 40, "recovery_timeout_s": 20.0, **settings}
    with TextWriter(draft and draft.address, target.address, access=target.access) as writer:
        return writer.write(PROMPT, OrchestratorConfig(**given), on_tokens=on_tokens)


def at_once(draft: Worker, target: Worker, configs: list[OrchestratorConfig], prompts: Any = None) -> list[Any]:
    """A text of each configuration, all at once, each over connections of its own; (result, times of its tokens)."""

    async def one(number: int) -> Any:
        times: list[float] = []
        async with (
            grpc.aio.insecure_channel(draft.address, options=OWN_CONNECTION) as to_draft,
            grpc.aio.insecure_channel(target.address, options=OWN_CONNECTION) as to_target,
        ):
            stubs = pb_grpc.DraftServiceStub(to_draft), pb_grpc.TargetServiceStub(to_target)
            result = await run_speculative_loop_async(
                *stubs, PROMPT, configs[number], on_tokens=lambda _: times.append(time.monotonic())
            )
        return result, times

    async def everything() -> list[Any]:
        return await asyncio.gather(*(one(number) for number in range(len(configs))))

    return event_loop().run(everything())


# ---- more clients than sessions


@pytest.mark.parametrize("mode", MODES)
def test_who_finds_all_sessions_taken_waits_in_line(
    models: dict[str, Path], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("IDLE_S", "SHORT_IDLE_S"):  # a busy machine is no reason to be sent away
        monkeypatch.setattr(sessions, name, 20.0)
    with workers(models, max_sessions=2) as (draft, target):
        expected = write(None, target).output_tokens
        config = OrchestratorConfig(mode=mode, gamma=3, max_output_tokens=40)
        texts = at_once(draft, target, [config] * 5)
        assert [result.output_tokens for result, _ in texts] == [expected] * 5
        assert [result.failures for result, _ in texts] == [[]] * 5
        for worker in (draft, target):
            assert wait_until(lambda worker=worker: len(worker.servicer.sessions._spare) == 2)


@pytest.mark.slow
def test_every_client_gets_on_while_others_write_for_long(models: dict[str, Path]) -> None:
    """Four texts, one session on each worker: each has its turn long before any of them is done."""
    with workers(models, max_sessions=1, session_slice_s=0.1, max_context=2048) as (draft, target):
        expected = write(None, target, max_output_tokens=400).output_tokens
        config = OrchestratorConfig(gamma=2, max_output_tokens=400)
        texts = at_once(draft, target, [config] * 4)
    assert [result.output_tokens for result, _ in texts] == [expected] * 4
    first_end = min(times[-1] for _, times in texts)
    assert all(times[0] < first_end for _, times in texts)
    assert {failure.code for result, _ in texts for failure in result.failures} - MAYBE == {"FAILED_PRECONDITION"}


def test_a_streamed_text_gives_way_between_two_tokens(models: dict[str, Path]) -> None:
    """One session and one place: others write while a long text is streamed."""
    config = OrchestratorConfig(gamma=0, max_output_tokens=120, max_rounds=120)
    with workers(models, max_sessions=1, max_calls=1, session_slice_s=0.05) as (_, target):
        expected = write(None, target, max_output_tokens=120).output_tokens
        begun, ended = threading.Event(), threading.Event()

        def stream() -> None:
            with TextWriter(None, target.address) as writer:
                results.append(writer.stream_target(PROMPT, config, on_tokens=lambda _: begun.set()))
            ended.set()

        results: list[SpeculativeResult] = []
        thread = threading.Thread(target=stream)
        thread.start()
        begun.wait(10)
        assert write(None, target, max_output_tokens=4).output_tokens == expected[:4]
        assert not ended.is_set()
        thread.join(20)
    (streamed,) = results
    assert streamed.output_tokens == expected
    assert {failure.code for failure in streamed.failures} - MAYBE == {"FAILED_PRECONDITION"}


def test_nobody_is_sent_away_while_nobody_waits(models: dict[str, Path]) -> None:
    with workers(models, max_sessions=1, session_slice_s=0.05) as (draft, target):
        slow = write(draft, target, on_tokens=lambda _: time.sleep(0.35), max_output_tokens=8)
    assert slow.failures == []


def test_a_wait_in_line_has_a_bound_and_says_what_for(models: dict[str, Path]) -> None:
    with serving("target", models["target"], max_sessions=1) as target:
        waiting = pytest.raises(WorkerError, match=r"1 session is in use; .*waited 0.2 s in line")
        with target.servicer.sessions.use(pb.Context(session_id="mine", new_tokens=[1])), waiting as caught:
            write(None, target, recovery_timeout_s=0.2)
        assert caught.value.code == "RESOURCE_EXHAUSTED"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("role", ["draft", "target"])
def test_only_the_side_that_failed_is_built_anew(models: dict[str, Path], mode: str, role: str) -> None:
    with workers(models, max_context=256) as pair:
        expected = write(None, pair[1], max_output_tokens=60).output_tokens
        opened = {worker.role: count_opened(worker) for worker in pair}
        failing = pair[0] if role == "draft" else pair[1]
        bursts: list[list[int]] = []

        def evict(tokens: list[int]) -> None:
            bursts.append(tokens)
            if len(bursts) in (3, 6):
                for session_id in list(failing.servicer.sessions._sessions):
                    failing.servicer.sessions.end(session_id)

        result = write(*pair, mode=mode, on_tokens=evict, max_output_tokens=60)
    assert result.output_tokens == expected
    assert {failure.worker for failure in result.failures} == {role}
    assert {each: len(ids) for each, ids in opened.items()} == {"draft": 1, "target": 1} | {
        role: 1 + len(result.failures)
    }


def count_opened(worker: Worker) -> set[str]:
    """Filled with the keys of the sessions that the worker opens from now on."""
    keys: set[str] = set()
    store = worker.servicer.sessions
    open_one = store._open

    def counted(key: str, caller: Any) -> Any:
        keys.add(key)
        return open_one(key, caller)

    store._open = counted
    return keys


def test_texts_stay_right_while_sides_fail_in_turn_and_rounds_begin_by_themselves(models: dict[str, Path]) -> None:
    """The target has often begun the next round from a prepared draft when the draft worker fails."""
    with workers(models, max_context=512) as pair:
        expected = write(None, pair[1], max_output_tokens=80).output_tokens
        over = threading.Event()

        def evict_again_and_again() -> None:
            number = 0
            while not over.wait(0.011):
                store = pair[number % 2].servicer.sessions
                number += 1
                for key in list(store._sessions):
                    store.end(key)

        thread = threading.Thread(target=evict_again_and_again)
        thread.start()
        try:
            for mode in MODES:
                result = write(*pair, mode=mode, max_output_tokens=80, fan_out=8)
                assert result.output_tokens == expected
                assert result.failures
        finally:
            over.set()
            thread.join()


# ---- clients that take all they can get


def silence(worker: Worker, channel: grpc.Channel) -> Iterator[None]:
    """Streams that say nothing, as many as there may be."""
    stub = worker.access.stub("target", channel)
    over = threading.Event()
    streams = [stub.StreamVerify(_never(over)) for _ in range(worker.servicer.config.stream_limit + 50)]
    yield
    over.set()
    for stream in streams:
        stream.cancel()


def silence_after_a_round(worker: Worker, channel: grpc.Channel) -> Iterator[None]:
    """Streams that open a session and say nothing more."""
    stub = worker.access.stub("target", channel)
    over = threading.Event()
    streams = [stub.StreamVerify(_one_then_never(f"hog{i}", over)) for i in range(20)]
    yield
    over.set()
    for stream in streams:
        stream.cancel()


def calls_without_a_message(worker: Worker, channel: grpc.Channel) -> Iterator[None]:
    """Unary calls whose message never comes; gRPC itself would wait for it."""
    over = threading.Event()
    metadata = (("authorization", f"Bearer {worker.access.token}"),)
    call = channel.stream_unary("/specsplit.v1.TargetService/VerifyDrafts")
    futures = [call.future(_never(over), metadata=metadata) for _ in range(worker.servicer.config.stream_limit + 50)]
    yield
    over.set()
    for future in futures:
        future.cancel()


def greed(worker: Worker, channel: grpc.Channel) -> Iterator[None]:
    """Streams that work all the time, each with a session of its own, more than there are."""
    stub = worker.access.stub("target", channel)
    over = threading.Event()

    def work(number: int) -> None:
        while not over.is_set():
            with suppress(grpc.RpcError):
                for _ in stub.StreamVerify(_rounds(f"greedy{number}-{time.monotonic()}", over)):
                    if over.is_set():
                        return

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(20)]
    for thread in threads:
        thread.start()
    yield
    over.set()


def replies_that_are_not_read(worker: Worker, channel: grpc.Channel) -> Iterator[None]:
    stub = worker.access.stub("target", channel)
    over = threading.Event()
    streams = [stub.StreamVerify(_rounds(f"deaf{i}", over)) for i in range(20)]
    yield
    over.set()
    for stream in streams:
        stream.cancel()


def reflection(worker: Worker, channel: grpc.Channel) -> Iterator[None]:
    """Streams of another service, which no session bounds."""
    over = threading.Event()
    metadata = (("authorization", f"Bearer {worker.access.token}"),)
    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    call = channel.stream_stream(method)
    streams = [call(_never(over), metadata=metadata) for _ in range(worker.servicer.config.stream_limit + 50)]
    yield
    over.set()
    for stream in streams:
        stream.cancel()


def _never(over: threading.Event) -> Iterator[Any]:
    over.wait(60)
    yield from ()


def _one_then_never(session: str, over: threading.Event) -> Iterator[Any]:
    yield pb.StreamVerifyRequest(verify=verify_request(PROMPT, session=session))
    yield from _never(over)


def _rounds(session: str, over: threading.Event) -> Iterator[Any]:
    for number in range(1, 10_000):
        if over.wait(0.005):
            return
        yield pb.StreamVerifyRequest(verify=verify_request(PROMPT, session=session, round=number))


# The next way to be a nuisance is one line.
NUISANCES: list[Callable[[Worker, grpc.Channel], Iterator[None]]] = [
    *(silence, silence_after_a_round, calls_without_a_message, greed, replies_that_are_not_read, reflection)
]


# Nothing tells the clients apart that have one token; another token is no disadvantage, whether streams wait or work.
@pytest.mark.parametrize(
    ("nuisance", "same_token"), [*((each, True) for each in NUISANCES), (silence, False), (greed, False)]
)
def test_a_client_with_a_valid_token_locks_nobody_out(
    models: dict[str, Path], tmp_path: Path, nuisance: Any, same_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specsplit.settings.worker.WAITING_CALLS", 30)
    tokens = tmp_path / "tokens"
    tokens.write_text("nuisance-nuisance-nuisance\nother-other-other-other\n")
    tokens.chmod(0o600)
    theirs = Access(token="nuisance-nuisance-nuisance")
    ours = theirs if same_token else Access(token="other-other-other-other")
    settings = {"max_sessions": 2, "max_calls": 3, "session_slice_s": 0.3, "token_file": tokens}
    with serving("target", models["target"], access=theirs, **settings) as worker:
        worker.access = ours
        expected = write(None, worker).output_tokens
        worker.access = theirs
        with grpc.insecure_channel(worker.address, options=OWN_CONNECTION) as channel:
            bothered = nuisance(worker, channel)
            next(bothered)
            time.sleep(0.3)
            worker.access = ours
            for _ in range(2):
                assert write(None, worker, recovery_timeout_s=30.0).output_tokens == expected
            stub = ours.stub("target", channel)
            assert stub.Describe(pb.DescribeRequest(), timeout=20).role == "target"
            for _ in bothered:
                pass
        assert wait_until(lambda: len(worker.server._open_calls) == 0)
        assert wait_until(lambda: len(worker.servicer.sessions) == 0 or nuisance is calls_without_a_message)
        assert worker.servicer.places._taken == 0


# ---- silence


def test_a_silent_stream_is_ended_and_a_text_does_not_mind(models: dict[str, Path]) -> None:
    with workers(models, stream_idle_s=0.2) as (draft, target):
        stream = target.stub.StreamVerify(_never(over := threading.Event()), timeout=30)
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "nothing came for 0.2 s" in caught.value.details()
        over.set()
        expected = write(None, target, max_output_tokens=12).output_tokens
        slept: list[int] = []

        def sleep_once(_: list[int]) -> None:
            if not slept:
                slept.append(1)
                time.sleep(0.6)

        result = write(draft, target, on_tokens=sleep_once, max_output_tokens=12)
        assert result.output_tokens == expected
        assert {failure.code for failure in result.failures} - MAYBE == {"FAILED_PRECONDITION"}


@pytest.mark.parametrize(("kind", "most"), [("rpc", 2), ("stream", 1), ("answers", 1)])
def test_texts_at_once_end_right_where_the_system_gives_few_threads(
    models: dict[str, Path], kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if thread.name.startswith(kind) and sum(t.name.startswith(kind) for t in threading.enumerate()) >= most:
            raise RuntimeError("can't start new thread")
        start(thread)

    with workers(models) as (draft, target):
        expected = write(None, target, max_output_tokens=12).output_tokens
        assert wait_until(lambda: not any(t.name.startswith(("stream", "answers")) for t in threading.enumerate()))
        monkeypatch.setattr(threading.Thread, "start", limited)
        config = OrchestratorConfig(gamma=0, max_output_tokens=12, rpc_timeout_s=5.0)
        texts = at_once(draft, target, [config] * 3)
        assert [result.output_tokens for result, _ in texts] == [expected] * 3


def test_calls_that_wait_for_their_message_end_as_well(models: dict[str, Path]) -> None:
    with serving("target", models["target"], stream_idle_s=0.2) as target:
        with grpc.insecure_channel(target.address) as channel:
            over = threading.Event()
            future = channel.stream_unary("/specsplit.v1.TargetService/VerifyDrafts").future(_never(over), timeout=30)
            error = future.exception()
            over.set()
        assert error.code() == grpc.StatusCode.CANCELLED
        assert len(target.server._open_calls) == 0


def test_everyone_who_asks_a_broken_stream_learns_that_it_is() -> None:
    """One that asked may have been cancelled when the answer came; then nobody would know."""

    class Broken:
        def cancel(self) -> None: ...

        async def read(self) -> Any:
            return grpc.aio.EOF

        async def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.ABORTED

        async def details(self) -> str:
            return "gone"

        async def trailing_metadata(self) -> Any:
            return ()

    async def ask_twice() -> list[str]:
        stream = Stream("draft", Broken, timeout_s=5.0, spent=Spent())
        found = await asyncio.gather(stream.receive(), stream.receive(), return_exceptions=True)
        stream.end()
        return [str(each) for each in found]

    assert event_loop().run(ask_twice()) == ["draft worker: ABORTED: gone"] * 2
