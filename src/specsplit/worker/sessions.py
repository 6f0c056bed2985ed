"""A worker's sessions: tokens, their cache and the last reply of each; how many there are, and who has one."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from specsplit.engines.kv_cache import KVCache
from specsplit.errors import counted
from specsplit.rpc.codec import tokens_crc32
from specsplit.rpc.statuses import ALL_TAKEN
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.worker.calls import Caller, Line, Peer
from specsplit.worker.refusals import SessionLost, StaleRound

SLICE_S = 10.0  # a session in use for so long goes to who waits for one
IDLE_S = 2.0  # likewise one whose open stream said nothing for so long after its first round
SHORT_IDLE_S, IDLE_GAPS = 0.2, 3.0  # later: for that long, for so many of its longest pauses, and for `cost_s`
SLICE_COSTS = 20.0  # but none within this many times what it took to read the last one: changing costs a twentieth
NOBODY = Caller()


@dataclass
class Session:
    """One text that is being generated.

    tokens: the context after the last round. cache: its keys and values, perhaps followed by tree nodes.
    state: what the draft worker knows about them (`draft.DraftState`). hidden: the target's hidden states that it was
    sent (`states.ReceivedStates`). held: the stream that opened it is open. peer:
    whose it is. opened: when. cost_s: what its first round took, the whole context. pause_s: the longest between
    rounds.
    """

    cache: KVCache
    tokens: list[int] = field(default_factory=list)
    state: Any = None
    hidden: Any = None
    last_round: int = 0
    last_request: bytes = b""
    last_reply: Any = None
    last_used: float = 0.0
    users: int = 0  # calls that hold or wait for this session, which is not taken from them
    held: bool = False
    peer: Peer = field(default_factory=Peer)
    opened: float = 0.0
    cost_s: float = 0.0
    pause_s: float | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def idle_limit_s(self) -> float:
        """Silence after which it goes to who waits: no pause as its client makes them, and no less than is lost."""
        if self.pause_s is None:
            return IDLE_S
        return max(SHORT_IDLE_S, IDLE_GAPS * self.pause_s, self.cost_s)

    def roll_back(self, context: Sequence[int], prefix_length: int) -> None:
        """Hold no more than the first `prefix_length` tokens of a context, and never its last: that one is computed."""
        self.cache.rollback(min(self.cache.length, prefix_length, len(context) - 1))
        self.tokens = list(context[: self.cache.length])  # true even if the pass that follows fails

    def replay(self, round_number: int, request: bytes) -> Any:
        """The reply already given to the same request, or None when the round is new.

        Raises StaleRound when the round is over and the request differs.
        """
        if round_number > self.last_round:
            return None
        if round_number == self.last_round and request == self.last_request:
            return self.last_reply
        raise StaleRound(
            f"round {round_number} is over: this session has answered round {self.last_round}. Send the next round."
        )

    def remember(self, round_number: int, request: bytes, reply: Any) -> None:
        self.last_round, self.last_request, self.last_reply = round_number, request, reply

    def context_for(self, context: pb.Context) -> list[int]:
        """The full context of a request. Raises SessionLost when this session does not hold its prefix."""
        prefix = self.tokens[: context.prefix_length]
        if context.prefix_length > len(self.tokens) or context.prefix_crc32 != tokens_crc32(prefix):
            raise SessionLost(
                f"this session holds {len(self.tokens)} tokens and not the prefix of {context.prefix_length} that "
                f"the request builds on; send the full context with prefix_length 0"
            )
        return [*prefix, *context.new_tokens]


class SessionStore:
    """Sessions by owner and id: at most `limit`, each with a cache; no more caches are ever made.

    A session is in use while a call works with it and while the stream that opened it is open. Others are idle: they
    are dropped after `ttl_s` seconds, or earlier, the least recently used first, when their cache is needed. When all
    are in use a new one waits in line. Sessions in use stay, but for two kinds that make room for who waits: one that
    was in use for `slice_s` seconds, and one whose stream has been silent for longer than it ever was. So every client
    gets on, and a silent or greedy one keeps nobody out. Who takes over has its whole text read, for which all others
    wait; so the next one is not before SLICE_COSTS times as long. owner: who may use a session, where clients can be
    told apart; for everybody else it does not exist.
    """

    def __init__(
        self,
        new_cache: Callable[[], KVCache],
        *,
        limit: int,
        ttl_s: float,
        slice_s: float = SLICE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._new_cache = new_cache
        self._limit = limit
        self._ttl_s = ttl_s
        self._slice_s = slice_s
        self._clock = clock
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._spare: list[KVCache] = []  # caches of ended sessions, to be used again
        self._made = 0  # caches, including those of ended sessions that a call still uses
        self._lock = threading.Lock()
        self._line = Line(self._lock)

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def open(self) -> int:
        """Sessions whose stream is open."""
        with self._lock:
            return sum(session.held for session in self._sessions.values())

    @property
    def cache_bytes(self) -> int:
        """Memory reserved for caches."""
        with self._lock:
            caches = [*self._spare, *(session.cache for session in self._sessions.values())]
        return sum(cache.nbytes() for cache in caches)

    @contextmanager
    def use(self, context: pb.Context, caller: Caller = NOBODY, *, new: bool = True) -> Iterator[Session]:
        """The session of a request, locked. A request with prefix_length 0 opens it if needed and `new`.

        While it waits for one, the caller gives its place to others. Raises SessionLost, Busy and Abandoned.
        """
        key = caller.owner + context.session_id
        with self._lock:
            session = self._find(key)
            # Who asks for its next round gives way here: between two rounds there may be no time for others to look.
            if session is not None and self._line and self._who_leaves(self._line.first) == key:
                self._drop(key)
                self._line.wake()
                session = None
            if session is None and (context.prefix_length or not new):
                full = self._line or (not self._spare and self._made == self._limit)
                raise SessionLost(
                    f"this worker does not know the session ({ALL_TAKEN if full else 'restarted or evicted'}); "
                    "send the full context with prefix_length 0"
                )
            if session is None and not self._line:
                session = self._open(key, caller)
            if session is None:
                caller.rest("waits")
                session = self._line.get(
                    caller,
                    lambda: self._open(key, caller),
                    caller.session_wait_s,
                    busy=f"{counted(self._limit, 'session is', 'sessions are')} in use; "
                    "raise max_sessions where memory allows",
                )
            self._sessions.move_to_end(key)
            if session.last_round and not session.users:
                session.pause_s = max(session.pause_s or 0.0, self._clock() - session.last_used)
            session.users += 1
            session.held = session.held or caller.holds
        try:
            caller.work()
            with session.lock:
                yield session
        finally:
            with self._lock:
                session.users -= 1
                session.last_used = self._clock()
                ended = self._sessions.get(key) is not session
                if not session.users and ended:
                    self._spare.append(session.cache)
                if not session.users and (ended or not session.held):
                    self._line.wake()

    def end(self, session_id: str, owner: str = "") -> bool:
        """Drop a session; False when it was not there."""
        with self._lock:
            there = owner + session_id in self._sessions
            if there:
                self._drop(owner + session_id)
                self._line.wake()
            return there

    def _find(self, key: str) -> Session | None:
        self._expire()
        return self._sessions.get(key)

    def _open(self, key: str, caller: Caller) -> Session | None:
        """The session, opened unless it is there by now; None when there is no cache for it."""
        if (session := self._find(key)) is not None:
            return session
        if not self._spare and self._made < self._limit:
            self._spare.append(self._new_cache())
            self._made += 1
        if not self._spare and (leaves := self._who_leaves(caller)) is not None:
            self._drop(leaves)
        if not self._spare:
            return None
        cache, now = self._spare.pop(), self._clock()
        cache.rollback(0)
        session = self._sessions[key] = Session(cache, last_used=now, opened=now, peer=caller.peer)
        self._line.shares.add(caller.peer)
        return session

    def _who_leaves(self, caller: Caller) -> str | None:
        """The session idle for longest; else one that had its time, of who has most, and no less than the caller."""
        free = {key: session for key, session in self._sessions.items() if not session.users}
        for key, session in free.items():
            if not session.held:
                return key
        now, own, shares = self._clock(), self._line.shares.of(caller.peer), self._line.shares
        sessions = self._sessions.values()
        settled = max((session.opened + SLICE_COSTS * session.cost_s for session in sessions), default=now) <= now
        settled = settled and not any(session.users and not session.cost_s for session in sessions)  # being read
        had_their_time = {
            key: shares.of(session.peer)
            for key, session in free.items()
            if shares.of(session.peer) >= own
            and (now - session.last_used >= session.idle_limit_s or (settled and now - session.opened >= self._slice_s))
        }
        # Of equals the one used least recently, which comes first.
        return max(had_their_time, key=had_their_time.__getitem__, default=None)

    def _drop(self, key: str) -> None:
        session = self._sessions.pop(key)
        self._line.shares.add(session.peer, -1)
        if not session.users:
            self._spare.append(session.cache)

    def _expire(self) -> None:
        horizon = self._clock() - self._ttl_s
        for key in [k for k, s in self._sessions.items() if not s.users and s.last_used < horizon]:
            self._drop(key)
