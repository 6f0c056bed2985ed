"""Spans for OpenTelemetry: of each text, of its rounds, and of what the workers did for them.

Off unless one of OpenTelemetry's own variables names an endpoint; then nothing of it is imported either. A span has
numbers, names and the first digits of a session, never a prompt, a token or the message of an error, which may quote
one. Spans are sent by a thread of their own, in batches; what cannot be sent is dropped.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import specsplit
from specsplit.errors import UserError

if TYPE_CHECKING:
    import grpc
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

    from specsplit.client.result import Round, SpeculativeResult
    from specsplit.settings.processes import OrchestratorConfig

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PACKAGES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.grpc")
TRACEPARENT = "traceparent"  # of W3C Trace Context
FLUSH_S = 2.0  # at the end of the process, for spans that were not sent yet
SHOWN_OF_SESSION = 8  # digits: enough to find it, not to use it

_HEADER = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_closers: list[_Closer] = []


def wanted() -> bool:
    """Whether an endpoint is configured. Raises UserError when spans cannot be sent to it."""
    variable = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    off = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if variable is None or off or os.environ.get("OTEL_TRACES_EXPORTER", "").strip() == "none":
        return False
    for name in PROTOCOLS:
        if (protocol := os.environ.get(name, "").strip()) not in ("", "grpc"):
            raise UserError(f"{name}={protocol}: spans are sent by grpc alone, as a rule to port 4317")
    try:
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    except ModuleNotFoundError as error:
        missing = [str(error.name)]
    if missing:
        raise UserError(
            f"{variable} is set, but not all of OpenTelemetry is installed ({missing[0]}): "
            f"pip install specsplit[otel], or unset the variable"
        )
    return True


@cache
def tracer(service: str) -> Tracer | None:
    """What makes spans of that service, unless OTEL_SERVICE_NAME calls it otherwise; None without an endpoint.

    Raises UserError as `wanted`, and for settings of OpenTelemetry that it does not take.
    """
    if not wanted():
        return None
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    ours = Resource.create({"service.name": service, "service.version": specsplit.__version__})
    try:
        # Not the provider of the whole process, which belongs to the program that embeds us.
        provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        exporter = _exporter()
        provider.add_span_processor(BatchSpanProcessor(exporter))
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"a variable OTEL_* is wrong: {error}") from None
    if not _closers:
        atexit.register(stop)
    _closers.append(_Closer(provider.shutdown, exporter.shutdown))
    return provider.get_tracer("specsplit", specsplit.__version__)


def _exporter() -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def stop() -> None:
    """Send what is left, for FLUSH_S seconds at most. No spans are kept after it."""
    for closer in _closers:
        closer.begin.set()
    deadline = time.monotonic() + FLUSH_S
    for closer in _closers:
        closer.join(max(0.0, deadline - time.monotonic()))
        if closer.is_alive():
            closer.give_up()
    _closers.clear()


class _Closer(threading.Thread):
    """Ends a provider when it is told to. Made beforehand: no thread can be started at the end of Python."""

    def __init__(self, close: Callable[[], None], give_up: Callable[[], None]) -> None:
        super().__init__(name="spans", daemon=True)
        self.begin = threading.Event()
        self.give_up = give_up
        self._close = close
        self.start()

    def run(self) -> None:
        self.begin.wait()
        self._close()


# ---- the orchestrator


class TextSpan:
    """The span of one text, and what happens in it."""

    def __init__(self, tracer: Tracer, config: OrchestratorConfig, request_id: str | None) -> None:
        self._tracer = tracer
        attributes: dict[str, Any] = {
            "specsplit.gamma": str(config.max_draft_tokens),
            "specsplit.mode": config.mode,
            "specsplit.tree": config.tree,
        }
        if request_id is not None:
            attributes["specsplit.request_id"] = _plain(request_id)
        self.span: Span = tracer.start_span("text", attributes=attributes)
        context = self.span.get_span_context()
        traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        self._metadata = ((TRACEPARENT, traceparent),)
        self._result: SpeculativeResult | None = None

    def carry(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A method of a stub that tells the worker of this span, beside what it tells already."""
        told = call.keywords.get("metadata", ()) if isinstance(call, partial) else ()
        return partial(call, metadata=(*told, *self._metadata))

    def begin(self, prompt_tokens: int, result: SpeculativeResult) -> None:
        """Note the prompt's length, and the result that is filled from now on."""
        self.span.set_attribute("specsplit.prompt_tokens", prompt_tokens)
        self._result = result

    def event(self, name: str, **attributes: str | int | float) -> None:
        self.span.add_event(name, {f"specsplit.{key}": value for key, value in attributes.items()})

    def round(self, measured: Round) -> None:
        """A round that has just ended."""
        from opentelemetry.trace import set_span_in_context

        now = time.time_ns()
        waited_ms = measured.draft_wall_ms + measured.verify_wall_ms
        names = (
            *("round", "drafted", "accepted", "tree_nodes", "speculation", "network_ms"),
            *("draft_wall_ms", "draft_compute_ms", "draft_queue_ms"),
            *("verify_wall_ms", "verify_compute_ms", "verify_queue_ms"),
        )
        span = self._tracer.start_span(
            "round",
            context=set_span_in_context(self.span),
            attributes={f"specsplit.{name}": getattr(measured, name) for name in names},
            start_time=now - round(waited_ms * 1e6),
        )
        span.end(now)

    def end(self, error: BaseException | None) -> None:
        if self._result is not None:
            self.span.set_attribute("specsplit.generated_tokens", len(self._result.output_tokens))
            self.span.set_attribute("specsplit.rounds", len(self._result.rounds))
            self.span.set_attribute("specsplit.finish_reason", self._result.finish_reason)
        if error is not None:
            code = getattr(error, "code", None)  # of a WorkerError
            _fail(self.span, code if code and isinstance(code, str) else type(error).__name__, error)
        self.span.end()


