"""The target alone, streaming: the text of gamma 0 in one call, within the same limits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from specsplit.client import recovery
from specsplit.client.result import SpeculativeResult
from specsplit.client.writer import TextWriter
from specsplit.errors import PromptError, WorkerError
from specsplit.rpc.credentials import Access
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig

from grpc_fixtures import PROMPTS, VOCAB, Gate, Worker, context, serving
from waiting import wait_until

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def target(tiny_model_folder: Callable[..., Path]) -> Iterator[Worker]:
    with serving("target", tiny_model_folder("llama"), max_context=64, max_sessions=2, max_calls=3) as worker:
        yield worker


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "FIRST_WAIT_S", 0.02)


def both(
    target: Worker, prompt: list[int], **settings: Any
) -> tuple[SpeculativeResult, SpeculativeResult, OrchestratorConfig]:
    config = OrchestratorConfig(**{"gamma": 0, "max_output_tokens": 24, "recovery_timeout_s": 5, **settings})
    with TextWriter(None, target.address, access=Access.of(config)) as writer:
        return writer.stream_target(prompt, config), writer.write(prompt, config), config


@pytest.mark.parametrize("prompt", PROMPTS[:2])
@pytest.mark.parametrize(
    "settings",
    [
        {"ignore_eos": True},
        {"ignore_eos": True, "temperature": 0.8, "top_k": 20, "seed": 5},
        {"ignore_eos": True, "temperature": 1.2, "top_p": 0.9, "sampling": "rejection", "seed": 6},
        {"stop_token_ids": [1 << 40, *range(0, VOCAB, 4)]},
        {"temperature": 1.0, "stop_token_ids": list(range(0, VOCAB, 9))},
        {"ignore_eos": True, "max_rounds": 5},
        {"ignore_eos": True, "max_output_tokens": 500},  # until the context is full
        {"ignore_eos": True, "max_context": 20},
        {"ignore_eos": True, "rtt_ms": 6.0, "jitter_ms": 2.0, "max_output_tokens": 6},
    ],
)
def test_the_text_is_that_of_gamma_0(target: Worker, prompt: list[int], settings: dict[str, Any]) -> None:
    streamed, looped, _ = both(target, prompt, **settings)
    assert streamed.output_tokens == looped.output_tokens
    assert streamed.finish_reason == looped.finish_reason
    assert len(streamed.rounds) == len(looped.rounds)
    assert streamed.failures == []
    arrived = [measured.arrived_ms for measured in streamed.rounds]
    assert arrived == sorted(arrived)
    assert wait_until(lambda: len(target.servicer.sessions) == 0)


def test_it_is_one_pass_a_token(target: Worker) -> None:
    before = target.passes
    streamed, _, _ = both(target, PROMPTS[0], ignore_eos=True)
    assert target.passes - before == 2 * len(streamed.output_tokens) == 48


def stream(target: Worker, new_tokens: Any = (5, 6), session: str = "s", **fields: Any) -> list[int]:
    held = fields.pop("held", ())
    request = pb.StreamTextRequest(
        context=context(list(new_tokens), session=session, held=held), **{"max_tokens": 4, **fields}
    )
    return [token for reply in target.stub.StreamText(request) for token in reply.token_ids]


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"max_tokens": 0}, Code.INVALID_ARGUMENT, "max_tokens must be at least 1"),
        ({"max_tokens": 63}, Code.RESOURCE_EXHAUSTED, "2 tokens and 63 more exceed the 64"),
        ({"new_tokens": []}, Code.INVALID_ARGUMENT, "new_tokens is empty"),
        ({"new_tokens": [VOCAB]}, Code.INVALID_ARGUMENT, f"token id {VOCAB} is outside"),
        ({"new_tokens": [1] * 65}, Code.RESOURCE_EXHAUSTED, "max_context"),
        ({"held": [1, 2]}, Code.INVALID_ARGUMENT, "prefix_length must be 0"),
        ({"session": ""}, Code.INVALID_ARGUMENT, "session_id must have"),
        ({"session": "x" * 129}, Code.INVALID_ARGUMENT, "session_id must have"),
        ({"sampling": pb.Sampling(temperature=-1)}, Code.INVALID_ARGUMENT, "sampling: temperature"),
        ({"sampling": pb.Sampling(temperature=1, top_p=2)}, Code.INVALID_ARGUMENT, "sampling: top_p"),
    ],
)
def test_what_is_refused(target: Worker, fields: dict[str, Any], status: Any, said: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        stream(target, **fields)
    assert (refused.value.code(), said in refused.value.details()) == (status, True), refused.value.details()
    assert len(stream(target)) == 4


def test_a_session_of_that_name_leaves_nothing_in_the_text(target: Worker) -> None:
    expected = stream(target, session="fresh")
    target.stub.VerifyDrafts(pb.VerifyDraftsRequest(context=context([9, 8, 7], session="used")))
    assert stream(target, session="used") == expected


def test_a_text_that_nobody_reads_any_more_is_not_written_on(target: Worker) -> None:
    gate = Gate(target)
    before = target.passes
    try:
        call = target.stub.StreamText(pb.StreamTextRequest(context=context([5, 6]), max_tokens=60))
        gate.wait()
        call.cancel()
        wait_until(lambda: call.done())
    finally:
        gate.open()
        target.before_pass = lambda: None
    assert wait_until(lambda: len(target.servicer.sessions) == 0)
    assert target.passes - before < 10


def test_calls_over_the_limit_wait_as_those_of_any_kind(target: Worker) -> None:
    gate = Gate(target)
    codes: list[str] = []

    def read(number: int) -> None:
        try:
            codes.append(f"OK {len(stream(target, session=f'many{number}'))}")
        except grpc.RpcError as error:
            codes.append(error.code().name)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    try:
        for thread in threads:
            thread.start()
        gate.wait()
    finally:
        gate.open()
        target.before_pass = lambda: None
    for thread in threads:
        thread.join(30)
    assert codes == ["OK 4"] * 4


def test_a_worker_that_wants_a_token_is_shown_one(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-secret-of-some-length-1234567890\n")
    access = Access(token="a-secret-of-some-length-1234567890")
    settings = {"token_file": tmp_path / "token", "access": access}
    with serving("target", tiny_model_folder("llama"), **settings) as worker:
        streamed, looped, _ = both(worker, PROMPTS[1], token_file=tmp_path / "token")
        assert streamed.output_tokens == looped.output_tokens
        with grpc.insecure_channel(worker.address) as channel, pytest.raises(grpc.RpcError) as refused:
            list(Access().stub("target", channel).StreamText(pb.StreamTextRequest(context=context([5]), max_tokens=2)))
        assert refused.value.code() == Code.UNAUTHENTICATED


def test_a_worker_that_is_started_again_writes_the_rest(tiny_model_folder: Callable[..., Path]) -> None:
    config = OrchestratorConfig(gamma=0, max_output_tokens=24, ignore_eos=True, recovery_timeout_s=20)
    with serving("target", tiny_model_folder("llama"), drain_s=0) as worker:
        with TextWriter(None, worker.address) as writer:
            expected = writer.write(PROMPTS[0], config).output_tokens
            count = worker.passes

            def stop() -> None:
                if worker.passes == count + 9:
                    worker.before_pass = lambda: None
                    threading.Thread(target=worker.restart).start()
                    threading.Event().wait(0.3)

            worker.before_pass = stop
            result = writer.stream_target(PROMPTS[0], config)
        assert result.output_tokens == expected
        assert [failure.worker for failure in result.failures] == ["target"]


def test_errors_are_those_of_the_loop(target: Worker) -> None:
    with TextWriter(None, target.address) as writer, pytest.raises(PromptError, match="has 64 tokens, a text can have"):
        writer.stream_target([1] * 64, OrchestratorConfig(gamma=0))
    config = OrchestratorConfig(gamma=0, connect_timeout_s=0.2, recovery_timeout_s=0)
    with TextWriter(None, "127.0.0.1:1") as writer, pytest.raises(WorkerError, match="target worker does not answer"):
        writer.stream_target([1], config)
