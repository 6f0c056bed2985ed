"""Why a worker refuses a request. Each class is one gRPC status."""

from __future__ import annotations

import grpc


class Refusal(Exception):
    """A request that a worker will not serve; the message goes to the client with `status`."""

    status = grpc.StatusCode.INTERNAL


class InvalidRequest(Refusal):
    """The request itself is wrong, whatever state the worker is in."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class SessionLost(Refusal):
    """The worker does not hold the prefix that the request builds on; send the full context."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class StaleRound(Refusal):
    """A round that is over and cannot be answered again."""

    status = grpc.StatusCode.ABORTED


class LimitReached(Refusal):
    """A limit of the worker: context, sessions, tree size, calls at once, memory."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class Busy(LimitReached):
    """There is no room now; there may be after `retry_after_ms`."""

    retry_after_ms = 100


class Abandoned(Refusal):
    """The client cancelled the call or its deadline passed: nothing more is computed for it."""

    status = grpc.StatusCode.CANCELLED


class Stopped(Refusal):
    """The worker is stopping; the call may be made again where another one serves."""

    status = grpc.StatusCode.UNAVAILABLE
