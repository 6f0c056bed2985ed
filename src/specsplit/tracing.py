"""Spans for OpenTelemetry: where they are sent, and how a call tells a worker of the caller's span.

Off unless one of OpenTelemetry's own variables names an endpoint; then nothing of it is imported either. A span has
numbers, names and the first digits of a session, never a prompt, a token or the message of an error, which may quote
one. Spans are sent by a thread of their own, in batches; what cannot be sent is dropped.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING

import specsplit
from specsplit.errors import UserError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.propagators.textmap import TextMapPropagator
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PACKAGES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.grpc")
FLUSH_S = 2.0  # at the end of the process, for spans that were not sent yet
SHOWN_OF_SESSION = 8  # digits: enough to find it, not to use it

_closers: list[_Closer] = []
_making = threading.Lock()


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


def tracer(service: str) -> Tracer | None:
    """What makes spans of that service, unless OTEL_SERVICE_NAME calls it otherwise; None without an endpoint.

    Raises UserError as `wanted`, and for settings of OpenTelemetry that it does not take.
    """
    with _making:  # of several threads that ask first, one makes it
        return _tracer(service)


@cache
def _tracer(service: str) -> Tracer | None:
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


def metadata_of(span: Span) -> tuple[tuple[str, str], ...]:
    """gRPC metadata that tell a worker of a span (`traceparent` of W3C Trace Context)."""
    from opentelemetry.trace import set_span_in_context

    carrier: dict[str, str] = {}
    _propagator().inject(carrier, set_span_in_context(span))
    return tuple(carrier.items())


def parent_of(metadata: Iterable[tuple[str, str | bytes]]) -> Context:
    """The context that a call's metadata name; an empty one, for a trace of its own, where they name none."""
    from opentelemetry.context import Context

    carrier = {key: value for key, value in metadata if isinstance(value, str)}
    return _propagator().extract(carrier, Context())


def trace_id(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """The trace that a call's metadata name, for the log, whether spans are kept or not."""
    pairs = [pair for pair in metadata if pair[0] == "traceparent"]
    if not pairs:  # then OpenTelemetry need not be imported
        return None
    from opentelemetry.trace import format_trace_id, get_current_span

    context = get_current_span(parent_of(pairs)).get_span_context()
    return format_trace_id(context.trace_id) if context.is_valid else None


def shown(session: str) -> str:
    """What of a session's id may be seen: on one line, whatever it holds."""
    return ascii(session[:SHOWN_OF_SESSION])[1:-1]


def mark_failed(span: Span, status: str, error: BaseException) -> None:
    """Give a span the status of an error, without the error's message."""
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", type(error).__name__)
    span.set_status(Status(StatusCode.ERROR, status))


def _propagator() -> TextMapPropagator:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator()
