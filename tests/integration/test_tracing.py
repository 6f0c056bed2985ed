"""Spans: what a text leaves in a trace, at the orchestrator and on both workers, and that nothing waits for it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from specsplit import tracing
from specsplit.cli import main as cli
from specsplit.client import event_loop as client_loop
from specsplit.client.writer import TextWriter
from specsplit.errors import UserError, WorkerError
from specsplit.rpc.credentials import Access
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig

from grpc_fixtures import PROMPTS, noisy_copy, serving, verify_request
from waiting import wait_until

TOKEN = "0123456789abcdef-token"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADER = ("traceparent", f"00-{TRACE}-{PARENT}-01")
ENDED = {"generated_tokens", "rounds", "finish_reason"}
WAITS = {f"{side}_{kind}_ms" for side in ("draft", "verify") for kind in ("wall", "compute", "queue")}


@pytest.fixture(autouse=True)
def _untraced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (*tracing.ENDPOINTS, *tracing.PROTOCOLS, "OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    tracing._tracer.cache_clear()
    yield
    tracing.stop()
    tracing._tracer.cache_clear()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """The spans of this process, instead of a collector."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "_exporter", lambda: exporter)
    return exporter


@pytest.fixture(scope="module")
def model(tiny_model_folder: Callable[..., Path]) -> Path:
    return tiny_model_folder("llama")


@pytest.fixture(scope="module")
def weak(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noisy_copy(model, tmp_path_factory.mktemp("draft"), noise=0.03)


def config_of(**settings: Any) -> OrchestratorConfig:
    return OrchestratorConfig.load({"gamma": 3, "max_output_tokens": 12, "ignore_eos": True, **settings})


def named(exporter: InMemorySpanExporter, name: str, count: int) -> list[ReadableSpan]:
    """The spans of that name in the order of their rounds, once there are `count`."""

    def found() -> list[ReadableSpan]:
        return [span for span in exporter.get_finished_spans() if span.name == name]

    wait_until(lambda: len(found()) >= count)
    spans = found()
    assert len(spans) == count
    return sorted(spans, key=lambda span: span.attributes.get("specsplit.round", 0))


def said(span: ReadableSpan) -> dict[str, Any]:
    """The attributes of a span without what all of ours begin with."""
    return {name.removeprefix("specsplit."): value for name, value in span.attributes.items()}


def parent_of(span: ReadableSpan) -> tuple[str, str]:
    """Trace and parent, as in a traceparent."""
    return f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}" if span.parent else ""


@contextmanager
def collecting(status: grpc.StatusCode | None = None) -> Iterator[tuple[str, list[Any]]]:
    """An OTLP collector: its address and what was sent to it, (service, span) each."""
    received: list[Any] = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            for resource in request.resource_spans:
                names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
                received.extend((names["service.name"], s) for scope in resource.scope_spans for s in scope.spans)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}", received
    finally:
        server.stop(None)


