"""A gRPC interceptor that checks every call before any work is done for it, health and reflection included.

gRPC asks it once per call or stream, never per message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import grpc

from specsplit.rpc.codec import MALFORMED, lenient
from specsplit.rpc.credentials import ServerAccess

OWN_METHODS = "/specsplit."


class AuthInterceptor(grpc.ServerInterceptor):
    """Refuse, in this order: callers without a valid token, our methods while the model loads, unknown methods.

    Bytes that are not a message are refused with INVALID_ARGUMENT; gRPC alone would say INTERNAL.
    served: name of the service, for the refusal of an unknown method. on_refused: gets the status of each refusal.
    """

    def __init__(
        self, access: ServerAccess, served: str, on_refused: Callable[[grpc.StatusCode], None] | None = None
    ) -> None:
        self.loading = True
        self._access = access
        self._served = served
        self._on_refused = on_refused
        self._checked: dict[str, tuple[Any, grpc.RpcMethodHandler]] = {}  # by method: the handler, and it with checks

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
            if self.loading and method.startswith(OWN_METHODS):
                return self._refuse(grpc.StatusCode.UNAVAILABLE, "the model is still being loaded")
            return self._refuse(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not served here, but {self._served}")
        known = self._checked.get(method)
        if known is None or known[0] is not handler:
            known = self._checked[method] = handler, _check_messages(handler, method.startswith(OWN_METHODS))
        return known[1]

    def _refuse(self, status: grpc.StatusCode, details: str) -> grpc.RpcMethodHandler:
        """A handler that ends the call without reading a message, whatever kind of call it is."""
        if self._on_refused is not None:
            self._on_refused(status)
        return grpc.stream_stream_rpc_method_handler(lambda requests, context: context.abort(status, details))


def _check_messages(handler: Any, own: bool) -> grpc.RpcMethodHandler:
    """The handler, which refuses malformed messages. Our own streams (`own`) look for MALFORMED themselves (Inbox)."""
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
