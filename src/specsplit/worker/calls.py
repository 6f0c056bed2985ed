"""Who calls, and who is next: places and sessions are shared so that no client locks out the others.

What is short goes to the caller that has least of it, first by token, then by address, then by connection, and among
equals in order of arrival. So a client that takes all that it can get waits behind one that has nothing.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from specsplit.errors import counted
from specsplit.worker.refusals import Abandoned, Busy, Refusal, SessionLost

if TYPE_CHECKING:
    from opentelemetry.context import Context

T = TypeVar("T")
State = Literal["quiet", "waits", "works"]
BUSY_WAIT_S = 0.25  # a call that does not say how long it can wait
POLL_S = 0.05  # how often the first in line looks again: time alone may have freed something
GONE_POLL_S = 1.0  # how often those behind look whether their client is still there
QUIET_S = 2.0  # a stream that said nothing for so long makes room when there are too many


class Peer(NamedTuple):
    """Where a call comes from. owner: of its token; "" where none is asked for."""

    owner: str = ""
    address: str = ""
    connection: str = ""

    @classmethod
    def of(cls, owner: str, peer: str) -> Peer:
        """peer: as gRPC names it, such as ipv4:10.0.0.7:40122."""
        return cls(owner, peer.rpartition(":")[0], peer)


class Shares:
    """How much of something every owner, address and connection has."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, ...]] = Counter()

    def add(self, peer: Peer, number: int = 1) -> None:
        for key in _keys(peer):
            self._counts[key] += number
            if not self._counts[key]:
                del self._counts[key]

    def of(self, peer: Peer) -> tuple[int, ...]:
        """By owner, address and connection; to be compared in this order."""
        return tuple(self._counts[key] for key in _keys(peer))


def _keys(peer: Peer) -> list[tuple[str, ...]]:
    return [peer[:length] for length in range(1, len(peer) + 1)]


@dataclass(eq=False)
class Caller:
    """Who a request came from, and what is done for it now.

    owner: prefix of the names of its sessions. gone: nobody waits for the answer now. parent: of its spans; None
    where there are none. place_wait_s, session_wait_s: how long it waits in line for these. holds: its session is
    in use for as long as the call is open. end: ends the call from outside. admitted: told when it has its session.
    state: `quiet`: we wait for the client; `waits`: for a place or a session; `works`. since: time.monotonic() of
    the last change of it.
    """

    owner: str = ""
    left: Callable[[], bool] = lambda: False
    parent: Context | None = None
    peer: Peer = field(default_factory=Peer)
    place_wait_s: float = BUSY_WAIT_S
    session_wait_s: float = BUSY_WAIT_S
    holds: bool = False
    end: Callable[[], None] = lambda: None
    admitted: Callable[[], None] = lambda: None
    places: Places | None = None
    state: State = "quiet"
    since: float = field(default_factory=time.monotonic)
    displaced: Refusal | None = None  # why the call was ended from outside

    def may_wait(self, context: Any, most_s: float) -> None:
        """Wait in line as long as the context of a request says, but no longer than `most_s` seconds."""
        if context.HasField("wait_ms"):
            self.place_wait_s = self.session_wait_s = min(context.wait_ms / 1e3, most_s)

    def gone(self) -> bool:
        return self.displaced is not None or self.left()

    def work(self) -> None:
        """Wait for a place, unless there is one already. Raises Busy and Abandoned."""
        if self.places is not None:
            self.places.take(self)

    def rest(self, state: State = "quiet") -> None:
        """Give the place to others."""
        if self.places is not None:
            self.places.give(self)
        self._set(state)

    def _set(self, state: State) -> None:
        self.state, self.since = state, time.monotonic()


