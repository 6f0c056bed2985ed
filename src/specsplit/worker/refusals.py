"""Why a worker refuses a request. Each class is one gRPC status."""

from __future__ import annotations

import grpc


class Refusal(Exception):
    """A request that a worker does not serve; the client gets the message with `status`."""

    status = grpc.StatusCode.INTERNAL


class InvalidRequest(Refusal):
    """The request itself is wrong, in any state of the worker."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class SessionLost(Refusal):
    """The worker does not hold the prefix that the request builds on; send the full context."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class StaleRound(Refusal):
    """The round is over and cannot be answered again."""

    status = grpc.StatusCode.ABORTED


class LimitReached(Refusal):
    """The request exceeds a limit of the worker: context, sessions, tree size, calls at once, memory."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class Busy(LimitReached):
    """All sessions or calls are in use; retry after `retry_after_ms`."""

    retry_after_ms = 100


class NotFinite(Refusal):
    """The model overflows on this text: its logits hold NaN or infinity, so there is no right token."""

    status = grpc.StatusCode.DATA_LOSS


class Abandoned(Refusal):
    """The client cancelled the call or its deadline passed, so nothing more is computed for it."""

    status = grpc.StatusCode.CANCELLED


class Stopped(Refusal):
    """The worker is stopping; the call can be made again at another worker."""

    status = grpc.StatusCode.UNAVAILABLE
