"""Whatever arrives: the status of the table, no crash, no hang, and a good request beside it is answered."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.worker.inbox import MOST_WAITING

from grpc_fixtures import Gate, Worker, context, draft_request, serving, verify_request
from malformed import (
    DRAFT,
    MAX_CONTEXT,
    MAX_NODES,
    STREAMS,
    TABLE,
    VERIFY,
    Code,
    Malformed,
    good,
    hold,
    in_stream,
)
from waiting import wait_until

SERVICES = {"TargetService": VERIFY, "DraftService": DRAFT}
# Of a request that may be right or wrong in any way.
ALLOWED = {Code.OK, Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION, Code.RESOURCE_EXHAUSTED, Code.ABORTED}


@pytest.fixture(scope="module")
def workers(tiny_model_folder: Callable[..., Path]) -> Iterator[dict[str, Worker]]:
    """By unary method."""
    limits = {"max_context": MAX_CONTEXT, "max_tree_nodes": MAX_NODES}
    folder = tiny_model_folder("llama")
    with serving("target", folder, **limits) as target, serving("draft", folder, **limits) as draft:
        found = {VERIFY: target, DRAFT: draft}
        for method in found:
            hold(channel_for(found, method), method)
        yield found
        for channel in CHANNELS.values():
            channel.close()
        CHANNELS.clear()


CHANNELS: dict[str, grpc.Channel] = {}


def channel_for(workers: dict[str, Worker], method: str) -> grpc.Channel:
    """A channel that sends messages of any size."""
    address = workers[VERIFY if "TargetService" in method else DRAFT].address
    if address not in CHANNELS:
        CHANNELS[address] = grpc.insecure_channel(address, options=[("grpc.max_send_message_length", -1)])
    return CHANNELS[address]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: f"{case.method.rpartition('/')[2]}: {case.name}")
def test_each_mistake_has_its_status(workers: dict[str, Worker], case: Malformed) -> None:
    passes = [worker.passes for worker in workers.values()]
    status, details = case.send(channel_for(workers, case.method), random.Random(case.name))
    assert status == case.status, details
    assert details
    assert len(details) <= 500
    if "two sessions" not in case.name:
        assert [worker.passes for worker in workers.values()] == passes


def field_values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return messages(field.message_type.name)
    if field.type == FieldDescriptor.TYPE_STRING:
        return st.sampled_from(["s", "held", ""]) | st.text(max_size=200)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=200)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        width = 32 if field.cpp_type == FieldDescriptor.CPPTYPE_FLOAT else 64
        return st.sampled_from([0.0, 1.0, -1.0]) | st.floats(width=width)
    low = -(2**31) if field.cpp_type == FieldDescriptor.CPPTYPE_INT32 else 0
    high = {FieldDescriptor.CPPTYPE_INT32: 2**31, FieldDescriptor.CPPTYPE_UINT32: 2**32}.get(field.cpp_type, 2**64)
    # Small numbers make requests that get far.
    return st.integers(max(low, -1), 6) | st.integers(max(low, -1), 130) | st.integers(low, high - 1)


def messages(name: str) -> st.SearchStrategy[Any]:
    """Any message of that type: each field left out, or of any value."""
    kind = getattr(pb, name)
    fields = {}
    for field in kind.DESCRIPTOR.fields:
        values = field_values(field)
        fields[field.name] = st.lists(values, max_size=6) if field.is_repeated else st.none() | values
    return st.fixed_dictionaries(fields).map(
        lambda given: kind(**{key: value for key, value in given.items() if value is not None})
    )


def plausible(name: str) -> st.SearchStrategy[Any]:
    """A request that is right but for one of its parts, as a rule."""
    kind = getattr(pb, name)
    tokens = st.lists(st.integers(0, 127), min_size=1, max_size=8)
    contexts = st.builds(lambda t, s: context(t, session=s), tokens, st.sampled_from("abc"))
    base = contexts.map(lambda c: kind(context=c))
    if name == "GenerateDraftsRequest":
        base = st.builds(lambda c, gamma: kind(context=c, max_draft_tokens=gamma), contexts, st.integers(1, 8))
    return st.builds(lambda request, other: kind.FromString(_merged(request, other)), base, messages(name))


def _merged(request: Any, other: Any) -> bytes:
    """The request with what the other one says beside its context."""
    other.ClearField("context")
    request.MergeFrom(other)
    data: bytes = request.SerializeToString()
    return data


FUZZ = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def answered(workers: dict[str, Worker], method: str, data: bytes | list[bytes]) -> None:
    case = Malformed("fuzz", method, Code.OK, lambda _: data)
    status, details = case.send(channel_for(workers, method), random.Random(0))
    assert status in ALLOWED, details


@FUZZ
@given(request=messages("VerifyDraftsRequest") | plausible("VerifyDraftsRequest"))
def test_any_verification(workers: dict[str, Worker], request: Any) -> None:
    answered(workers, VERIFY, request.SerializeToString())


@FUZZ
@given(request=messages("GenerateDraftsRequest") | plausible("GenerateDraftsRequest"))
def test_any_draft_request(workers: dict[str, Worker], request: Any) -> None:
    answered(workers, DRAFT, request.SerializeToString())


@FUZZ
@given(
    requests=st.lists(
        messages("StreamVerifyRequest")
        | plausible("VerifyDraftsRequest").map(lambda r: pb.StreamVerifyRequest(verify=r)),
        max_size=4,
    )
)
def test_any_stream_of_verifications(workers: dict[str, Worker], requests: list[Any]) -> None:
    answered(workers, STREAMS[VERIFY], [request.SerializeToString() for request in requests])


@FUZZ
@given(requests=st.lists(plausible("GenerateDraftsRequest"), max_size=4))
def test_any_stream_of_draft_requests(workers: dict[str, Worker], requests: list[Any]) -> None:
    answered(workers, STREAMS[DRAFT], [request.SerializeToString() for request in requests])


@FUZZ
@given(data=st.binary(max_size=64), method=st.sampled_from([VERIFY, DRAFT]), streamed=st.booleans())
def test_any_bytes(workers: dict[str, Worker], data: bytes, method: str, streamed: bool) -> None:
    answered(workers, STREAMS[method] if streamed else method, [data] if streamed else data)


def test_bytes_that_are_no_message_to_health_and_reflection(workers: dict[str, Worker]) -> None:
    for method in ("grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch"):
        case = Malformed("garbage", f"/{method}", Code.INVALID_ARGUMENT, lambda _: b"\x0a\xff")
        channel = channel_for(workers, VERIFY)
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.unary_stream(case.method)(b"\x0a\xff", timeout=20))
        assert caught.value.code() == Code.INVALID_ARGUMENT
    reflected = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    case = Malformed("garbage", reflected, Code.INVALID_ARGUMENT, lambda _: [b"\x0a\xff"])
    assert case.send(channel_for(workers, VERIFY), random.Random(0))[0] == Code.INVALID_ARGUMENT


# ---- too much of what is right


def test_a_stream_that_is_flooded_or_not_read_ends(workers: dict[str, Worker]) -> None:
    rng = random.Random(1)
    for method, worker in workers.items():
        gate = Gate(worker)
        first = in_stream(method, good(method, rng, session_id="flood"))
        case = Malformed("flood", STREAMS[method], Code.OK, lambda _, first=first: [first] * (3 * MOST_WAITING))
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(case.send, channel_for(workers, method), rng)
            gate.wait()
            time.sleep(0.1)  # they arrive meanwhile
            gate.open()
            status, details = answer.result(30)
        worker.before_pass = lambda: None
        assert status == Code.RESOURCE_EXHAUSTED
        assert f"over {MOST_WAITING} " in details


def test_over_max_calls_the_next_one_is_refused_and_health_is_answered(tiny_model_folder: Callable[..., Path]) -> None:
    with serving("target", tiny_model_folder("llama"), max_calls=2) as worker, ThreadPoolExecutor(2) as pool:
        gate = Gate(worker)
        running = [
            pool.submit(worker.stub.VerifyDrafts, verify_request([5], session=s), timeout=30) for s in ("a", "b")
        ]
        gate.wait()
        assert wait_until(lambda: len(worker.servicer.sessions) == 2)
        for call in (
            lambda: worker.stub.VerifyDrafts(verify_request([5], session="c"), timeout=30),
            lambda: next(worker.stub.StreamVerify(iter(()), timeout=30)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() == Code.RESOURCE_EXHAUSTED
            assert "2 calls and streams run already" in caught.value.details()
        assert worker.stub.Describe(pb.DescribeRequest(), timeout=30).role == "target"
        gate.open()
        assert all(call.result(30).next_token < 128 for call in running)
        worker.before_pass = lambda: None
        assert worker.stub.VerifyDrafts(verify_request([5], session="c"), timeout=30)


# ---- clients that go


@pytest.mark.parametrize("streamed", [False, True])
def test_what_a_client_cancels_is_not_computed(workers: dict[str, Worker], streamed: bool) -> None:
    """The pass that runs ends, and no other one begins, although the draft wants 15 and more messages wait."""
    worker = workers[DRAFT]
    gate, passes, session_id = Gate(worker), worker.passes, f"gone-{streamed}"
    request = draft_request([5, 6], gamma=15, session=session_id)
    if streamed:
        later = [draft_request([5, 6], gamma=15, session=session_id, round=n) for n in (2, 3)]
        call = worker.stub.StreamDrafts(iter([request, *later]))
    else:
        call = worker.stub.GenerateDrafts.future(request)
    gate.wait()
    call.cancel()
    assert wait_until(lambda: call.done())
    time.sleep(0.05)  # the server is told
    gate.open()
    session = worker.servicer.sessions._sessions.get(session_id)
    assert wait_until(lambda: session is None or not session.users)
    time.sleep(0.05)
    worker.before_pass = lambda: None
    assert worker.passes == passes + 1
    if streamed:
        assert wait_until(lambda: session_id not in worker.servicer.sessions._sessions)
    again = draft_request([5, 6], gamma=3, session=session_id, round=4)
    assert len(worker.stub.GenerateDrafts(again, timeout=30).tree.token_ids) == 3


def test_a_deadline_frees_the_work(workers: dict[str, Worker]) -> None:
    worker = workers[DRAFT]
    passes = worker.passes
    worker.before_pass = lambda: time.sleep(0.1)
    levels = draft_request([5, 6], gamma=15, session="late", branching=[1])  # a pass each
    with pytest.raises(grpc.RpcError) as caught:
        worker.stub.GenerateDrafts(levels, timeout=0.25)
    assert caught.value.code() == Code.DEADLINE_EXCEEDED
    time.sleep(0.4)
    worker.before_pass = lambda: None
    assert worker.passes - passes <= 4


# ---- ten thousand


@pytest.mark.slow
def test_ten_thousand_malformed_requests(workers: dict[str, Worker]) -> None:
    """From 8 threads at once, while good requests go on: each status that of the table, each good one answered."""
    count, threads = 10_000, 8
    wrong: Counter[tuple[str, str]] = Counter()
    seen: Counter[str] = Counter()
    stop, answered_well, failures = threading.Event(), Counter[str](), []
    for method, worker in workers.items():
        worker.stub.EndSession(pb.EndSessionRequest(session_id="held"))
        hold(channel_for(workers, method), method)

    def beside(method: str) -> None:
        channel, rng, number = channel_for(workers, method), random.Random(method), 0
        while not stop.is_set():
            try:
                number += 1
                channel.unary_unary(method)(good(method, rng, session_id="good", round=number), timeout=20)
                answered_well[method] += 1
            except grpc.RpcError as error:
                failures.append(error.details())
            time.sleep(0.01)

    def attack(number: int) -> None:
        rng = random.Random(number)
        for _ in range(count // threads):
            case = rng.choice(TABLE)
            status, _ = case.send(channel_for(workers, case.method), rng)
            seen[status.name] += 1
            if status != case.status:
                wrong[case.name, status.name] += 1

    good_ones = [threading.Thread(target=beside, args=(method,)) for method in workers]
    for thread in good_ones:
        thread.start()
    started = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(attack, range(threads)))
    stop.set()
    for thread in good_ones:
        thread.join()
    print(f"\n{count} in {time.monotonic() - started:.0f} s: {dict(seen)}; good ones beside: {dict(answered_well)}")
    assert not wrong
    assert not failures
    assert min(answered_well.values()) > 10
