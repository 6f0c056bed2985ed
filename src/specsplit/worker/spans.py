"""Spans of the rounds that a worker answers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from specsplit import tracing

if TYPE_CHECKING:
    import grpc
    from opentelemetry.context import Context
    from opentelemetry.trace import Tracer

    from specsplit.rpc.v1 import specsplit_pb2 as pb


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

    def round(self, parent: Context, what: pb.Context, since: float, timings: pb.Timings, **tokens: int) -> None:
        """A round that has just been answered. since: time.perf_counter() when its request came. tokens: how many were
        drafted and, of a target, accepted."""
        if self._name == "draft":
            tokens.pop("accepted", None)
        self._record(self._name, parent, what.session_id, what.round, since, _measured(timings, **tokens))

    def ahead(self, parent: Context, what: pb.Context, timings: pb.Timings, drafted: int) -> None:
        """What was drafted for the round after this one, while this one is verified."""
        since = time.perf_counter() - timings.server_ms / 1e3
        measured = _measured(timings, drafted=drafted)
        self._record("draft ahead", parent, what.session_id, what.round, since, measured)

    def refused(
        self, parent: Context, session: str, number: int, since: float, status: grpc.StatusCode, error: Exception
    ) -> None:
        code = {"rpc.grpc.status_code": status.value[0]}
        self._record(self._name, parent, session, number, since, code, (status.name, error))

    def _record(
        self,
        name: str,
        parent: Context,
        session: str,
        number: int,
        since: float,
        attributes: dict[str, Any],
        failure: tuple[str, Exception] | None = None,
    ) -> None:
        """A span that ends now."""
        from opentelemetry.trace import SpanKind

        now = time.time_ns()
        start = now - round((time.perf_counter() - since) * 1e9)
        known = {"specsplit.session": tracing.shown(session), "specsplit.round": number, **attributes}
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, known, start_time=start)
        if failure is not None:
            tracing.mark_failed(span, *failure)
        span.end(now)


def _measured(timings: pb.Timings, **tokens: int) -> dict[str, Any]:
    found = {"queue_ms": timings.queue_ms, "compute_ms": timings.compute_ms, **tokens}
    return {f"specsplit.{name}": value for name, value in found.items()}
