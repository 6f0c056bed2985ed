"""The HTTP application: routes, who may call, how much at once, streams and their end."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from h11 import LocalProtocolError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from specsplit.api.generated import GeneratedStream, Piece
from specsplit.api.pair import Pair
from specsplit.errors import UserError, WorkerError, told
from specsplit.serve.bodies import Body, ChatBody, CompletionBody, read_body
from specsplit.serve.counters import Counters
from specsplit.serve.failures import STOPPING, ApiError, api_error
from specsplit.serve.replies import Reply, event
from specsplit.settings.serve import ServeSettings

T = TypeVar("T")
# A body may have so many bytes for each token of a context: parsing a larger one would hold up all other requests.
BYTES_PER_TOKEN, LEAST_BODY_LIMIT = 64, 1 << 20
HEALTH_TIMEOUT_S, LAST_WORD_S = 5.0, 1.0


class _Gone(Exception):
    """The client has closed its connection."""


def application(
    pair: Pair, settings: ServeSettings, *, model: str, max_context: int, gamma: int | str, keys: Iterable[str] = ()
) -> Starlette:
    """The application over a pair.

    model: the name that requests have to give. max_context: longest text in tokens, prompt included. gamma: the depth
    of drafts, for what replies say of it. keys: bearer tokens of which a client shows one; none lets everybody in.
    """
    return _Server(pair, settings, model, max_context, gamma, tuple(keys)).application()


class _Server:
    def __init__(
        self, pair: Pair, settings: ServeSettings, model: str, max_context: int, gamma: int | str, keys: tuple[str, ...]
    ) -> None:
        self._pair, self._settings, self._model = pair, settings, model
        self._max_context, self._gamma, self._keys = max_context, gamma, keys
        self._created = int(time.time())
        self._counters = Counters(model)
        self._running = asyncio.Semaphore(settings.max_running)
        self._waiting = 0

    def application(self) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self._guarded(partial(self._answer, ChatBody)), methods=["POST"]),
            Route("/v1/completions", self._guarded(partial(self._answer, CompletionBody), "prompt"), methods=["POST"]),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{model:path}", self._guarded(self._one_model)),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _unexpected})

    # ---- routes

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def _one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._about())

    async def _health(self, _: Request) -> Response:
        try:
            await self._pair.acheck(HEALTH_TIMEOUT_S)
        except WorkerError as error:
            return ApiError(503, str(error), code="worker_failed").response()
        return JSONResponse({"status": "ok"})

    async def _metrics(self, _: Request) -> Response:
        return Response(self._counters.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _about(self) -> dict[str, Any]:
        about = {"id": self._model, "object": "model", "created": self._created, "owned_by": "specsplit"}
        return {**about, "max_model_len": self._max_context}

    # ---- one text

    async def _answer(self, kind: type[Body], request: Request) -> Response:
        data = await _data(request, max(LEAST_BODY_LIMIT, BYTES_PER_TOKEN * self._max_context))
        body = await asyncio.to_thread(read_body, data, kind)
        self._check_model(body.model)
        eos = self._pair.target.eos_token_ids if self._pair.target else ()
        if isinstance(body, ChatBody) and self._pair.codec and not self._pair.codec.has_template:
            message = "messages: this model has no chat template; send a prompt to /v1/completions"
            raise ApiError(400, message, param="messages")
        prompt, options = body.prompt_of(), {"max_new_tokens": self._max_context, **body.options(eos)}
        async with AsyncExitStack() as held:
            await _unless_gone(request, held.enter_async_context(self._place()))
            # Encoding a long prompt takes its time, which other requests are not to wait for.
            stream = await asyncio.to_thread(lambda: self._pair.stream(prompt, **options))
            held.callback(stream.close)
            reply = Reply(self._model, body, stream.prompt_token_ids)
            if not body.stream:
                await _unless_gone(request, _drain(stream))
                self._counters.written(stream.text)
                return JSONResponse(reply.whole(stream.text, self._gamma))
            # A text that cannot begin is an error with a status, not one within a stream.
            first = await _unless_gone(request, anext(stream, None))
            return _Events(self._events(reply, stream, first), held.pop_all())

    async def _events(self, reply: Reply, stream: GeneratedStream, first: Piece | None) -> AsyncIterator[str]:
        try:
            yield reply.piece(first or "", first.token_ids if first else (), first=True)
            async for piece in stream:
                yield reply.piece(piece, piece.token_ids)
        except UserError as error:
            failure = api_error(error)
            self._counters.failed(failure.status)
            yield event(failure.body())
            return
        self._counters.written(stream.text)
        for last in reply.ending(stream.text, self._gamma):
            yield last

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """A place among the running texts. Raises ApiError when too many wait for one already."""
        if self._running.locked() and self._waiting >= self._settings.max_waiting:
            raise ApiError(429, "too many requests at once; send it again in a moment", code="overloaded")
        self._waiting += 1
        with self._counters.waiting.track_inprogress():
            try:
                await self._running.acquire()
            finally:
                self._waiting -= 1
        try:
            with self._counters.running.track_inprogress():
                yield
        finally:
            self._running.release()

    # ---- who may call

    def _guarded(
        self, handler: Callable[[Request], Awaitable[Response]], prompt: str = "messages"
    ) -> Callable[[Request], Awaitable[Response]]:
        """A handler behind the bearer token, whose errors are replies. prompt: the field that has the prompt."""

        async def handle(request: Request) -> Response:
            try:
                self._check_key(request)
                return await handler(request)
            except (_Gone, ClientDisconnect):
                return _Nothing()
            except UserError as error:
                failure = api_error(error, prompt)
            except ApiError as error:
                failure = error
            except asyncio.CancelledError:  # uvicorn ends what is left after `stop_timeout_s`
                failure = STOPPING
            self._counters.failed(failure.status)
            return failure.response()

        return handle

    def _check_key(self, request: Request) -> None:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in self._keys]
        if self._keys and not (kind.lower() == "bearer" and any(matches)):
            raise ApiError(401, "send the key of this server as `Authorization: Bearer KEY`", code="invalid_api_key")

    def _check_model(self, name: str) -> None:
        if name != self._model:
            message = f"model: {name!r} is not served here; the model is {self._model!r}"
            raise ApiError(404, message, param="model", code="model_not_found")


class _Nothing(Response):
    """For a client that has gone, to whom nothing can be sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        return


