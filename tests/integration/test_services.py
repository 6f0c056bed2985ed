"""Both services over real gRPC: what they answer, what they refuse, and that a round happens once."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import specsplit
from specsplit.client.writer import TextWriter
from specsplit.models.fingerprint import fingerprint_model
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import MAX_GAMMA, OrchestratorConfig

from grpc_fixtures import (
    PROMPTS,
    VOCAB,
    Gate,
    Reference,
    Worker,
    context,
    draft_request,
    noisy_copy,
    serving,
    verify_request,
)
from waiting import wait_until

Code = grpc.StatusCode
Health = health_pb2.HealthCheckResponse
PROMPT = PROMPTS[0]


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Callable[..., Path]) -> Path:
    return tiny_model_folder("llama")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="module")
def target(folder: Path) -> Iterator[Worker]:
    with serving("target", folder, max_context=64, max_tree_nodes=20) as worker:
        yield worker


@pytest.fixture(scope="module")
def draft(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    weak = noisy_copy(folder, tmp_path_factory.mktemp("draft"), noise=0.03)
    with serving("draft", weak, max_context=64, max_tree_nodes=20, skip_layers=[1]) as worker:
        yield worker


@pytest.fixture(params=["draft", "target"])
def worker(request: pytest.FixtureRequest) -> Worker:
    found: Worker = request.getfixturevalue(request.param)
    return found


@pytest.fixture(autouse=True)
def _fresh_sessions(draft: Worker, target: Worker) -> Iterator[None]:
    yield
    for worker in (draft, target):
        for session in ("s", "t"):
            worker.stub.EndSession(pb.EndSessionRequest(session_id=session))


def ask(worker: Worker, *args: Any, **kwargs: Any) -> Any:
    """One round with the simplest request of the worker's service."""
    if worker.role == "draft":
        return worker.stub.GenerateDrafts(draft_request(*args, **kwargs), timeout=30)
    return worker.stub.VerifyDrafts(verify_request(*args, **kwargs), timeout=30)


