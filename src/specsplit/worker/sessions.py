"""A worker's sessions: tokens, their cache and the last reply of each, under an LRU limit and a TTL."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from specsplit.engines.kv_cache import KVCache
from specsplit.rpc.codec import tokens_crc32
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.worker.refusals import Busy, SessionLost, StaleRound

BUSY_WAIT_S = 0.25  # wait for a busy session: one whose text ended may still be in a pass


@dataclass
class Session:
    """One text that is being generated.

    tokens: the context after the last round. cache: its keys and values, perhaps followed by tree nodes.
    state: what the draft worker knows about them (`draft.DraftState`).
    """

    cache: KVCache
    tokens: list[int] = field(default_factory=list)
    state: Any = None
    last_round: int = 0
    last_request: bytes = b""
    last_reply: Any = None
    last_used: float = 0.0
    users: int = 0  # calls that hold or wait for this session, which is not evicted meanwhile
    lock: threading.Lock = field(default_factory=threading.Lock)

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

    An idle session is dropped after `ttl_s` seconds, or earlier, the least recently used first, when its cache is
    needed. A new session waits up to `busy_wait_s` seconds for a cache. owner: who may use a session, where clients can
    be told apart; for everybody else it does not exist.
    """

    def __init__(
        self,
        new_cache: Callable[[], KVCache],
        *,
        limit: int,
        ttl_s: float,
        busy_wait_s: float = BUSY_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._new_cache = new_cache
        self._limit = limit
        self._ttl_s = ttl_s
        self._busy_wait_s = busy_wait_s
        self._clock = clock
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._spare: list[KVCache] = []  # caches of ended sessions, to be used again
        self._made = 0  # caches, including those of ended sessions that a call still uses
        self._lock = threading.Condition()

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def cache_bytes(self) -> int:
        """Memory reserved for caches."""
        with self._lock:
            caches = [*self._spare, *(session.cache for session in self._sessions.values())]
        return sum(cache.nbytes() for cache in caches)

    @contextmanager
    def use(self, context: pb.Context, owner: str = "") -> Iterator[Session]:
        """The session of a request, locked. A request with prefix_length 0 opens it if needed."""
        key = owner + context.session_id
        with self._lock:
            session = self._find(key, new=not context.prefix_length)
            self._sessions.move_to_end(key)
            session.users += 1
        try:
            with session.lock:
                yield session
        finally:
            with self._lock:
                session.users -= 1
                session.last_used = self._clock()
                if not session.users:
                    if self._sessions.get(key) is not session:  # ended meanwhile
                        self._spare.append(session.cache)
                    self._lock.notify_all()

    def end(self, session_id: str, owner: str = "") -> bool:
        """Drop a session; False when it was not there."""
        with self._lock:
            session = self._sessions.pop(owner + session_id, None)
            if session is not None and not session.users:
                self._spare.append(session.cache)
                self._lock.notify_all()
            return session is not None

    def _find(self, key: str, *, new: bool) -> Session:
        """The session, opened if `new`: then a busy session gets `busy_wait_s` to free its cache."""
        deadline = time.monotonic() + self._busy_wait_s
        while True:
            self._expire()
            if (session := self._sessions.get(key)) is not None:
                return session
            if not new:
                raise SessionLost(
                    "this worker does not know the session (restarted or evicted); "
                    "send the full context with prefix_length 0"
                )
            if (cache := self._free_cache()) is not None:
                cache.rollback(0)
                session = self._sessions[key] = Session(cache, last_used=self._clock())
                return session
            if (left := deadline - time.monotonic()) <= 0:
                raise Busy(f"all {self._limit} sessions are in use; try again later or raise max_sessions")
            self._lock.wait(left)

    def _free_cache(self) -> KVCache | None:
        """A spare cache, a new one, or that of the session idle for longest; None when all are busy."""
        if self._spare:
            return self._spare.pop()
        if self._made < self._limit:
            cache = self._new_cache()
            self._made += 1
            return cache
        idle = next((key for key, session in self._sessions.items() if not session.users), None)
        return None if idle is None else self._sessions.pop(idle).cache

    def _expire(self) -> None:
        horizon = self._clock() - self._ttl_s
        for key in [k for k, s in self._sessions.items() if not s.users and s.last_used < horizon]:
            self._spare.append(self._sessions.pop(key).cache)