@pytest.mark.parametrize("mode", ["sync", "lookahead"])
def test_a_text_is_one_trace_through_both_workers(
    model: Path, weak: Path, kept: InMemorySpanExporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(tracing, "FLUSH_S", 60.0)
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    access = Access(token=TOKEN)
    with (
        serving("draft", weak, token_file=tmp_path / "token", access=access) as draft,
        serving("target", model, token_file=tmp_path / "token", access=access) as target,
    ):

        def drafted_ahead() -> None:
            """A verification that is back at once leaves no time to draft ahead. The first pass is of the prompt."""
            if mode == "lookahead" and target.passes > 1:
                wait_until(lambda: any(span.name == "draft ahead" for span in kept.get_finished_spans()))

        target.before_pass = drafted_ahead
        with TextWriter(draft.address, target.address, access=access) as writer:
            result = writer.write(PROMPTS[0], config_of(mode=mode), request_id="r-1")
        (text,) = named(kept, "text", 1)
        rounds = named(kept, "round", len(result.rounds))
        verifies = named(kept, "verify", len(result.rounds))
    tracing.stop()  # the workers have ended, and what they told of is here
    drafts = [span for span in kept.get_finished_spans() if span.name == "draft"]
    ahead = [span for span in kept.get_finished_spans() if span.name == "draft ahead"]
    assert parent_of(text)[1] == ""
    root = parent_of(text)[0], f"{text.context.span_id:016x}"
    assert all(parent_of(span) == root for span in [*rounds, *verifies, *drafts, *ahead])
    assert said(text) == {
        "request_id": "r-1",
        "gamma": "3",
        "mode": mode,
        "tree": "chain",
        "prompt_tokens": len(PROMPTS[0]),
        "generated_tokens": len(result.output_tokens),
        "rounds": len(result.rounds),
        "finish_reason": "length",
    }
    assert text.status.status_code == StatusCode.UNSET
    for number, (measured, span, verify) in enumerate(zip(result.rounds, rounds, verifies, strict=True), start=1):
        own, theirs = said(span), said(verify)
        assert (own["round"], own["drafted"], own["accepted"]) == (number, measured.drafted, measured.accepted)
        assert own["speculation"] == measured.speculation
        assert own["verify_compute_ms"] == theirs["compute_ms"] == measured.verify_compute_ms > 0
        assert set(own) == {"round", "drafted", "accepted", "tree_nodes", "speculation", "network_ms", *WAITS}
        assert set(theirs) == {"session", "round", "queue_ms", "compute_ms", "drafted", "accepted"}
        assert (theirs["round"], theirs["accepted"]) == (number, measured.accepted)
        assert len(theirs["session"]) == 8
        assert text.start_time <= span.start_time <= span.end_time <= text.end_time
    assert drafts
    assert sum(said(span)["drafted"] for span in drafts) >= sum(r.drafted for r in result.rounds if not ahead)
    assert bool(ahead) == (mode == "lookahead")
    services = {span.name: span.resource.attributes["service.name"] for span in kept.get_finished_spans()}
    expected = {"text": "orchestrator", "round": "orchestrator", "draft": "draft", "verify": "target"}
    assert {name: services[name] for name in expected} == {n: f"specsplit-{role}" for n, role in expected.items()}
    assert TOKEN not in "".join(span.to_json() for span in kept.get_finished_spans())


def test_a_refusal_is_a_span_with_its_status(model: Path, kept: InMemorySpanExporter) -> None:
    bad = {"session": "0123456789abcdef", "round": 7}
    with serving("target", model) as target:
        with pytest.raises(grpc.RpcError):
            target.stub.VerifyDrafts(verify_request([999], **bad), timeout=20, metadata=[HEADER])
        (unary,) = named(kept, "verify", 1)
        message = pb.StreamVerifyRequest(verify=verify_request([999], **bad))
        with pytest.raises(grpc.RpcError):
            list(target.stub.StreamVerify(iter([message]), timeout=20, metadata=[HEADER]))
        spans = named(kept, "verify", 2)
        kept.clear()
        malformed = ("traceparent", f"00-{TRACE}-{'0' * 16}-01")
        target.stub.VerifyDrafts(verify_request([5]), timeout=20, metadata=[malformed])
        (alone,) = named(kept, "verify", 1)
        kept.clear()
        unwanted = ("traceparent", f"00-{TRACE}-{PARENT}-00")  # its caller keeps no spans
        target.stub.VerifyDrafts(verify_request([5], session="unwanted"), timeout=20, metadata=[unwanted])
        target.stub.VerifyDrafts(verify_request([5], session="wanted"), timeout=20)
        assert said(named(kept, "verify", 1)[0])["session"] == "wanted"
    assert unary in spans
    for span in spans:
        assert parent_of(span) == (TRACE, PARENT)
        assert span.parent.is_remote
        assert said(span) == {
            "session": "01234567",
            "round": 7,
            "rpc.grpc.status_code": grpc.StatusCode.INVALID_ARGUMENT.value[0],
            "error.type": "InvalidRequest",
        }
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "INVALID_ARGUMENT")
        assert not span.events
    assert alone.parent is None
    assert alone.status.status_code == StatusCode.UNSET