def refused(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


# ---- what every gRPC client can ask


def test_health_is_reported_for_the_server_and_its_service(worker: Worker) -> None:
    health = health_pb2_grpc.HealthStub(worker.connect().channel)
    for service in ("", worker.server.service):
        assert health.Check(health_pb2.HealthCheckRequest(service=service)).status == Health.SERVING
    code, _ = refused(lambda: health.Check(health_pb2.HealthCheckRequest(service="another")))
    assert code == Code.NOT_FOUND


def test_reflection_lists_and_describes_the_service(worker: Worker) -> None:
    database = ProtoReflectionDescriptorDatabase(worker.connect().channel)
    own = {"draft": "specsplit.v1.DraftService", "target": "specsplit.v1.TargetService"}[worker.role]
    assert {own, "grpc.health.v1.Health"} <= set(database.get_services())
    service = DescriptorPool(database).FindServiceByName(own)
    verbs = {"draft": {"GenerateDrafts", "StreamDrafts"}, "target": {"VerifyDrafts", "StreamVerify", "StreamText"}}[
        worker.role
    ]
    assert set(service.methods_by_name) == {*verbs, "EndSession", "Describe"}


def test_describe_says_what_the_worker_is(draft: Worker, target: Worker, folder: Path) -> None:
    fingerprint = fingerprint_model(folder)
    described = target.stub.Describe(pb.DescribeRequest())
    assert (described.role, described.model, described.version) == ("target", folder.name, specsplit.__version__)
    assert described.weights_sha256 == fingerprint["weights_sha256"]
    assert described.tokenizer_sha256 == fingerprint["tokenizer_sha256"]
    assert (described.dtype, described.device, described.threads) == ("float32", "cpu", 1)
    assert (described.vocab_size, described.max_context) == (VOCAB, 64)
    assert list(described.eos_token_ids) == [2]
    assert described.parameters == fingerprint["parameters"]

    weak = draft.stub.Describe(pb.DescribeRequest())
    assert (weak.role, list(weak.skip_layers)) == ("draft", [1])
    assert weak.weights_sha256 != described.weights_sha256
    assert weak.tokenizer_sha256 == described.tokenizer_sha256
    assert weak.parameters < described.parameters


def test_a_session_cannot_hold_more_than_the_model_was_made_for(folder: Path) -> None:
    with serving("target", folder, max_context=100_000) as worker:
        assert worker.stub.Describe(pb.DescribeRequest()).max_context == 256


# ---- what is refused


@pytest.mark.parametrize(
    ("request_context", "status", "reason"),
    [
        (context([]), Code.INVALID_ARGUMENT, "new_tokens is empty"),
        (context([5, VOCAB]), Code.INVALID_ARGUMENT, f"token id {VOCAB} is outside the vocabulary of {VOCAB}"),
        (context([5], round=0), Code.INVALID_ARGUMENT, "round counts from 1"),
        (context([5], session=""), Code.INVALID_ARGUMENT, "session_id must have 1 to 128 characters"),
        (context([5], session="x" * 129), Code.INVALID_ARGUMENT, "session_id must have 1 to 128 characters"),
        (pb.Context(), Code.INVALID_ARGUMENT, "session_id"),
        (context([7], held=[5, 6]), Code.FAILED_PRECONDITION, "does not know the session"),
        (context([5], prefix_crc32=1), Code.FAILED_PRECONDITION, "send the full context with prefix_length 0"),
        (context([5] * 65), Code.RESOURCE_EXHAUSTED, "a context of 65 tokens .* exceed the 64"),
        (context([5], prefix_length=2**32 - 1), Code.RESOURCE_EXHAUSTED, "max_context"),
    ],
)
def test_a_context_that_cannot_be_served(
    worker: Worker, request_context: pb.Context, status: grpc.StatusCode, reason: str
) -> None:
    passes = worker.passes
    if worker.role == "draft":
        request: Any = pb.GenerateDraftsRequest(context=request_context, max_draft_tokens=1)
        code, details = refused(lambda: worker.stub.GenerateDrafts(request))
    else:
        code, details = refused(lambda: worker.stub.VerifyDrafts(pb.VerifyDraftsRequest(context=request_context)))
    assert (code, worker.passes) == (status, passes)
    assert re.search(reason, details), details


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (pb.TokenTree(token_ids=[5], parents=[-1]), "must have one length, got 1, 1 and 0"),
        (pb.TokenTree(parents=[-1], log_probs=[-1]), "must have one length, got 0, 1 and 1"),
        (pb.TokenTree(token_ids=[5], parents=[0], log_probs=[-1]), "node 0: parent 0"),
        (pb.TokenTree(token_ids=[5, 6], parents=[1, -1], log_probs=[-1, -1]), "node 0: parent 1"),
        (pb.TokenTree(token_ids=[5], parents=[-2], log_probs=[-1]), "node 0: parent -2"),
        (pb.TokenTree(token_ids=[VOCAB], parents=[-1], log_probs=[-1]), f"node 0: token id {VOCAB} is outside"),
        (pb.TokenTree(token_ids=[5], parents=[-1], log_probs=[0.5]), "node 0: log-probability 0.5"),
        (pb.TokenTree(token_ids=[5], parents=[-1], log_probs=[float("nan")]), "node 0: log-probability nan"),
        (pb.TokenTree(token_ids=[5], parents=[-1], log_probs=[float("-inf")]), "node 0: log-probability -inf"),
        (pb.TokenTree(token_ids=[5, 5], parents=[-1, -1], log_probs=[-1, -1]), "token 5 stands twice"),
    ],
)
def test_a_malformed_tree_is_refused(target: Worker, tree: pb.TokenTree, reason: str) -> None:
    code, details = refused(lambda: target.stub.VerifyDrafts(verify_request([5, 6], tree=tree)))
    assert code == Code.INVALID_ARGUMENT
    assert details.startswith("malformed tree: ")
    assert reason in details


