"""TargetService: checks requests, keeps sessions, calls the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from specsplit.decoding.sampling import GREEDY, NonFiniteLogits, Sampling
from specsplit.decoding.shared_gamma import SharedGamma
from specsplit.decoding.tree import TokenTree, TreeError, check_lengths
from specsplit.decoding.verification import Verdict, checked_pass
from specsplit.engines.projection import Projection
from specsplit.engines.state_slots import MOST_TAPS
from specsplit.rpc.codec import tokens_crc32, tree_from_message
from specsplit.rpc.hidden_states import FORMS
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.rpc.v1 import specsplit_pb2_grpc as pb_grpc
from specsplit.settings.worker import TargetWorkerConfig, WorkerSettings
from specsplit.worker.batching import SharedModel
from specsplit.worker.calls import Caller
from specsplit.worker.inbox import Inbox
from specsplit.worker.refusals import InvalidRequest, LimitReached, NotFinite, SessionLost
from specsplit.worker.servicer import WorkerServicer, checked_sampling
from specsplit.worker.sessions import Session
from specsplit.worker.states import Wanted

if TYPE_CHECKING:
    from specsplit.engines.passes import Steps


class TargetServicer(WorkerServicer, pb_grpc.TargetServiceServicer):
    """Serves one target model. projection: the `fc` of a draft, which it can apply to hidden states."""

    role = "target"
    most_taps = MOST_TAPS
    config: TargetWorkerConfig

    def __init__(
        self,
        model: SharedModel,
        config: WorkerSettings,
        identity: Mapping[str, Any],
        projection: Projection | None = None,
    ) -> None:
        super().__init__(model, config, identity)
        self._projection = projection
        self._shared, self._shared_lock = SharedGamma(), threading.Lock()
        lm: Any = model.model
        self._layers: int = lm.num_layers if lm.taps else 0
        if lm.taps:
            given = pb.StatesGiven(num_layers=lm.num_layers, hidden_size=lm.hidden_size, forms=FORMS)
            if projection is not None:
                given.projection_sha256 = projection.projection_sha256
            self.states = {"states_given": given}

    def VerifyDrafts(self, request: pb.VerifyDraftsRequest, context: grpc.ServicerContext) -> pb.VerifyDraftsReply:
        return self.guard(context, request, lambda caller: self._verify(request, caller, parts=False)[-1])

    def StreamVerify(
        self, requests: Iterator[pb.StreamVerifyRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.VerifyDraftsReply]:
        return self.guard_stream(requests, context, self._stream)

    def StreamText(self, request: pb.StreamTextRequest, context: grpc.ServicerContext) -> Iterator[pb.StreamTextReply]:
        return self.guard_stream(iter([request]), context, self._write, merged=True)

    def _write(self, inbox: Inbox, caller: Caller) -> Iterator[pb.StreamTextReply]:
        """The text of one request, a reply a token. Each pass is timed and can be abandoned like that of a round."""
        for request, arrived in inbox:
            inbox.of_session(request.context.session_id, request.context.round)
            yield from self._whole_text(request, arrived, caller)

    def _whole_text(
        self, request: pb.StreamTextRequest, arrived: float, caller: Caller
    ) -> Iterator[pb.StreamTextReply]:
        self.check_request(request.context, 0)
        tokens, stop_ids = list(request.context.new_tokens), set(request.stop_token_ids)
        if request.context.prefix_length:
            raise InvalidRequest("the context of a whole text is its prompt: prefix_length must be 0")
        if not request.max_tokens:
            raise InvalidRequest("max_tokens must be at least 1")
        if len(tokens) + request.max_tokens > self.max_context:
            raise LimitReached(
                f"a prompt of {len(tokens)} tokens and {request.max_tokens} more exceed the {self.max_context} that a "
                "session of this worker can hold (max_context)"
            )
        sampling = checked_sampling(request.sampling)
        caller.place_wait_s = caller.session_wait_s
        for number in range(request.max_tokens):
            began = time.perf_counter() if number else arrived
            # Between two tokens session and place go to others as between two rounds.
            with self.sessions.use(request.context, caller, new=not number) as session:
                if number and session.tokens != tokens[:-1]:
                    raise SessionLost("another call has used the session of this text; send it again under a new name")
                self._tap(session, None)
                with self.model.timed(caller.gone) as watch:
                    held = len(session.tokens) if number else 0  # a session of this name may be left from before
                    verdict = verify_tree(self.model, session, tokens, held, TokenTree(), sampling)
                session.cost_s = session.cost_s or watch.compute_ms / 1e3
            caller.rest()
            tokens.append(verdict.next_token)
            timings = pb.Timings(queue_ms=watch.queue_ms, compute_ms=watch.compute_ms)
            timings.server_ms = (time.perf_counter() - began) * 1e3
            self.count_round(caller, request.context, began, timings)
            yield pb.StreamTextReply(token_ids=[verdict.next_token], timings=timings)
            if verdict.next_token in stop_ids:
                return

    def _stream(self, inbox: Inbox, caller: Caller) -> Iterator[pb.VerifyDraftsReply]:
        # Messages are taken in order, so drafts prepared for a round are seen right after that round.
        last: tuple[pb.VerifyDraftsRequest, pb.VerifyDraftsReply] | None = None
        for message, arrived in inbox:
            request: pb.VerifyDraftsRequest | None = message.verify
            waiting_since: float | None = arrived
            what = message.WhichOneof("what")
            if what is None:
                raise InvalidRequest("a message of this stream is either verify or prepared")
            if what == "prepared":
                if (count := len(message.prepared.outcomes)) > self.limits.fan_out:
                    raise InvalidRequest(f"{count} outcomes are more than {self.limits.fan_out}")
                request, waiting_since = last and _next_round(*last, message.prepared), None
            if request is None:
                continue
            inbox.of_session(request.context.session_id, request.context.round)
            replies = self._verify(request, caller, waiting_since)
            last = request, replies[-1]
            yield from replies

    def _tap(self, session: Session, wanted: Wanted | None) -> None:
        """Have the session's cache keep the hidden states that are wanted. A new session keeps none otherwise: its
        cache may be that of an earlier one."""
        if self._layers and (wanted is not None or not session.tokens):
            session.cache.tap(() if wanted is None else wanted.layers)

    def _wanted(self, request: pb.VerifyDraftsRequest) -> Wanted | None:
        """The hidden states that a request asks for. Raises InvalidRequest."""
        if not request.HasField("wanted_states"):
            return None
        if not self._layers:
            raise InvalidRequest("wanted_states: the engine of this target worker cannot give hidden states")
        if request.wanted_states.only and request.tree.token_ids:
            raise InvalidRequest("wanted_states.only: there is a tree, and nothing is verified")
        context = request.context.prefix_length + len(request.context.new_tokens)
        return Wanted.of(request.wanted_states, self._layers, self._projection, context)

    def _verify(
        self, request: pb.VerifyDraftsRequest, caller: Caller, arrived: float | None = None, *, parts: bool = True
    ) -> list[pb.VerifyDraftsReply]:
        """The reply, and before it others with hidden states alone where they do not fit into one and `parts` says
        that there may be several."""
        # Counts are checked before the tree is unpacked: a few megabytes of message would become many Python numbers.
        nodes = len(request.tree.token_ids)
        self.check_request(request.context, nodes)
        if request.gamma > self.limits.draft_tokens:
            raise InvalidRequest(f"gamma must be at most {self.limits.draft_tokens}, got {request.gamma}")
        try:
            check_lengths(nodes, len(request.tree.parents), len(request.tree.log_probs))
            if len(request.tree.distributions) > nodes + 1:
                raise TreeError(f"{len(request.tree.distributions)} distributions are more than {nodes} nodes have")
            if any(len(d.token_ids) > self.vocab_size for d in request.tree.distributions):
                raise TreeError(f"a distribution has more tokens than the vocabulary of {self.vocab_size}")
            tree = tree_from_message(request.tree)
            tree.validate(vocab_size=self.model.vocab_size)
            sampling = checked_sampling(request.sampling)
            if sampling.uses_rejection:
                tree.check_drawn()
        except TreeError as error:
            raise InvalidRequest(f"malformed tree: {error}") from error
        wanted = self._wanted(request)
        states: list[pb.HiddenStates] = []

        def work(session: Session, tokens: list[int]) -> Verdict | None:
            verdict = None
            self._tap(session, wanted)
            if wanted is not None and request.wanted_states.only:
                session.roll_back(tokens, request.context.prefix_length)
                if rest := tokens[session.cache.length : -1]:
                    self.model.step(session.cache, rest)
                session.tokens = tokens[:-1]
            else:
                verdict = verify_tree(self.model, session, tokens, request.context.prefix_length, tree, sampling)
            if wanted is not None:
                cache: Any = session.cache
                states.extend(wanted.packed(cache.states[: cache.length], parts=parts))
            return verdict

        def reply_to(verdict: Verdict | None) -> pb.VerifyDraftsReply:
            reply = pb.VerifyDraftsReply(states=states[-1] if states else None)
            if verdict is not None:
                reply.accepted_nodes.extend(verdict.path)
                reply.accepted_tokens.extend(tree.token_ids[node] for node in verdict.path)
                reply.next_token = verdict.next_token
                if (gamma := self._gamma_for_all(max(request.gamma, tree.depth()), len(verdict.path))) is not None:
                    reply.gamma = gamma
            return reply

        def count(verdict: Verdict | None) -> tuple[int, int]:
            return (tree.depth(), len(verdict.path)) if verdict else (0, 0)

        reply = self.answer(request, caller, work, reply_to, count, arrived)
        earlier = [pb.VerifyDraftsReply(round=reply.round, states=part, states_only=True) for part in states[:-1]]
        return [*earlier, reply]

    def _gamma_for_all(self, drafted: int, accepted: int) -> int | None:
        """Note a round; the gamma that all texts should have next, None where there is one text."""
        texts = self.sessions.open
        with self._shared_lock:
            before = self._shared.gamma
            self._shared.observe(time.perf_counter(), texts, drafted, accepted)
            gamma = self._shared.gamma
        if gamma != before:
            self.model.expect_all()
        return gamma


def verify_tree(
    model: Steps,
    session: Session,
    context: Sequence[int],
    prefix_length: int,
    tree: TokenTree,
    sampling: Sampling = GREEDY,
) -> Verdict:
    """Decide which drafted tokens the target accepts, and its own next token.

    context: the full context; the session holds its first `prefix_length` tokens. Afterwards the session holds the
    context and the accepted tokens, in its token list and in its cache. A pass that fails leaves a consistent session.
    Raises NotFinite when the target's own logits are not finite.
    """
    session.roll_back(context, prefix_length)
    try:
        verdict = checked_pass(model, session.cache, context, tree, sampling)
    except NonFiniteLogits as error:
        raise NotFinite(str(error)) from error
    session.tokens = [*context, *(tree.token_ids[node] for node in verdict.path)]
    return verdict


def _next_round(
    request: pb.VerifyDraftsRequest, reply: pb.VerifyDraftsReply, prepared: pb.Prepared
) -> pb.VerifyDraftsRequest | None:
    """The request of the round after `request`, when a draft for its outcome was prepared; else None."""
    context, accepted = request.context, list(reply.accepted_tokens)
    fits = (o for o in prepared.outcomes if o.next_token == reply.next_token and list(o.accepted_tokens) == accepted)
    outcome = next(fits, None)
    if outcome is None or prepared.round != context.round:
        return None
    added = [*context.new_tokens, *accepted]
    following = pb.VerifyDraftsRequest(
        context=pb.Context(
            session_id=context.session_id,
            round=context.round + 1,
            prefix_length=context.prefix_length + len(added),
            prefix_crc32=tokens_crc32(added, context.prefix_crc32),
            new_tokens=[reply.next_token],
        ),
        tree=outcome.tree,
        gamma=prepared.gamma,
        sampling=request.sampling,
    )
    if request.HasField("wanted_states"):
        following.wanted_states.CopyFrom(request.wanted_states)
        following.wanted_states.first = following.context.prefix_length
    return following
