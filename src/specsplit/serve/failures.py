"""What goes wrong, in the shape of OpenAI's errors: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from specsplit.errors import OptionError, PromptError, UserError, WorkerError

RETRY_AFTER_S = 1


class ApiError(Exception):
    """A request that is not answered. status: of HTTP. param: the field at fault. code: a word for programs."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def kind(self) -> str:
        """OpenAI's type of error."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def api_error(error: UserError, prompt: str = "prompt") -> ApiError:
    """What a client is told of an error of the pair. prompt: the field that has the prompt."""
    if isinstance(error, WorkerError):
        if error.code == "RESOURCE_EXHAUSTED":
            return ApiError(429, str(error), code="overloaded")
        return ApiError(503, str(error), code="worker_failed")
    if isinstance(error, PromptError):
        long = "tokens, a text can have" in str(error)
        return ApiError(400, str(error), param=prompt, code="context_length_exceeded" if long else None)
    if isinstance(error, OptionError):
        return ApiError(400, str(error))
    return ApiError(500, str(error), code="internal_error")