def test_a_tree_that_is_too_large_is_refused(target: Worker, draft: Worker) -> None:
    chain = pb.TokenTree(token_ids=[5] * 21, parents=range(-1, 20), log_probs=[-1] * 21)
    wanted = (Code.RESOURCE_EXHAUSTED, "a tree of 21 nodes is over the limit of 20")
    assert refused(lambda: target.stub.VerifyDrafts(verify_request([5], tree=chain))) == wanted
    assert refused(lambda: draft.stub.GenerateDrafts(draft_request([5], gamma=21))) == wanted
    code, details = refused(lambda: draft.stub.GenerateDrafts(draft_request([5], gamma=4, branching=[8, 8, 8])))
    assert (code, details) == (Code.RESOURCE_EXHAUSTED, "a tree of 1096 nodes is over the limit of 20")


def test_a_context_and_its_draft_must_fit_together(target: Worker, draft: Worker) -> None:
    chain = pb.TokenTree(token_ids=[5] * 4, parents=range(-1, 3), log_probs=[-1] * 4)
    for call in (
        lambda: target.stub.VerifyDrafts(verify_request([5] * 61, tree=chain)),
        lambda: draft.stub.GenerateDrafts(draft_request([5] * 61, gamma=4)),
    ):
        code, details = refused(call)
        assert code == Code.RESOURCE_EXHAUSTED
        assert "61 tokens and 4 drafted ones exceed the 64" in details
    assert len(ask(draft, [5] * 60, gamma=4).tree.token_ids) == 4  # just fits


@pytest.mark.parametrize("gamma", [0, MAX_GAMMA + 1, 2**32 - 1])
def test_an_impossible_draft_length_is_refused(draft: Worker, gamma: int) -> None:
    answer = refused(lambda: draft.stub.GenerateDrafts(draft_request([5], gamma=gamma)))
    assert answer == (Code.INVALID_ARGUMENT, f"max_draft_tokens must be 1 to {MAX_GAMMA}, got {gamma}")


@pytest.mark.parametrize("branching", [[0], [2, 0], [9]])
def test_an_impossible_branching_is_refused(draft: Worker, branching: list[int]) -> None:
    code, details = refused(lambda: draft.stub.GenerateDrafts(draft_request([5], branching=branching)))
    assert (code, f"branching {branching}" in details) == (Code.INVALID_ARGUMENT, True)


def test_a_request_that_is_refused_costs_no_session(folder: Path) -> None:
    with serving("target", folder, max_sessions=1) as worker:
        ask(worker, PROMPT, session="kept")
        refused(lambda: ask(worker, [VOCAB], session="bad"))
        refused(lambda: ask(worker, [5] * 1000, session="long"))
        assert ask(worker, [9], session="kept", round=2, held=PROMPT)


def test_when_every_session_is_busy_the_next_one_is_refused(folder: Path) -> None:
    with serving("target", folder, max_sessions=1) as worker, ThreadPoolExecutor(1) as pool:
        gate = Gate(worker)
        running = pool.submit(ask, worker, PROMPT, session="busy")
        gate.wait()
        code, details = refused(lambda: ask(worker, PROMPT, session="late"))
        gate.open()
        assert (code, details[:21]) == (Code.RESOURCE_EXHAUSTED, "1 session is in use; ")
        assert running.result(30).next_token < VOCAB
        assert ask(worker, PROMPT, session="late").next_token < VOCAB


def test_what_goes_wrong_in_the_model_has_a_status_and_mends_itself(target: Worker) -> None:
    wanted = ask(target, PROMPT, session="t").next_token

    for failure, status, details in (
        (ZeroDivisionError("a fault of ours"), Code.INTERNAL, "ZeroDivisionError: a fault of ours"),
        (MemoryError(), Code.RESOURCE_EXHAUSTED, "not enough memory on this worker"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), Code.RESOURCE_EXHAUSTED, "not enough memory"),
    ):
        target.before_pass = lambda failure=failure: _raise(failure)
        answer = refused(lambda: ask(target, PROMPT))
        target.before_pass = lambda: None
        assert answer[0] == status
        assert answer[1].startswith(details)
        assert ask(target, PROMPT).next_token == wanted
        target.stub.EndSession(pb.EndSessionRequest(session_id="s"))


