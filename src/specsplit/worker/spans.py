"""Spans of the rounds that a worker answers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import grpc

from specsplit import tracing

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer


class WorkerSpans:
    """Spans of the rounds that one worker answers, each in the trace that its caller told of.

    name: `draft` or `verify`.
    """

    def __init__(self, tracer: Tracer, name: str) -> None:
        self._tracer, self._name = tracer, name

    @classmethod
    def of(cls, role: str) -> WorkerSpans | None:
        """None without an endpoint."""
        made = tracing.tracer(f"specsplit-{role}")
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
        tracing.mark_failed(span, status.name, error)
        span.end(now)

    def _begun(
        self, name: str, parent: Context, session: str, number: int, since: float, attributes: dict[str, Any]
    ) -> tuple[Span, int]:
        """A span and its end, which is now."""
        from opentelemetry.trace import SpanKind

        now = time.time_ns()
        start = now - round((time.perf_counter() - since) * 1e9)
        known = {"specsplit.session": tracing.shown(session), "specsplit.round": number, **attributes}
        return self._tracer.start_span(name, parent, SpanKind.SERVER, known, start_time=start), now
