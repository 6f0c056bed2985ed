"""DraftService: checks requests, keeps sessions, calls the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc

from specsplit.decoding.forced import Forced
from specsplit.decoding.growth import DraftSettings
from specsplit.decoding.tree import MAX_TREE_NODES, TokenTree, TreeShape
from specsplit.engines.suffix import SuffixCache
from specsplit.models.vocabulary import Vocabulary
from specsplit.rpc.codec import tree_to_message
from specsplit.rpc.hidden_states import FORMS
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.rpc.v1 import specsplit_pb2_grpc as pb_grpc
from specsplit.settings.run import MAX_GAMMA
from specsplit.settings.worker import DraftWorkerConfig
from specsplit.worker.batching import SharedModel
from specsplit.worker.calls import Caller
from specsplit.worker.draft import Drafter
from specsplit.worker.inbox import Inbox
from specsplit.worker.refusals import InvalidRequest, LimitReached, SessionLost
from specsplit.worker.servicer import WorkerServicer, checked_sampling
from specsplit.worker.sessions import Session
from specsplit.worker.states import MOST_PARTS, checked_states, collect

MOST_MEMORY_NAME = 128
MOST_FORCED = 2 * MAX_GAMMA + 1  # a draft, the token after it, and a draft ahead


class DraftServicer(WorkerServicer, pb_grpc.DraftServiceServicer):
    """Serves one draft model. vocabulary: maps its tokens to the target's; by default they are the same."""

    role = "draft"
    config: DraftWorkerConfig

    def __init__(
        self,
        model: SharedModel,
        config: DraftWorkerConfig,
        identity: Mapping[str, Any],
        vocabulary: Vocabulary | None = None,
    ) -> None:
        super().__init__(model, config, identity)
        self.vocabulary = vocabulary or Vocabulary(model.vocab_size)
        self.vocab_size = self.vocabulary.size
        lm: Any = model.model
        self.head = lm if hasattr(lm, "project") else None
        if self.head is not None:
            layers, size = self.head.layers or (), self.head.hidden_size
            needed = pb.StatesNeeded(layers=layers, hidden_size=size, vocab_size=self.vocab_size, forms=FORMS)
            self.states = {"states_needed": needed}

    def GenerateDrafts(
        self, request: pb.GenerateDraftsRequest, context: grpc.ServicerContext
    ) -> pb.GenerateDraftsReply:
        return self.guard(context, request, lambda caller: self._generate(request, caller, self._settings(request))[0])

    def StreamDrafts(
        self, requests: Iterator[pb.GenerateDraftsRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateDraftsReply]:
        return self.guard_stream(requests, context, self._stream)

    def _stream(self, inbox: Inbox, caller: Caller) -> Iterator[pb.GenerateDraftsReply]:
        earlier: list[pb.HiddenStates] = []
        for request, arrived in inbox:
            inbox.of_session(request.context.session_id, request.context.round)
            if request.states_only:
                earlier += self._states(request)
                if len(earlier) > MOST_PARTS or sum(part.count for part in earlier) > self.max_context:
                    raise LimitReached(
                        f"over {MOST_PARTS} messages of hidden states, or {self.max_context} positions, wait for a "
                        "draft to be asked for"
                    )
                continue
            if earlier:
                earlier += request.states
                request.ClearField("states")
                request.states.extend(earlier)
                earlier = []
            settings = self._settings(request)
            reply, tree = self._generate(request, caller, settings, arrived)
            yield reply
            if request.ahead.fan_out and tree is not None and not inbox.waiting():
                yield from self._ahead(request, caller, settings, tree, inbox.waiting)

    def _generate(
        self, request: pb.GenerateDraftsRequest, caller: Caller, settings: DraftSettings, arrived: float | None = None
    ) -> tuple[pb.GenerateDraftsReply, TokenTree | None]:
        """The reply and its tree; None instead of the tree when the reply was given before."""
        made: list[TokenTree] = []
        states = self._states(request)
        request.ClearField("states")  # they are not what a request is told by when it is sent again

        def work(session: Session, tokens: list[int]) -> TokenTree:
            cache: Any = session.cache
            if isinstance(cache, SuffixCache):
                cache.learn_in(f"{len(caller.owner)} {caller.owner} {request.memory}", request.prompt_tokens)
            if self.head is not None:
                held = session.hidden if request.context.prefix_length else None
                session.hidden = collect(held, states, self.head, self.max_context)
            drafter = self._drafter(session, tokens, settings, drafted_ahead=request.drafted_ahead)
            made.append(drafter.draft())
            return made[0]

        def reply_to(tree: TokenTree) -> pb.GenerateDraftsReply:
            return pb.GenerateDraftsReply(tree=tree_to_message(tree))

        reply = self.answer(request, caller, work, reply_to, lambda tree: (len(tree), 0), arrived)
        if made and made[0].source and self.metrics is not None:
            self.metrics.looked_up(made[0].source)
        return reply, made[0] if made else None

    def _ahead(
        self,
        request: pb.GenerateDraftsRequest,
        caller: Caller,
        settings: DraftSettings,
        tree: TokenTree,
        abandoned: Callable[[], bool],
    ) -> Iterator[pb.GenerateDraftsReply]:
        """A reply with drafts for the likely outcomes of verifying `tree`, none when a newer request has arrived; no
        reply without a session."""
        ahead = request.ahead
        try:
            with (
                self.sessions.use(request.context, caller, new=False) as session,
                self.model.timed(caller.gone) as watch,
            ):
                outcomes = self._drafter(session, session.tokens, settings, abandoned).ahead(
                    tree, ahead.max_draft_tokens, ahead.fan_out, full_acceptance=ahead.full_acceptance
                )
        except SessionLost:  # the next request will say so
            return
        if self.metrics is not None:
            self.metrics.ahead(watch.compute_ms)
        if abandoned():  # nobody wants them, but what they took is counted
            outcomes = []
        timings = pb.Timings(
            queue_ms=watch.queue_ms, compute_ms=watch.compute_ms, server_ms=watch.queue_ms + watch.compute_ms
        )
        reply = pb.GenerateDraftsReply(round=request.context.round, is_ahead=True, timings=timings)
        for o in outcomes:
            reply.outcomes.add(accepted_tokens=o.accepted_tokens, next_token=o.next_token, tree=tree_to_message(o.tree))
        if caller.parent is not None and self.spans is not None:
            drafted = sum(len(o.tree) for o in outcomes)
            self.spans.ahead(caller.parent, request.context, reply.timings, drafted)
        yield reply

    def _drafter(self, *what: Any, **more: Any) -> Drafter:
        return Drafter(self.model, self.vocabulary, *what, reads_states=self.head is not None, **more)

    def _states(self, request: pb.GenerateDraftsRequest) -> list[pb.HiddenStates]:
        """The hidden states of a request. Raises InvalidRequest when they are not those that the model reads."""
        if not request.states:
            return []
        if self.head is None:
            raise InvalidRequest("states: the draft model of this worker reads no hidden states")
        return checked_states(request.states, self.head, self.max_context)

    def _settings(self, request: pb.GenerateDraftsRequest) -> DraftSettings:
        """The settings of a request. Raises InvalidRequest or LimitReached."""
        gamma, ahead, most = request.max_draft_tokens, request.ahead, self.limits
        if not 1 <= gamma <= most.draft_tokens:
            raise InvalidRequest(f"max_draft_tokens must be 1 to {most.draft_tokens}, got {gamma}")
        branching = list(request.branching)
        if len(branching) > most.draft_tokens:
            raise InvalidRequest(f"branching has {len(branching)} levels, a draft has at most {most.draft_tokens}")
        if any(not 1 <= width <= most.children for width in branching):
            raise InvalidRequest(f"branching {branching}: a level has 1 to {most.children} children")
        nodes, width = request.tree_nodes, request.tree_width
        if nodes and not (nodes <= MAX_TREE_NODES and 1 <= width <= most.tree_width):
            raise InvalidRequest(f"tree_nodes and tree_width must be 1 to {min(MAX_TREE_NODES, most.tree_width)}")
        if nodes and branching:
            raise InvalidRequest("a tree has either tree_nodes or branching")
        if len(request.stop_token_ids) > most.stop_tokens:
            raise InvalidRequest(f"{len(request.stop_token_ids)} stop tokens are more than {most.stop_tokens}")
        if ahead.fan_out > most.fan_out or ahead.max_draft_tokens > most.draft_tokens:
            raise InvalidRequest(
                f"ahead: fan_out is at most {most.fan_out}, max_draft_tokens at most {most.draft_tokens}"
            )
        if len(request.memory) > MOST_MEMORY_NAME:
            raise InvalidRequest(f"memory: a name has at most {MOST_MEMORY_NAME} characters")
        forced = Forced(tuple(request.forced.tokens), tuple(request.forced.right))
        if len(forced.tokens) != len(forced.right) or len(forced.tokens) > MOST_FORCED:
            raise InvalidRequest(f"forced: tokens and right have one length, at most {MOST_FORCED}")
        sampling = checked_sampling(request.sampling)
        if nodes and sampling.uses_rejection:
            raise InvalidRequest("a tree that keeps the likeliest tokens biases rejection sampling: use branching")
        p_min = request.p_min
        if not 0 <= p_min <= 1:
            raise InvalidRequest(f"p_min must be 0 to 1, got {p_min}")
        if p_min and (sampling.uses_rejection or forced.tokens):
            raise InvalidRequest("p_min leaves out improbable tokens: not with rejection sampling or forced acceptance")
        shape = TreeShape(tuple(branching), nodes, width)
        self.check_request(request.context, shape.size(gamma))
        return DraftSettings(
            gamma=gamma,
            shape=shape,
            sampling=sampling,
            stop_token_ids=frozenset(request.stop_token_ids),
            vocab_size=request.vocab_size or self.vocab_size,
            length_limit=request.length_limit or DraftSettings.length_limit,
            forced=forced,
            p_min=p_min,
        )