def test_failures_are_events_and_the_end_of_a_text_its_status(
    model: Path, weak: Path, kept: InMemorySpanExporter
) -> None:
    with serving("draft", weak) as draft, serving("target", model) as target:
        draft.server.stop()
        with TextWriter(draft.address, target.address) as writer:
            writer.write(PROMPTS[0], config_of(on_draft_failure="target_alone"))
            (text,) = named(kept, "text", 1)
            kept.clear()
            target.server.stop()
            with pytest.raises(WorkerError):
                writer.write(PROMPTS[0], config_of(gamma=0, recovery_timeout_s=0))
            (failed,) = named(kept, "text", 1)
    first, last = text.events
    assert (first.name, dict(first.attributes)) == (
        "worker failed",
        {"specsplit.worker": "draft", "specsplit.round": 1, "specsplit.code": "UNAVAILABLE"},
    )
    assert last.name == "target alone"
    assert text.status.status_code == StatusCode.UNSET
    assert set(said(text)) >= ENDED
    assert (failed.status.status_code, failed.status.description) == (StatusCode.ERROR, "UNAVAILABLE")
    assert said(failed)["error.type"] == "WorkerError"
    assert [event.name for event in failed.events] == ["worker failed"]


def test_a_worker_that_is_back_is_an_event(model: Path, kept: InMemorySpanExporter) -> None:
    with serving("target", model) as target, TextWriter(None, target.address) as writer:
        done: list[int] = []

        def lose_session(tokens: list[int]) -> None:
            if not done:
                target.servicer.sessions.end(next(iter(target.servicer.sessions._sessions)))
            done.extend(tokens)

        result = writer.write(PROMPTS[0], config_of(gamma=0), on_tokens=lose_session)
        (text,) = named(kept, "text", 1)
    assert len(result.output_tokens) == 12
    assert [event.name for event in text.events] == ["worker failed", "worker back"]
    assert text.events[0].attributes["specsplit.code"] == "FAILED_PRECONDITION"
    assert text.events[1].attributes["specsplit.lost_ms"] >= 0


def test_generate_sends_its_spans_to_a_collector(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with collecting() as (endpoint, received):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=quite-secret")
        monkeypatch.setattr(tracing, "FLUSH_S", 60.0)
        with serving("target", model) as target:
            flags = ["--gamma", "0", "--max-output-tokens", "5", "--ignore-eos", "--target-addr", target.address]
            cli.main(["generate", "--tokenizer", str(model), "--prompt", "hello", *flags])
            tracing.stop()
    assert "5 tokens in 5 rounds" in capsys.readouterr().err
    spans = [span for _, span in received]
    assert sorted(span.name for span in spans) == sorted(["text", *["round"] * 5, *["verify"] * 5])
    assert {service for service, _ in received} == {"ours"}
    (text,) = (span for span in spans if span.name == "text")
    assert {span.trace_id for span in spans} == {text.trace_id}
    assert {span.parent_span_id for span in spans if span is not text} == {text.span_id}
    assert "secret" not in str(received)
    assert "hello" not in str(received)


def test_the_end_of_a_process_sends_what_is_left() -> None:
    script = "from specsplit import tracing as t; t.FLUSH_S = 60; t.tracer('one').start_span('left').end()"
    with collecting() as (endpoint, received):
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "PYTHONPATH": ":".join(sys.path)}
        subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)
    assert [(service, span.name) for service, span in received] == [("one", "left")]