def _raise(failure: Exception) -> None:
    raise failure


# ---- drafting and verifying


def test_a_chain_is_the_drafts_own_greedy_text(folder: Path, reference: Reference) -> None:
    with serving("draft", folder) as same_as_target:
        reply = ask(same_as_target, PROMPT, gamma=6)
    assert list(reply.tree.token_ids) == reference.text(PROMPT, 6)
    assert list(reply.tree.parents) == [-1, 0, 1, 2, 3, 4]
    assert all(log_prob < 0 for log_prob in reply.tree.log_probs)


def test_nothing_is_drafted_after_a_stop_token(draft: Worker) -> None:
    tokens = list(ask(draft, PROMPT, gamma=4).tree.token_ids)
    cut = list(ask(draft, PROMPT, gamma=4, stop=[tokens[1]], round=2).tree.token_ids)
    assert cut == tokens[:2]


def test_a_round_accepts_what_the_target_would_write(target: Worker, reference: Reference) -> None:
    text = reference.text(PROMPT, 4)
    wrong = (text[2] + 1) % VOCAB
    tree = pb.TokenTree(
        token_ids=[wrong, text[0], text[1], wrong], parents=[-1, -1, 1, 2], log_probs=[-1.0, -2.0, -1.0, -1.0]
    )
    reply = ask(target, PROMPT, tree=tree)
    assert list(reply.accepted_nodes) == [1, 2]
    assert list(reply.accepted_tokens) == text[:2]
    assert reply.next_token == text[2]
    following = ask(target, [text[2]], round=2, held=[*PROMPT, *text[:2]])
    assert following.next_token == text[3]


def test_a_text_can_be_taken_back(target: Worker) -> None:
    first = ask(target, [*PROMPT, 9, 9]).next_token
    ask(target, [11, 12], round=2, held=PROMPT)
    again = ask(target, [9, 9], round=3, held=PROMPT)
    assert again.next_token == first


# ---- rounds


def test_a_round_sent_again_gets_the_same_reply_without_a_step(worker: Worker) -> None:
    first = ask(worker, PROMPT)
    passes = worker.passes
    assert ask(worker, PROMPT) == first
    assert worker.passes == passes


def test_a_round_sent_again_while_it_runs_is_one_step(worker: Worker) -> None:
    gate, passes = Gate(worker), worker.passes
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(ask, worker, PROMPT, **({"gamma": 1} if worker.role == "draft" else {}))]
        gate.wait()
        calls.append(pool.submit(ask, worker, PROMPT, **({"gamma": 1} if worker.role == "draft" else {})))
        session = worker.servicer.sessions._sessions["s"]
        assert wait_until(lambda: session.users == 2)
        gate.open()
        first, second = (call.result(30) for call in calls)
    worker.before_pass = lambda: None
    assert first == second
    assert worker.passes == passes + 1


def test_a_round_that_is_over_is_refused(worker: Worker) -> None:
    ask(worker, PROMPT)
    ask(worker, [9], round=2, held=PROMPT)
    for number, tokens in ((1, PROMPT), (2, [10])):  # an old round; the same round with another content
        code, details = refused(lambda n=number, t=tokens: ask(worker, t, round=n, held=PROMPT if n == 2 else []))
        assert code == Code.ABORTED
        assert f"round {number} is over: this session has answered round 2" in details


def test_a_prefix_that_the_session_does_not_hold_is_refused_and_the_whole_context_is_not(worker: Worker) -> None:
    ask(worker, PROMPT)
    code, details = refused(lambda: ask(worker, [9], round=2, held=[5, 6, 8]))
    assert (code, "not the prefix of 3" in details) == (Code.FAILED_PRECONDITION, True)
    assert ask(worker, [5, 6, 8, 9], round=2)