class _Events(StreamingResponse):
    """Server-sent events; the text stops and its place is free when the client goes, in whatever state."""

    def __init__(self, events: AsyncIterator[str], held: AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def never() -> Any:
            await asyncio.Event().wait()

        async with self._held:
            try:
                with suppress(_Gone, OSError):
                    await _race(super().__call__(scope, never, send), receive)
            except asyncio.CancelledError:  # as above; who does not read is not waited for
                with suppress(TimeoutError):
                    async with asyncio.timeout(LAST_WORD_S):
                        await send({"type": "http.response.body", "body": event(STOPPING.body()).encode()})


async def _drain(stream: GeneratedStream) -> None:
    async for _ in stream:
        pass


async def _data(request: Request, most: int) -> bytes:
    """The body of a request. Raises ApiError when it has over `most` bytes, or is compressed."""
    if (encoding := request.headers.get("content-encoding", "identity")).lower() != "identity":
        raise ApiError(415, f"Content-Encoding: {encoding} is not read here; send the body as it is")
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise ApiError(413, f"the body is over the limit of {most} bytes", code="body_too_large")
    return bytes(data)


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes; then raises _Gone."""
    return await _race(work, request.receive)


async def _race(work: Awaitable[T], receive: Receive) -> T:
    async def until_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise _Gone
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait({working, leaving})


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, message).response(error.headers)


async def _unexpected(_: Request, error: Exception) -> Response:
    if isinstance(error, LocalProtocolError):  # what turned out to be no HTTP has its reply from uvicorn
        return _Nothing()
    return api_error(UserError(f"a fault of the server: {told(error)}")).response()
