"""Rounds of draft and verification over a stream to each worker, in every mode.

The prompt goes to the target and, once that has a session for it, to the draft worker. The first round verifies no
draft, so the first token comes as soon as from the target alone, and the draft worker reads the prompt meanwhile. The
first round after a failure is done likewise. A draft that reads the target's hidden states (`client/states.py`) gets
the text with them, after that round. Where the end of the text occurred in it before, prompt lookup (`lookup` of the
settings) drafts what followed, and the draft worker is not asked in that round.
`overlap` drafts round N + 1 while round N is verified, guessing that all is accepted and which token comes next.
`lookahead` drafts for the likeliest outcomes and sends these drafts on to the target, which starts the next
verification by itself when one fits, so there is no round trip between the two. A wrong guess costs the pass that is
running, no more: both workers roll their caches back. No guess changes the text.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import grpc

from specsplit.client.network import simulated
from specsplit.client.recovery import WorkerFailed
from specsplit.client.result import Round
from specsplit.client.session import HeldPrefix
from specsplit.client.states import PassedStates
from specsplit.client.stream import Spent, Stream
from specsplit.client.text import Text
from specsplit.decoding.adaptive import GammaController
from specsplit.decoding.growth import CHAIN
from specsplit.decoding.lookup import Lookup, draft_from
from specsplit.decoding.tree import TokenTree
from specsplit.decoding.tree_plan import ranks
from specsplit.rpc.codec import tree_from_message, tree_to_message
from specsplit.rpc.v1 import specsplit_pb2 as pb

SETTLE_S = 0.5  # The longest wait, once a text is written, for what the draft worker spent on it.


@dataclass
class _Ahead:
    """What was asked to be drafted ahead in the round under way, and what came of it."""

    gamma: int
    sent: bool = False  # the target has it
    compute_ms: float = 0.0
    trees: dict[tuple[tuple[int, ...], int], TokenTree] = field(default_factory=dict)


class Rounds:
    """A stream to each worker and the rounds over them, until the text ends or one of them breaks.

    That one alone is opened anew (`close`, `renew`), and `run` goes on where the text stands: the other worker keeps
    its session and what it has computed.
    """

    def __init__(
        self, text: Text, stubs: Mapping[str, Any], controller: GammaController | None, states: PassedStates | None
    ) -> None:
        self.text = text
        self.config = text.config
        self.controller = controller
        self.states = states
        self.lookup = Lookup(self.config.lookup) if self.config.lookup and self.config.gamma else None
        self._stubs = dict(stubs)
        self._streams: dict[str, Stream] = {}
        self._spent = Spent()
        self._reading: asyncio.Future[None] | None = None  # the request that `_read_by_draft` sends
        self.renew("draft")
        self.renew("target")
        self._awaited = 0  # replies of the draft worker, at most
        self._advised: int | None = None  # gamma for all texts that share the target; None: this one is alone
        self._unlearnt: Callable[[], None] | None = None  # has the controller observe the last round

    def renew(self, role: str) -> None:
        """From here on a worker holds nothing of the text. Its next stream is opened when there is something to say,
        for a worker ends one that says nothing."""
        self._began_at, self._unread = len(self.text.result.rounds), True
        held = HeldPrefix.of(self.config)
        if role == "target":
            self.at_target = held
        else:
            self.at_draft = held
            if self.states is not None:
                self.states.renew()

    async def close(self, role: str) -> None:
        """End the stream to a worker, and with it the worker's session."""
        if role == "draft":
            # The target may have begun a round by itself, from what was prepared: the one after that is ours.
            self.at_target.round += 1
            self._awaited = 0
            if self._reading is not None:
                self._reading.cancel()
                await asyncio.gather(self._reading, return_exceptions=True)
                self._reading = None
        if role in self._streams:
            await self._streams.pop(role).close()

    def drop_draft(self) -> None:
        """From here on the target writes alone."""
        self._stubs["draft"] = self.states = None
        self.text.drop_draft()

    def _stream(self, role: str) -> Stream:
        if role not in self._streams:
            config, stub = self.config, self._stubs[role]
            call = stub.StreamVerify if role == "target" else stub.StreamDrafts
            self._streams[role] = Stream(
                role,
                call if self.text.span is None else self.text.span.carry(call),
                timeout_s=config.rpc_timeout_s,
                spent=self._spent,
                links=simulated(config) if role == "target" else None,
            )
        return self._streams[role]

    async def run(self) -> None:
        """Rounds until the text is finished. Raises WorkerFailed."""
        ahead: _Ahead | None = None
        outcome: tuple[tuple[int, ...], int] = ((), -1)
        while not self.text.finished:
            began = asked = time.perf_counter()
            drafted: pb.GenerateDraftsReply | None = None
            agreed = 0
            speculation = "none" if ahead is None else "hit" if outcome in ahead.trees else "miss"
            if ahead is not None and speculation == "hit":
                tree, gamma, hidden_ms = ahead.trees[outcome], ahead.gamma, ahead.compute_ms
                if ahead.sent:
                    self.at_target.round += 1  # the target has begun it by itself
                else:
                    await self._verify(tree, gamma)
                # The worker has kept that draft, so asking for it costs no pass.
                known = min(gamma, self.text.room())
                ahead = await self._ask_draft(known, drafted_ahead=True) if known > 0 else None
            elif self._begins():
                tree, gamma, hidden_ms = TokenTree(), 0, 0.0
                self._unread = False
                await self._verify(tree)
                if self.states is None:
                    self._reading = asyncio.ensure_future(self._read_by_draft())
            else:
                (tree, agreed), ahead, hidden_ms = self._look_up(), None, 0.0
                gamma = len(tree) or self._choose()
                if len(tree):
                    asked = time.perf_counter()
                elif gamma > 0:
                    await self._fetch_states()
                    ahead = await self._ask_draft(gamma)
                    drafted = await self._draft_reply(is_ahead=False)
                    tree = tree_from_message(drafted.tree)
                    asked = time.perf_counter()
                await self._verify(tree, gamma)
            verdict = await self._verdict(ahead)
            now = time.perf_counter()
            accepted = list(verdict.accepted_tokens)
            self._advised = verdict.gamma if verdict.HasField("gamma") else None
            outcome = (tuple(accepted), verdict.next_token)
            self.at_target.extend_to([*self.text.tokens, *accepted])
            timings = drafted.timings if drafted is not None else pb.Timings(compute_ms=hidden_ms)
            measured = Round(
                round=len(self.text.result.rounds) + 1,
                drafted=tree.depth(),
                accepted=len(accepted),
                tree_nodes=len(tree),
                draft_wall_ms=(asked - began) * 1e3,
                draft_compute_ms=timings.compute_ms,
                draft_queue_ms=timings.queue_ms,
                verify_wall_ms=(now - asked) * 1e3,
                verify_compute_ms=verdict.timings.compute_ms,
                verify_queue_ms=verdict.timings.queue_ms,
                network_ms=max(0.0, (now - began) * 1e3 - timings.server_ms - verdict.timings.server_ms),
                speculation=speculation,
                gamma_asked=gamma,
                **self._spent.take(),
                draft_source=tree.source or self._source(tree, gamma),
            )
            self.text.take(accepted, verdict.next_token, measured)
            self._note(measured, tree, list(verdict.accepted_nodes), drafted is not None, agreed)
        await self._settle()

    def _count(self, reply: pb.GenerateDraftsReply, *, exposed: bool) -> None:
        self._awaited -= 1
        self._spent["draft_exposed_ms" if exposed else "draft_hidden_ms"] += reply.timings.compute_ms

    async def _settle(self) -> None:
        """Hear what the draft worker still spent on the text; it drops what it is at after its current pass."""
        self._learn()
        if self._awaited > 0:
            with suppress(WorkerFailed, TimeoutError):  # the end of the stream is one as well
                async with asyncio.timeout(SETTLE_S):
                    await self._stream("draft").finish()
                    while True:
                        self._count(await self._stream("draft").receive(), exposed=False)
        rounds = self.text.result.rounds
        more = {name: getattr(rounds[-1], name) + amount for name, amount in self._spent.take().items()}
        rounds[-1] = replace(rounds[-1], **more)

    def _begins(self) -> bool:
        """Whether this round is to verify no draft, as one would delay its token: a worker has to read the text first.

        With rejection sampling a text depends on where its rounds are cut, so a failure must not cut it elsewhere.
        """
        return self._unread and not (self._began_at and self.text.sampling.uses_rejection)

    def _choose(self) -> int:
        if self.controller is not None and self._advised is None and self.controller.choice_is_for_one_round:
            self._learn()
        return self._gamma(self.text.room(), GammaController.choose)

    def _gamma(self, room: int, choose: Callable[[GammaController, int], int]) -> int:
        if self.controller is None:
            return room
        return choose(self.controller, room) if self._advised is None else min(self._advised, room)

    def _source(self, tree: TokenTree, gamma: int) -> str:
        """Where a draft of a worker that names no source came from, where that is not the same in every round."""
        if not (gamma and (self.lookup or self.config.p_min)):
            return ""
        return "model" if len(tree) else "none"

    def _told(self, gamma: int) -> int:
        """What the target, which finds gamma for all its texts, is told of the depth that was asked for."""
        return gamma if self.config.p_min else 0

    def _look_up(self) -> tuple[TokenTree, int]:
        """A draft from the text itself, and in how many tokens its end agrees with what was there before; empty and 0
        where the end is new, or a draft does not pay."""
        match = None if self.lookup is None else self.lookup.find(self.text.tokens)
        if match is None:
            return TokenTree(), 0
        agreed = match.tokens
        gamma = self._gamma(self.text.target_room(), lambda auto, room: auto.choose_for_match(agreed, room))
        certain = self.text.sampling.uses_rejection
        tree = draft_from(match, self.text.tokens, gamma, self.text.known_stop_ids, certain=certain)
        return tree, agreed if len(tree) else 0

    def _note(self, measured: Round, tree: TokenTree, path: list[int], drafted_now: bool, agreed: int) -> None:
        """Keep a round for `_learn`."""
        if self.controller is not None:
            self._unlearnt = partial(
                self.controller.observe,
                agreed=agreed,
                gamma=measured.gamma_asked,
                drafted=measured.drafted,
                accepted=measured.accepted,
                verified_tokens=measured.tree_nodes + 1,
                draft_ms=measured.draft_compute_ms,
                verify_ms=measured.verify_compute_ms,
                network_ms=measured.network_ms,
                hit=None if measured.speculation == "none" else measured.speculation == "hit",
                # Times of shared passes say nothing of those that it has alone.
                first=self._advised is not None or self.at_target.whole or (drafted_now and self.at_draft.whole),
                ranks=ranks(tree.parents, path),
            )

    def _learn(self) -> None:
        """Have the controller observe the last round. It takes a while, so it is done when no text waits for it: while
        the next round is verified, or before a choice that would be wrong without it."""
        if self._unlearnt is not None:
            self._unlearnt()
            self._unlearnt = None

    async def _verify(self, tree: TokenTree, gamma: int = 0, *, only_states: bool = False) -> None:
        wanted = None
        # Without room no draft follows that could read them.
        if self.states is not None and (only_states or self.text.room(ahead=1) > 0):
            wanted = self.states.wanted(len(self.text.tokens), only=only_states)
        context = self.at_target.context(self.text.tokens)
        request = pb.VerifyDraftsRequest(
            context=context,
            tree=tree_to_message(tree),
            sampling=self.text.sampling_message,
            wanted_states=wanted,
            gamma=self._told(gamma),
        )
        await self._stream("target").send(pb.StreamVerifyRequest(verify=request))

    async def _fetch_states(self) -> None:
        """Have the target send the hidden states that the draft needs and no round has brought: after a failure, where
        a round without a draft would cut the text elsewhere (`_begins`)."""
        if self.states is not None and self.states.lacking(len(self.text.tokens)):
            await self._verify(TokenTree(), only_states=True)
            await self._target_reply()
            self.at_target.extend_to(self.text.tokens[:-1])

    async def _ask_draft(self, gamma: int, *, drafted_ahead: bool = False) -> _Ahead | None:
        """Ask for a draft of the text, and in the modes that do so for what comes after it."""
        if self._reading is not None:
            await self._reading
            self._reading = None
        ahead, wanted = None, None
        if self.config.mode != "sync":
            next_gamma = self._choose()
            full = self.config.mode == "overlap"
            fan_out = self.text.limits.fan_out(next_gamma)
            if next_gamma > 0 and fan_out > 0:
                ahead = _Ahead(next_gamma)
                wanted = pb.Ahead(fan_out=1 if full else fan_out, max_draft_tokens=next_gamma, full_acceptance=full)
        fields = self.text.draft_fields(gamma, self.text.limits.shape, wanted)
        await self._send_draft_request({**fields, "drafted_ahead": drafted_ahead})
        return ahead

    async def _read_by_draft(self) -> None:
        """Have the draft worker read the text, if the next round will draft. Nobody waits for the draft of one token,
        the least that can be asked."""
        if self.text.room(ahead=1) > 0 and self._choose() > 0:
            # Sessions are taken in one order by all: who waits in line for the target's holds none of the draft worker.
            await self._stream("target").admitted()
            await self._send_draft_request(self.text.draft_fields(1, CHAIN))

    async def _send_draft_request(self, fields: Mapping[str, Any]) -> None:
        context = self.at_draft.context(self.text.tokens)
        self.at_draft.extend_to(self.text.tokens)
        self._awaited += 1 if fields["ahead"] is None else 2
        states: list[pb.HiddenStates] = []
        if self.states is not None:
            for request in self.states.requests(self.at_draft.id):
                await self._stream("draft").send(request)
            states = self.states.rest()
        await self._stream("draft").send(pb.GenerateDraftsRequest(context=context, states=states, **fields))

    async def _draft_reply(self, *, is_ahead: bool) -> pb.GenerateDraftsReply:
        while True:
            reply = await self._stream("draft").receive()
            waited_for = reply.round == self.at_draft.round and reply.is_ahead == is_ahead
            self._count(reply, exposed=waited_for and not is_ahead)
            if waited_for:
                return reply  # others are of earlier rounds

    async def _target_reply(self) -> pb.VerifyDraftsReply:
        while True:
            reply = await self._stream("target").receive()
            if reply.round == self.at_target.round:
                if self.states is not None:
                    self.states.take(reply)
                if reply.states_only:
                    continue
                return reply
            if reply.round > self.at_target.round:
                early = f"round {reply.round} was answered before round {self.at_target.round}"
                raise WorkerFailed("target", grpc.StatusCode.ABORTED.name, early, "resend")

    async def _verdict(self, ahead: _Ahead | None) -> pb.VerifyDraftsReply:
        """Wait for the target, and meanwhile take, and in lookahead mode send on, what is drafted ahead."""
        self._learn()
        if ahead is None:
            return await self._target_reply()
        verdict = asyncio.ensure_future(self._target_reply())
        drafts = asyncio.ensure_future(self._draft_reply(is_ahead=True))
        try:
            await asyncio.wait({verdict, drafts}, return_when=asyncio.FIRST_COMPLETED)
            if drafts.done():
                reply = drafts.result()
                ahead.compute_ms = reply.timings.compute_ms
                room = self.text.limit - len(self.text.tokens) - 1  # for an outcome and the draft after it
                outcomes = [o for o in reply.outcomes if len(o.accepted_tokens) + len(o.tree.token_ids) <= room]
                ahead.trees = {(tuple(o.accepted_tokens), o.next_token): tree_from_message(o.tree) for o in outcomes}
                if self.config.mode == "lookahead" and not verdict.done():
                    told = self._told(ahead.gamma)
                    prepared = pb.Prepared(round=self.at_target.round, outcomes=outcomes, gamma=told)
                    await self._stream("target").send(pb.StreamVerifyRequest(prepared=prepared))
                    ahead.sent = True
            return await verdict
        finally:
            for task in (verdict, drafts):
                task.cancel()
            await asyncio.gather(verdict, drafts, return_exceptions=True)