def test_an_ended_session_is_gone(worker: Worker) -> None:
    ask(worker, PROMPT)
    end = pb.EndSessionRequest(session_id="s")
    assert worker.stub.EndSession(end).existed
    assert not worker.stub.EndSession(end).existed
    code, _ = refused(lambda: ask(worker, [9], round=2, held=PROMPT))
    assert code == Code.FAILED_PRECONDITION


def test_the_times_of_a_reply_add_up(worker: Worker) -> None:
    started = time.perf_counter()
    timings = ask(worker, PROMPT).timings
    wall_ms = (time.perf_counter() - started) * 1e3
    assert timings.compute_ms > 0
    assert timings.queue_ms >= 0
    assert timings.queue_ms + timings.compute_ms <= timings.server_ms <= wall_ms


def test_waiting_for_the_model_is_queue_time(target: Worker) -> None:
    gate = Gate(target)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, target, PROMPT, session="s")
        gate.wait()
        second = pool.submit(ask, target, PROMPT, session="t")
        assert wait_until(lambda: "t" in target.servicer.sessions._sessions)
        started = time.perf_counter()
        time.sleep(0.05)
        held_ms = (time.perf_counter() - started) * 1e3
        gate.open()
        assert first.result(30).timings.compute_ms >= held_ms
        waited = second.result(30).timings
    target.before_pass = lambda: None
    assert waited.queue_ms >= held_ms / 2  # it may have been queued a little after it was seen
    assert waited.queue_ms + waited.compute_ms <= waited.server_ms


# ---- many clients


def test_clients_at_the_same_time_get_their_own_texts(draft: Worker, target: Worker, reference: Reference) -> None:
    config = OrchestratorConfig(gamma=3, tree="2", max_output_tokens=16, ignore_eos=True)
    barrier = threading.Barrier(len(PROMPTS))

    def write(prompt: list[int]) -> list[int]:
        with TextWriter(draft.address, target.address) as writer:
            barrier.wait(30)
            return writer.write(prompt, config).output_tokens

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        texts = list(pool.map(write, PROMPTS))
    assert texts == [reference.text(prompt, 16) for prompt in PROMPTS]
    assert wait_until(lambda: len(target.servicer.sessions) == 0)


# ---- the end


def takes_calls(worker: Worker) -> bool:
    try:
        return bool(worker.stub.Describe(pb.DescribeRequest()).role)
    except grpc.RpcError as error:
        return error.code() != Code.UNAVAILABLE


def test_a_stopping_worker_says_so_finishes_its_calls_and_takes_no_more(folder: Path) -> None:
    worker = Worker("target", folder, drain_s=30)
    gate = Gate(worker)
    watch = health_pb2_grpc.HealthStub(worker.connect().channel).Watch(health_pb2.HealthCheckRequest(service=""))
    with ThreadPoolExecutor(2) as pool:
        try:
            assert next(watch).status == Health.SERVING
            running = pool.submit(ask, worker, PROMPT)
            gate.wait()
            stopping = pool.submit(worker.server.stop)
            assert next(watch).status == Health.NOT_SERVING
            watch.cancel()
            assert wait_until(lambda: not takes_calls(worker))
            assert not stopping.done()
        finally:
            gate.open()
        assert running.result(30).next_token < VOCAB
        stopping.result(30)
    worker.close()


def test_a_worker_does_not_wait_for_a_pass_that_outlasts_the_drain(folder: Path) -> None:
    worker = Worker("target", folder, drain_s=0.05)
    gate = Gate(worker)
    with ThreadPoolExecutor(1) as pool:
        try:
            running = pool.submit(ask, worker, PROMPT)
            gate.wait()
            worker.server.stop()
            code, _ = refused(lambda: running.result(30))
            assert code == Code.UNAVAILABLE  # so that the client tries again
        finally:
            gate.open()
    worker.close()
