"""What both services share: sessions, limits, description, and how a refusal becomes a gRPC status."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from queue import SimpleQueue
from typing import Any, NoReturn, TypeVar

import grpc

import specsplit
from specsplit.config import WorkerSettings
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.workers.compute import SharedModel, describe_runtime
from specsplit.workers.environment import DETERMINISM_VARIABLES
from specsplit.workers.errors import RETRY_AFTER, Busy, InvalidRequest, LimitReached, Refusal
from specsplit.workers.inbox import Inbox
from specsplit.workers.sessions import Session, SessionStore

log = logging.getLogger(__name__)
R = TypeVar("R")
T = TypeVar("T")
MAX_SESSION_ID = 128


class WorkerServicer:
    """One loaded model and its sessions.

    identity: model name and fingerprint as reported by Describe.
    """

    role = ""

    def __init__(self, model: SharedModel, config: WorkerSettings, identity: Mapping[str, Any]) -> None:
        self.model = model
        self.vocab_size = model.vocab_size
        self.config = config
        self.identity = identity
        self.max_context = min(config.max_context, model.max_context)
        self.sessions = SessionStore(
            lambda: model.new_cache(self.max_context), limit=config.max_sessions, ttl_s=config.session_ttl_s
        )

    def EndSession(self, request: pb.EndSessionRequest, context: grpc.ServicerContext) -> pb.EndSessionReply:
        return pb.EndSessionReply(existed=self.sessions.end(request.session_id))

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        return pb.DescribeReply(
            role=self.role,
            version=specsplit.__version__,
            dtype=self.config.dtype,
            device=str(self.model.model.device),
            threads=self.model.threads,
            skip_layers=getattr(self.config, "skip_layers", []),
            vocab_size=self.vocab_size,
            max_context=self.max_context,
            eos_token_ids=self.model.model.eos_token_ids,
            pid=os.getpid(),
            environment={k: os.environ[k] for k in DETERMINISM_VARIABLES if k in os.environ},
            runtime=describe_runtime(self.model.model.device, self.config.seed),
            **self.identity,
        )

    def check_request(self, context: pb.Context, nodes: int) -> None:
        """Refuse what no session could serve, before one is opened and another evicted for it."""
        if not 0 < len(context.session_id) <= MAX_SESSION_ID:
            raise InvalidRequest(f"session_id must have 1 to {MAX_SESSION_ID} characters")
        if context.round < 1:
            raise InvalidRequest("round counts from 1")
        if not context.new_tokens:
            raise InvalidRequest("new_tokens is empty: send at least the last token of the context")
        outside = next((t for t in context.new_tokens if t >= self.vocab_size), None)
        if outside is not None:
            raise InvalidRequest(f"token id {outside} is outside the vocabulary of {self.vocab_size}")
        length = context.prefix_length + len(context.new_tokens)
        if nodes > self.config.max_tree_nodes:
            raise LimitReached(f"a tree of {nodes} nodes is over the limit of {self.config.max_tree_nodes}")
        if length + nodes > self.max_context:
            raise LimitReached(
                f"a context of {length} tokens and {nodes} drafted ones exceed the "
                f"{self.max_context} that a session of this worker can hold (max_context)"
            )

    def answer(
        self,
        request: Any,
        work: Callable[[Session, list[int]], T],
        reply_to: Callable[[T], R],
        arrived: float | None = None,
    ) -> R:
        """One round of a checked request: the reply given before, or what `work(session, context)` comes to.

        reply_to makes the reply of what `work` returns; the round and the timings are filled in here.
        arrived: time.perf_counter() when the request came, if it waited before this call.
        """
        called = time.perf_counter()
        arrived = called if arrived is None else arrived
        raw = request.SerializeToString(deterministic=True)
        with self.sessions.use(request.context) as session:
            if (known := session.replay(request.context.round, raw)) is not None:
                return known
            tokens = session.context_for(request.context)
            with self.model.timed() as watch:
                value = work(session, tokens)
            reply: Any = reply_to(value)
            reply.round = request.context.round
            reply.timings.queue_ms = watch.queue_ms + (called - arrived) * 1e3
            reply.timings.compute_ms = watch.compute_ms
            reply.timings.server_ms = (time.perf_counter() - arrived) * 1e3
            session.remember(request.context.round, raw, reply)
            return reply

    def guard_stream(
        self, requests: Iterator[Any], context: grpc.ServicerContext, answers: Callable[[Inbox], Iterator[R]]
    ) -> Iterator[R]:
        """Run the handler of a stream, as `guard` does for one call; its sessions end with it.

        The handler has a thread of its own, for gRPC asks for the next reply only once the last one was sent.
        """
        inbox = Inbox(requests)
        outbox: SimpleQueue[tuple[R | None, Exception | None]] = SimpleQueue()

        def work() -> None:
            failure = None
            try:
                for reply in answers(inbox):
                    outbox.put((reply, None))
            except Exception as error:
                failure = error
            finally:
                for session_id in inbox.session_ids:
                    self.sessions.end(session_id)
                outbox.put((None, failure))

        threading.Thread(target=work, name="answers", daemon=True).start()
        while (item := outbox.get())[0] is not None:
            yield item[0]
        if item[1] is not None:
            self.abort(context, item[1])

    def guard(self, context: grpc.ServicerContext, work: Callable[[], R]) -> R:
        """Run a handler; what it raises becomes a status."""
        try:
            return work()
        except Exception as error:
            self.abort(context, error)

    def abort(self, context: grpc.ServicerContext, error: Exception) -> NoReturn:
        """End a call: a Refusal with its own status, anything else INTERNAL with the traceback in the log."""
        if isinstance(error, Refusal):
            log.info("refused %s: %s", error.status.name, error)
            if isinstance(error, Busy):
                context.set_trailing_metadata(((RETRY_AFTER, str(error.retry_after_ms)),))
            context.abort(error.status, str(error))
        log.error("request failed", exc_info=error)
        context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
        raise AssertionError("abort always raises")
