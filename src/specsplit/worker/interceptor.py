"""What every call must pass before any work is done for it, health and reflection included.

A gRPC interceptor: it is asked once per call or stream, never per message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import grpc

from specsplit.rpc.codec import MALFORMED, lenient
from specsplit.rpc.credentials import ServerAccess

OWN = "/specsplit."


class Gate(grpc.ServerInterceptor):
    """Refuses, in this order: strangers, calls of ours while there is no model (`loading`), what is not served here.

    Bytes that are not a message are INVALID_ARGUMENT, for which gRPC alone would say INTERNAL.
    served: what to tell about a method that is not. on_refused: gets the status of each call refused here.
    """

    def __init__(
        self, access: ServerAccess, served: str, on_refused: Callable[[grpc.StatusCode], None] | None = None
    ) -> None:
        self.loading = True
        self._access = access
        self._served = served
        self._on_refused = on_refused
        self._handlers: dict[str, tuple[Any, grpc.RpcMethodHandler]] = {}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        method: str = details.method
        if self._access.owner(details.invocation_metadata) is None:
            return self._refuse(grpc.StatusCode.UNAUTHENTICATED, "this worker wants a token that it knows")
        handler = continuation(details)
        if handler is None:
            if self.loading and method.startswith(OWN):
                return self._refuse(grpc.StatusCode.UNAVAILABLE, "the model is still being loaded")
            return self._refuse(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not served here, but {self._served}")
        kept = self._handlers.get(method)
        if kept is None or kept[0] is not handler:
            kept = self._handlers[method] = handler, _reading(handler, method.startswith(OWN))
        return kept[1]

    def _refuse(self, status: grpc.StatusCode, details: str) -> grpc.RpcMethodHandler:
        """A handler that ends the call without reading a message, whatever kind of call it is."""
        if self._on_refused is not None:
            self._on_refused(status)
        return grpc.stream_stream_rpc_method_handler(lambda requests, context: context.abort(status, details))


def _reading(handler: Any, own: bool) -> grpc.RpcMethodHandler:
    """The handler with a deserializer that does not fail. Streams of ours look for MALFORMED themselves (Inbox)."""
    handler = handler._replace(request_deserializer=lenient(handler.request_deserializer))
    kind = f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"
    behaviour = getattr(handler, kind)
    if not handler.request_streaming:

        @wraps(behaviour)
        def checked(request: Any, context: grpc.ServicerContext, *rest: Any, **named: Any) -> Any:
            if request is MALFORMED:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, MALFORMED.why)
            return behaviour(request, context, *rest, **named)

        return handler._replace(**{kind: checked})
    if own:
        return handler

    def messages(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        for request in requests:
            if request is MALFORMED:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, MALFORMED.why)
            yield request

    return handler._replace(**{kind: lambda requests, context: behaviour(messages(requests, context), context)})
