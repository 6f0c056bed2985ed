"""Spans of a text and of its rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from specsplit import tracing
from specsplit.client.result import Round, SpeculativeResult
from specsplit.settings.run import OrchestratorConfig

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer


class TextSpan:
    """The span of one text, and what happens in it."""

    def __init__(self, tracer: Tracer, config: OrchestratorConfig, request_id: str | None) -> None:
        self._tracer = tracer
        self.span: Span = tracer.start_span("text")
        self._set(gamma=str(config.gamma), mode=config.mode, tree=config.tree)
        if request_id is not None:
            self._set(request_id=request_id.encode("utf-8", "replace").decode())  # no halves of surrogate pairs
        self._metadata = tracing.metadata_of(self.span)
        self._result: SpeculativeResult | None = None

    def carry(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A method of a stub that tells the worker of this span, beside what it tells already."""
        told = call.keywords.get("metadata", ()) if isinstance(call, partial) else ()
        return partial(call, metadata=(*told, *self._metadata))

    def begin(self, prompt_tokens: int, result: SpeculativeResult) -> None:
        """Note the prompt's length, and the result that is filled from now on."""
        self._set(prompt_tokens=prompt_tokens)
        self._result = result

    def _set(self, **attributes: str | int | float) -> None:
        self.span.set_attributes({f"specsplit.{key}": value for key, value in attributes.items()})

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
            written, rounds = len(self._result.output_tokens), len(self._result.rounds)
            self._set(generated_tokens=written, rounds=rounds, finish_reason=self._result.finish_reason)
        if error is not None:
            code = getattr(error, "code", None)  # of a WorkerError
            tracing.mark_failed(self.span, code if code and isinstance(code, str) else type(error).__name__, error)
        self.span.end()


@contextmanager
def text_span(config: OrchestratorConfig, request_id: str | None) -> Iterator[TextSpan | None]:
    """The span of the text that is written meanwhile; None without an endpoint."""
    made = tracing.tracer("specsplit-orchestrator")
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