@contextmanager
def text_span(config: OrchestratorConfig, request_id: str | None) -> Iterator[TextSpan | None]:
    """The span of the text that is written meanwhile; None without an endpoint."""
    made = tracer("specsplit-orchestrator")
    if made is None:
        yield None
        return
    span = TextSpan(made, config, request_id)
    try:
        yield span
    except BaseException as error:
        span.end(error)
        raise
    span.end(None)


# ---- a worker


class WorkerSpans:
    """Spans of the rounds that one worker answers, each in the trace that its caller told of.

    name: `draft` or `verify`.
    """

    def __init__(self, tracer: Tracer, name: str) -> None:
        self._tracer, self._name = tracer, name

    @classmethod
    def of(cls, role: str) -> WorkerSpans | None:
        """None without an endpoint."""
        made = tracer(f"specsplit-{role}")
        return None if made is None else cls(made, "draft" if role == "draft" else "verify")

    def round(
        self, parent: Context, session: str, number: int, since: float, timings: Any, drafted: int, accepted: int
    ) -> None:
        """A round that has just been answered. since: time.perf_counter() when its request came."""
        attributes: dict[str, Any] = {
            "specsplit.queue_ms": timings.queue_ms,
            "specsplit.compute_ms": timings.compute_ms,
            "specsplit.drafted": drafted,
        }
        if self._name == "verify":
            attributes["specsplit.accepted"] = accepted
        span, now = self._begun(self._name, parent, session, number, since, attributes)
        span.end(now)

    def ahead(self, parent: Context, session: str, number: int, timings: Any, drafted: int) -> None:
        """What was drafted for the round after this one, while this one is verified."""
        attributes = {
            "specsplit.queue_ms": timings.queue_ms,
            "specsplit.compute_ms": timings.compute_ms,
            "specsplit.drafted": drafted,
        }
        since = time.perf_counter() - timings.server_ms / 1e3
        span, now = self._begun("draft ahead", parent, session, number, since, attributes)
        span.end(now)

    def refused(
        self, parent: Context, session: str, number: int, since: float, status: grpc.StatusCode, error: Exception
    ) -> None:
        span, now = self._begun(self._name, parent, session, number, since, {"rpc.grpc.status_code": status.value[0]})
        _fail(span, status.name, error)
        span.end(now)

    def _begun(
        self, name: str, parent: Context, session: str, number: int, since: float, attributes: dict[str, Any]
    ) -> tuple[Span, int]:
        """A span and its end, which is now."""
        from opentelemetry.trace import SpanKind

        now = time.time_ns()
        start = now - round((time.perf_counter() - since) * 1e9)
        known = {"specsplit.session": shown(session), "specsplit.round": number, **attributes}
        return self._tracer.start_span(name, parent, SpanKind.SERVER, known, start_time=start), now


def parent_of(metadata: Iterable[tuple[str, str | bytes]]) -> Context:
    """The context that a call's metadata tell of; an empty one, for a trace of its own, where they tell of none."""
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    if (header := _header(metadata)) is None:
        return Context()
    trace, span, flags = (int(part, 16) for part in header.groups())
    context = SpanContext(trace, span, is_remote=True, trace_flags=TraceFlags(flags & TraceFlags.SAMPLED))
    return set_span_in_context(NonRecordingSpan(context), Context())


def trace_id(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """The trace that a call's metadata tell of, whether we keep spans or not."""
    header = _header(metadata)
    return None if header is None else header[1]


def shown(session: str) -> str:
    """What of a session's id may be seen: on one line, whatever it holds."""
    return ascii(session[:SHOWN_OF_SESSION])[1:-1]


def _header(metadata: Iterable[tuple[str, str | bytes]]) -> re.Match[str] | None:
    given = next((value for key, value in metadata if key == TRACEPARENT), None)
    return _HEADER.fullmatch(given) if isinstance(given, str) else None


def _fail(span: Span, status: str, error: BaseException) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", type(error).__name__)
    span.set_status(Status(StatusCode.ERROR, status))


def _plain(text: str) -> str:
    """Without halves of surrogate pairs, which no message can hold."""
    return text.encode("utf-8", "replace").decode()