class Line:
    """Callers that wait for something that is guarded by `lock`, and who of them is next."""

    def __init__(self, lock: Any) -> None:
        self.shares = Shares()
        self._lock = lock
        self._tickets = count()
        self._waiting: dict[int, tuple[Caller, threading.Condition]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def first(self) -> Caller:
        """Who is next; there has to be one."""
        return self._waiting[self._first()][0]

    def get(self, caller: Caller, take: Callable[[], T | None], wait_s: float, *, busy: str) -> T:
        """What `take` gives, called with the lock held, which the caller of this method holds.

        Others go first as long as they wait. Raises Busy with that message after `wait_s` seconds, Abandoned when the
        client has left.
        """
        if not self._waiting and (found := take()) is not None:
            return found
        ticket, ready = next(self._tickets), threading.Condition(self._lock)
        self._waiting[ticket] = caller, ready
        deadline = time.monotonic() + wait_s
        try:
            while True:
                first = self._first() == ticket
                if first and (found := take()) is not None:
                    return found
                if caller.gone():
                    raise Abandoned("the client is gone")
                if (left := deadline - time.monotonic()) <= 0:
                    raise Busy(f"{busy}; waited {wait_s:.3g} s in line: try again later")
                ready.wait(min(left, POLL_S if first else GONE_POLL_S))
        finally:
            del self._waiting[ticket]
            self.wake()

    def wake(self) -> None:
        """Something may be free: let the next one look."""
        if self._waiting:
            self._waiting[self._first()][1].notify()

    def _first(self) -> int:
        return min(self._waiting, key=lambda ticket: (self.shares.of(self._waiting[ticket][0].peer), ticket))


class Places:
    """Calls that are worked on at once; those that wait for their client, or for a session, have no place."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._line = Line(self._lock)
        self._taken = 0

    def take(self, caller: Caller) -> None:
        with self._lock:
            if caller.state == "works":
                return
            caller._set("waits")
            self._line.get(
                caller,
                lambda: True if self._taken < self._limit else None,
                caller.place_wait_s,
                busy=f"{counted(self._limit, 'call or stream runs', 'calls and streams run')} already (max_calls)",
            )
            self._taken += 1
            self._line.shares.add(caller.peer)
            caller._set("works")

    def give(self, caller: Caller) -> None:
        with self._lock:
            if caller.state != "works":
                return
            caller._set("quiet")
            self._taken -= 1
            self._line.shares.add(caller.peer, -1)
            self._line.wake()


class OpenCalls:
    """Calls that are open, in whatever state; each takes threads of ours, so there are at most `limit`.

    When there are too many, one that said nothing for QUIET_S, or one that does not work and whose peer has more than
    the new one's, is ended. idle_s: one that says nothing for so long is ended in any case (`sweep`).
    """

    def __init__(self, limit: int, idle_s: float) -> None:
        self._limit, self._idle_s = limit, idle_s
        self._lock = threading.Lock()
        self._shares = Shares()
        self._calls: list[Caller] = []

    def __len__(self) -> int:
        return len(self._calls)

    @contextmanager
    def open(self, caller: Caller) -> Iterator[None]:
        """Count a call in. Raises Busy when there is no room."""
        with self._lock:
            self._calls.append(caller)
            self._shares.add(caller.peer)
            victim = self._in_the_way(caller) if len(self._calls) > self._limit else None
            if len(self._calls) > self._limit:
                self._remove(victim or caller)
        full = f"{counted(self._limit, 'call is', 'calls are')} open"
        if victim is not None:
            _displace(victim, Busy(f"{full}, and this one does nothing; open it again"))
        elif caller not in self._calls:
            raise Busy(f"{full} already; try again later")
        try:
            yield
        finally:
            with self._lock:
                if caller in self._calls:
                    self._remove(caller)

    def sweep(self) -> None:
        """End calls that have said nothing for too long."""
        horizon = time.monotonic() - self._idle_s
        with self._lock:
            idle = [caller for caller in self._calls if caller.state == "quiet" and caller.since < horizon]
            for caller in idle:
                self._remove(caller)
        for caller in idle:
            _displace(caller, SessionLost(f"nothing came for {self._idle_s:g} s; send the full context with a new one"))

    def _in_the_way(self, newcomer: Caller) -> Caller | None:
        now, own = time.monotonic(), self._shares.of(newcomer.peer)
        found = []
        for number, caller in enumerate(self._calls):
            share, idle_s = self._shares.of(caller.peer), now - caller.since
            silent = caller.state == "quiet" and idle_s > QUIET_S
            if caller.state != "works" and caller is not newcomer and (share > own or silent):
                found.append((share, idle_s, number))
        return self._calls[max(found)[2]] if found else None

    def _remove(self, caller: Caller) -> None:
        self._calls.remove(caller)
        self._shares.add(caller.peer, -1)


def _displace(caller: Caller, why: Refusal) -> None:
    caller.displaced = why
    caller.end()
