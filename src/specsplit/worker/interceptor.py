"""A gRPC interceptor that checks every call before any work is done for it, health and reflection included.

gRPC asks it once per call or stream, never per message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import grpc

from specsplit.rpc.codec import MALFORMED, lenient
from specsplit.rpc.credentials import ServerAccess
from specsplit.rpc.statuses import RETRY_AFTER
from specsplit.worker.calls import Caller, OpenCalls, Peer
from specsplit.worker.refusals import Busy

OWN_METHODS = "/specsplit."


class AuthInterceptor(grpc.ServerInterceptor):
    """Refuse, in this order: callers without a valid token, our methods while the model loads, unknown methods.

    Bytes that are not a message are refused with INVALID_ARGUMENT; gRPC alone would say INTERNAL. A call is counted
    among the open ones while it waits for its message; one of another service as long as it is open.
    served: name of the service, for the refusal of an unknown method. on_refused: gets the status of each refusal.
    """

    def __init__(
        self,
        access: ServerAccess,
        served: str,
        open_calls: OpenCalls,
        on_refused: Callable[[grpc.StatusCode], None] | None = None,
    ) -> None:
        self._open_calls = open_calls
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
            known = self._checked[method] = handler, self._checks(handler, own=method.startswith(OWN_METHODS))
        return known[1]

    def _refuse(self, status: grpc.StatusCode, details: str) -> grpc.RpcMethodHandler:
        """A handler that ends the call without reading a message, whatever kind of call it is."""
        if self._on_refused is not None:
            self._on_refused(status)
        return grpc.stream_stream_rpc_method_handler(lambda requests, context: context.abort(status, details))

    def _checks(self, handler: Any, *, own: bool) -> grpc.RpcMethodHandler:
        """The handler, which refuses malformed messages. Our own streams look for MALFORMED themselves (Inbox)."""
        kind = f"{_many(handler.request_streaming)}_{_many(handler.response_streaming)}"
        behaviour = getattr(handler, kind)
        handler = handler._replace(request_deserializer=lenient(handler.request_deserializer))
        if handler.request_streaming and own:
            return handler
        if handler.request_streaming:

            def messages(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
                for request in requests:
                    if request is MALFORMED:
                        context.abort(grpc.StatusCode.INVALID_ARGUMENT, MALFORMED.why)
                    yield request

            def stream(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
                with self._counted(context):
                    yield from behaviour(messages(requests, context), context)

            return handler._replace(**{kind: stream})
        if getattr(behaviour, "experimental_non_blocking", False):  # Watch of health: it takes no thread

            @wraps(behaviour)
            def checked(request: Any, context: grpc.ServicerContext, *rest: Any, **named: Any) -> Any:
                if request is MALFORMED:
                    context.abort(grpc.StatusCode.INVALID_ARGUMENT, MALFORMED.why)
                return behaviour(request, context, *rest, **named)

            return handler._replace(**{kind: checked})

        def unary(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            # Read here and not by gRPC, which would wait for the message of a silent client forever.
            with self._counted(context):
                request = next(requests, MALFORMED)
            if request is MALFORMED:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, MALFORMED.why)
            return behaviour(request, context)

        as_stream = f"stream_{_many(handler.response_streaming)}"
        return handler._replace(request_streaming=True, **{kind: None, as_stream: unary})

    @contextmanager
    def _counted(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Count a call among the open ones. When it has to make room, or says nothing for too long, it is cancelled."""
        owner = self._access.owner(context.invocation_metadata()) or ""
        caller = Caller(owner, peer=Peer.of(owner, context.peer()), end=context.cancel)
        try:
            with self._open_calls.open(caller):
                yield
        except Busy as error:
            context.set_trailing_metadata(((RETRY_AFTER, str(error.retry_after_ms)),))
            context.abort(error.status, str(error))
        except grpc.RpcError:
            context.abort(grpc.StatusCode.CANCELLED, str(caller.displaced or "the client is gone"))


def _many(streaming: bool) -> str:
    return "stream" if streaming else "unary"
