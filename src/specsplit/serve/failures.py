"""What goes wrong, in the shape of OpenAI's errors: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from specsplit.errors import OptionError, PromptError, UserError, WorkerError, shortened

log = logging.getLogger(__name__)
RETRY_AFTER_S = 1
LONGEST_MESSAGE = 1000  # what a client sent may be a part of it


class ApiError(Exception):
    """A request that is not answered. status: of HTTP. param: the field at fault. code: a word for programs."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(_sendable(message))
        self.status, self.param, self.code = status, None if param is None else _sendable(param), code

    @property
    def kind(self) -> str:
        """OpenAI's type of error."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        headers = dict(headers or {})
        if self.status in (429, 503):
            headers["Retry-After"] = str(RETRY_AFTER_S)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def _sendable(text: str) -> str:
    """The text as UTF-8 can have it, without half of a surrogate pair, which JSON can write, and not too long."""
    return shortened(text.encode(errors="backslashreplace").decode(), LONGEST_MESSAGE)


# gRPC status of a worker -> what a client is told: it knows of no workers, and whatever they say goes to the log.
OF_WORKERS = {
    "RESOURCE_EXHAUSTED": (
        429,
        "the models have no room for this text just now; send it again in a moment",
        "overloaded",
    ),
    "DATA_LOSS": (500, "the model overflows on this text, so it has no continuation; change the prompt", "overflow"),
}
GONE = 503, "the models do not answer just now; send the request again in a moment", "worker_failed"

STOPPING = ApiError(503, "the server stops; send the request again in a moment", code="server_stopping")


def api_error(error: UserError, prompt: str = "prompt") -> ApiError:
    """What a client is told of an error of the pair. prompt: the field that has the prompt."""
    if isinstance(error, PromptError):
        long = "tokens, a text can have" in str(error)
        return ApiError(400, str(error), param=prompt, code="context_length_exceeded" if long else None)
    if isinstance(error, OptionError):
        return ApiError(400, str(error))
    log.error("%s", error)
    if isinstance(error, WorkerError):
        status, message, code = OF_WORKERS.get(error.code, GONE)
        return ApiError(status, message, code=code)
    return ApiError(500, "the server cannot answer this; its log says why", code="internal_error")
