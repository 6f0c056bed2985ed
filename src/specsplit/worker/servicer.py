"""What both services share: sessions, limits, description, and how a refusal becomes a gRPC status."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from queue import SimpleQueue
from typing import Any, NoReturn, TypeVar

import grpc

import specsplit
from specsplit import tracing
from specsplit.decoding.sampling import Sampling
from specsplit.decoding.tree import MAX_BRANCHING, MAX_TREE_NODES
from specsplit.engines.gpu import GpuPasses
from specsplit.errors import is_out_of_memory
from specsplit.launch.environment import DETERMINISM_VARIABLES
from specsplit.launch.host import worker_host
from specsplit.rpc.codec import sampling_from_message
from specsplit.rpc.statuses import RETRY_AFTER
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import MAX_GAMMA
from specsplit.settings.worker import WorkerSettings
from specsplit.worker.batching import SharedModel, describe_runtime
from specsplit.worker.calls import Caller, OpenCalls, Peer, Places
from specsplit.worker.inbox import MOST_WAITING, Inbox
from specsplit.worker.memory import sessions_that_fit
from specsplit.worker.prometheus import Metrics
from specsplit.worker.refusals import Abandoned, Busy, InvalidRequest, LimitReached, Refusal
from specsplit.worker.sessions import Session, SessionStore
from specsplit.worker.spans import WorkerSpans
from specsplit.worker.usage import UsageMeter

log = logging.getLogger(__name__)
R = TypeVar("R")
T = TypeVar("T")
MAX_SESSION_ID = 128
MAX_FAN_OUT = 64  # outcomes of a verification
MAX_STOP_TOKENS = 1024
MAX_ROUND = 1 << 31
UNREAD_S = 5.0  # for a client to read why its stream was ended
MAX_DETAILS = 500  # characters: a status goes into headers, whose size is limited


class WorkerServicer:
    """One loaded model and its sessions.

    identity: model name and fingerprint as reported by Describe. limits: what requests are checked against.
    owner_of: who a call is from, by its metadata; what it says has one length, so that no owner and session id can be
    read as another pair. tokenizer_files: for Describe.
    """

    role = ""
    most_taps = 0  # layers whose hidden states a session may keep
    owner_of: Callable[[Any], str] = staticmethod(lambda metadata: "")
    tokenizer_files: Callable[[], Mapping[str, bytes]] = staticmethod(dict)
    states: Mapping[str, Any] = {}  # what Describe says of hidden states
    metrics: Metrics | None = None
    spans: WorkerSpans | None = None

    def __init__(self, model: SharedModel, config: WorkerSettings, identity: Mapping[str, Any]) -> None:
        self.model = model
        self.vocab_size = model.vocab_size
        self.config = config
        self.identity = identity
        self.usage = UsageMeter(str(model.model.device))
        self.max_context = min(config.max_context, model.max_context)
        sessions = sessions_that_fit(config, model.model, self.max_context, self.most_taps)
        if isinstance(model.model, GpuPasses):
            model.model.prepare(self.max_context, sessions, drafts=self.role == "draft")
        self.limits = pb.Limits(
            tree_nodes=config.max_tree_nodes,
            draft_tokens=MAX_GAMMA,
            children=MAX_BRANCHING,
            tree_width=MAX_TREE_NODES,
            fan_out=MAX_FAN_OUT,
            stop_tokens=MAX_STOP_TOKENS,
            message_bytes=config.message_bytes,
            waiting_messages=MOST_WAITING,
            sessions=sessions,
            calls=config.call_limit,
            streams=config.stream_limit,
        )
        self.sessions = SessionStore(
            lambda: model.new_cache(self.max_context),
            limit=sessions,
            ttl_s=config.session_ttl_s,
            slice_s=config.session_slice_s,
        )
        self.places = Places(config.call_limit)
        self.open_calls = OpenCalls(config.stream_limit, config.stream_idle_s)
        worker_host()  # remembered before anybody waits for it: the driver may take seconds to answer

    def EndSession(self, request: pb.EndSessionRequest, context: grpc.ServicerContext) -> pb.EndSessionReply:
        return pb.EndSessionReply(existed=self.sessions.end(request.session_id, self.caller(context).owner))

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        if request.usage:
            return pb.DescribeReply(role=self.role, usage=self.usage.read())
        return pb.DescribeReply(
            role=self.role,
            version=specsplit.__version__,
            device=str(self.model.model.device),
            threads=self.model.threads,
            skip_layers=getattr(self.config, "skip_layers", []),
            vocab_size=self.vocab_size,
            max_context=self.max_context,
            eos_token_ids=self.model.model.eos_token_ids,
            pid=os.getpid(),
            environment={k: os.environ[k] for k in DETERMINISM_VARIABLES if k in os.environ},
            runtime={
                **describe_runtime(self.model.model.device, self.config.seed, type(self.model.model).__name__),
                "model_max_context": str(self.model.max_context),
            },
            tokenizer_files=self.tokenizer_files() if request.with_tokenizer else {},
            limits=self.limits,
            **self.states,
            **self.identity,
        )

    def caller(self, context: grpc.ServicerContext) -> Caller:
        metadata = context.invocation_metadata()
        owner = self.owner_of(metadata)
        return Caller(
            owner,
            lambda: not context.is_active(),
            None if self.spans is None else tracing.parent_of(metadata),
            Peer.of(owner, context.peer()),
            places=self.places,
        )

    def check_request(self, context: pb.Context, nodes: int) -> None:
        """Refuse what no session could serve, before one is opened and another evicted for it."""
        if not 0 < len(context.session_id) <= MAX_SESSION_ID:
            raise InvalidRequest(f"session_id must have 1 to {MAX_SESSION_ID} characters")
        if not 1 <= context.round < MAX_ROUND:
            raise InvalidRequest(f"round counts from 1 and stays below {MAX_ROUND}, got {context.round}")
        if not context.new_tokens:
            raise InvalidRequest("new_tokens is empty: send at least the last token of the context")
        length = context.prefix_length + len(context.new_tokens)
        if nodes > self.limits.tree_nodes:
            raise LimitReached(f"a tree of {nodes} nodes is over the limit of {self.limits.tree_nodes}")
        if length + nodes > self.max_context:
            raise LimitReached(
                f"a context of {length} tokens and {nodes} drafted ones exceed the "
                f"{self.max_context} that a session of this worker can hold (max_context)"
            )
        # After the length, which bounds how many there are to look at.
        outside = next((t for t in context.new_tokens if t >= self.vocab_size), None)
        if outside is not None:
            raise InvalidRequest(f"token id {outside} is outside the vocabulary of {self.vocab_size}")

    def answer(
        self,
        request: Any,
        caller: Caller,
        work: Callable[[Session, list[int]], T],
        reply_to: Callable[[T], R],
        count: Callable[[T], tuple[int, int]],
        arrived: float | None = None,
    ) -> R:
        """One round of a checked request: the reply given before, or what `work(session, context)` comes to.

        reply_to makes the reply of what `work` returns; the round and the timings are filled in here. count: its tokens
        drafted and accepted, for the metrics and spans.
        arrived: time.perf_counter() when the request came, if it waited before this call.
        """
        called = time.perf_counter()
        arrived = called if arrived is None else arrived
        # Its hash: what fields we do not know hold would stay in memory with the session.
        raw = sha256(request.SerializeToString(deterministic=True)).digest()
        with self.sessions.use(request.context, caller) as session:
            caller.admitted()
            if (known := session.replay(request.context.round, raw)) is not None:
                return known
            tokens = session.context_for(request.context)
            with self.model.timed(caller.gone) as watch:
                value = work(session, tokens)
            reply: Any = reply_to(value)
            reply.round = request.context.round
            reply.timings.queue_ms = watch.queue_ms + (called - arrived) * 1e3
            reply.timings.compute_ms = watch.compute_ms
            reply.timings.server_ms = (time.perf_counter() - arrived) * 1e3
            session.remember(request.context.round, raw, reply)
            session.cost_s = session.cost_s or watch.compute_ms / 1e3
            self.count_round(caller, request.context, arrived, reply.timings, *count(value))
            return reply

    def count_round(
        self, caller: Caller, what: pb.Context, arrived: float, timings: Any, drafted: int = 0, accepted: int = 0
    ) -> None:
        """Note a round in the metrics and the spans. arrived: time.perf_counter() when it was asked for."""
        if self.metrics is not None:
            self.metrics.round(timings.queue_ms, timings.compute_ms, drafted, accepted)
        if caller.parent is not None and self.spans is not None:
            self.spans.round(caller.parent, what, arrived, timings, drafted=drafted, accepted=accepted)

    def guard_stream(
        self,
        requests: Iterator[Any],
        context: grpc.ServicerContext,
        answers: Callable[[Inbox, Caller], Iterator[R]],
        *,
        merged: bool = False,
    ) -> Iterator[R]:
        """Run the handler of a stream, as `guard` does for one call; its session ends with it.

        The handler has a thread of its own, for gRPC asks for the next reply only once the last one was sent.
        merged: replies that wait go out as one, so there is no limit to them.
        """
        caller = self.caller(context)
        caller.holds = True
        caller.session_wait_s = self.config.session_wait_s
        inbox = Inbox(requests, caller, self.config.session_wait_s)
        caller.end = inbox.end
        caller.admitted = _once(lambda: context.send_initial_metadata(()))
        outbox: SimpleQueue[tuple[R | None, Exception | None]] = SimpleQueue()
        told = threading.Event()

        def work() -> None:
            failure = None
            try:
                for reply in answers(inbox, caller):
                    outbox.put((reply, None))
                    if not merged and outbox.qsize() > MOST_WAITING:
                        raise LimitReached(f"over {MOST_WAITING} replies of this stream wait to be read")
            except Exception as error:
                failure = caller.displaced or error
            finally:
                caller.rest()
                self.sessions.end(inbox.session_id, caller.owner)
                outbox.put((None, failure))
            if caller.displaced is not None and not told.wait(UNREAD_S):
                context.cancel()  # it does not read its replies

        try:
            with self.open_calls.open(caller):
                threading.Thread(target=work, name="answers", daemon=True).start()
                while (item := outbox.get())[0] is not None:
                    reply: Any = item[0]
                    while merged and not outbox.empty() and (item := outbox.get())[0] is not None:
                        reply.MergeFrom(item[0])
                    yield reply
                    if item[0] is None:
                        break
        except Busy as error:
            item = None, error
        finally:
            told.set()
        if item[1] is not None:
            self.abort(context, item[1], inbox.session_id, inbox.round, inbox.arrived)

    def guard(self, context: grpc.ServicerContext, request: Any, work: Callable[[Caller], R]) -> R:
        """Run a handler; what it raises becomes a status."""
        arrived, what = time.perf_counter(), request.context
        caller = self.caller(context)
        caller.may_wait(what, self.config.session_wait_s)
        try:
            caller.work()
            return work(caller)
        except Exception as error:
            self.abort(context, error, what.session_id, what.round, arrived)
        finally:
            caller.rest()

    def abort(
        self, context: grpc.ServicerContext, error: Exception, session_id: str, round_number: int, arrived: float
    ) -> NoReturn:
        """End a call: a Refusal with its own status, want of memory as RESOURCE_EXHAUSTED, anything else INTERNAL with
        the traceback in the log. arrived: time.perf_counter() when the request came."""
        session = tracing.shown(session_id)
        about = f"session={session} round={round_number}"
        metadata = context.invocation_metadata()
        fields = {"session": session or None, "round": round_number or None, "trace_id": tracing.trace_id(metadata)}
        if is_out_of_memory(error):
            log.error("out of memory: %s %s", error, about, extra=fields)
            error = LimitReached("not enough memory on this worker for the request; lower max_context or max_sessions")
        status = error.status if isinstance(error, Refusal) else grpc.StatusCode.INTERNAL
        if self.metrics is not None:
            self.metrics.refused(status)
        if self.spans is not None:
            self.spans.refused(tracing.parent_of(metadata), session_id, round_number, arrived, status, error)
        if isinstance(error, Refusal):
            level = logging.DEBUG if isinstance(error, Abandoned) else logging.INFO
            log.log(level, "refused %s: %s %s", status.name, error, about, extra=fields)
            if isinstance(error, Busy):
                context.set_trailing_metadata(((RETRY_AFTER, str(error.retry_after_ms)),))
            context.abort(status, str(error)[:MAX_DETAILS])
        log.error("request failed %s", about, exc_info=error, extra=fields)
        context.abort(status, f"{type(error).__name__}: {error}"[:MAX_DETAILS])
        raise AssertionError("abort always raises")


def checked_sampling(message: pb.Sampling) -> Sampling:
    """Raises InvalidRequest for a temperature or top_p out of range."""
    try:
        return sampling_from_message(message)
    except ValueError as error:
        raise InvalidRequest(f"sampling: {error}") from error


def _once(tell: Callable[[], object]) -> Callable[[], None]:
    """`tell`, which is called the first time alone; that nobody listens any more is no error."""
    calls = iter([tell])

    def call() -> None:
        for first in calls:
            with suppress(ValueError, grpc.RpcError):
                first()

    return call