def test_a_collector_that_cannot_be_reached_changes_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving("target", model) as target, TextWriter(None, target.address) as writer:
        expected = writer.write(PROMPTS[1], config_of(gamma=0)).output_tokens
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3600")  # tried again and again for an hour
    monkeypatch.setattr(tracing, "FLUSH_S", 0.2)
    tracing._tracer.cache_clear()
    with serving("target", model) as target, TextWriter(None, target.address) as writer:
        for _ in range(2):
            assert writer.write(PROMPTS[1], config_of(gamma=0)).output_tokens == expected
        assert tracing.tracer("specsplit-target") is target.server.spans._tracer
        closers = list(tracing._closers)
        assert len(closers) == 2
        tracing.stop()
        assert wait_until(lambda: not any(closer.is_alive() for closer in closers))  # they were told to give up


def test_nothing_is_imported_without_an_endpoint(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import sys; from specsplit import tracing; assert tracing.tracer('x') is None; "
        "sys.exit(any(name.startswith(('opentelemetry', 'grpc')) for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": ":".join(sys.path)}, check=True, timeout=120)
    _uninstall(monkeypatch)
    with serving("target", model) as target:
        assert target.server.spans is None
        with TextWriter(None, target.address) as writer:
            result = writer.write(PROMPTS[0], config_of(gamma=0))
        with pytest.raises(grpc.RpcError):
            target.stub.VerifyDrafts(verify_request([999]), timeout=20, metadata=[HEADER])
    assert len(result.output_tokens) == 12


def _uninstall(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "opentelemetry"]:
        monkeypatch.setitem(sys.modules, name, None)  # to import it is an error


def test_packages_that_are_missing_are_named(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    _uninstall(monkeypatch)
    message = r"OTEL_EXPORTER_OTLP_ENDPOINT is set, but .*: pip install specsplit\[otel\], or unset the variable"
    with pytest.raises(UserError, match=message), serving("target", model):
        pass
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "--prompt", "x", "--tokenizer", str(model)])
    assert ended.value.code == 2
    assert "pip install specsplit[otel]" in capsys.readouterr().err


def test_the_variables_of_opentelemetry_are_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    assert tracing.wanted()
    for name, value in (("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not tracing.wanted()
    with monkeypatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        with pytest.raises(UserError, match=r"OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf: .* grpc"):
            tracing.wanted()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "soon")
    with pytest.raises(UserError, match=r"OTEL_\*.*soon"):
        tracing.tracer("x")


@pytest.mark.parametrize(
    ("header", "trace"),
    [
        (f"00-{TRACE}-{PARENT}-01", TRACE),
        (f"cc-{TRACE}-{PARENT}-01-more", TRACE),
        (f"ff-{TRACE}-{PARENT}-01", None),
        (f"00-{'0' * 32}-{PARENT}-01", None),
        (f"00-{TRACE}-{PARENT}", None),
        (f"00-{TRACE.upper()}-{PARENT}-01", None),
        ("", None),
    ],
)
def test_the_header_of_a_trace(header: str, trace: str | None) -> None:
    assert tracing.trace_id([("other", "x"), ("traceparent", header)]) == trace
    assert bool(tracing.parent_of([("traceparent", header)])) == (trace is not None)


@pytest.mark.parametrize(
    ("module", "maker", "get"),
    [(tracing, "_tracer", lambda: tracing.tracer("one")), (client_loop, "_made", client_loop.event_loop)],
)
def test_threads_that_ask_at_once_get_the_same_one(
    monkeypatch: pytest.MonkeyPatch, module: Any, maker: str, get: Callable[[], Any]
) -> None:
    def made_slowly(*_: object) -> object:
        time.sleep(0.05)
        return object()

    monkeypatch.setattr(module, maker, cache(made_slowly))
    barrier = threading.Barrier(8)

    def ask(_: int) -> Any:
        barrier.wait(30)
        return get()

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    monkeypatch.undo()
    assert all(one is found[0] for one in found)
