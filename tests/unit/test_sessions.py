"""Sessions of a worker: who is kept, who goes, and what a request must agree with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from specsplit.engines.kv_cache import KVCache
from specsplit.rpc.codec import tokens_crc32
from specsplit.rpc.statuses import ALL_TAKEN
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.worker import calls
from specsplit.worker.calls import Caller, Peer, Places
from specsplit.worker.refusals import Busy, LimitReached, SessionLost, StaleRound
from specsplit.worker.sessions import Session, SessionStore

from waiting import wait_until

A, B = Peer("a", "1", "1:1"), Peer("b", "2", "2:1")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_store(clock: Clock) -> Callable[..., SessionStore]:
    def make(limit: int = 2, ttl_s: float = 60.0) -> SessionStore:
        return SessionStore(lambda: KVCache(1, 16), limit=limit, ttl_s=ttl_s, clock=clock)

    return make


def opening(session_id: str) -> pb.Context:
    return pb.Context(session_id=session_id, round=1, new_tokens=[1])


def touch(store: SessionStore, *session_ids: str) -> None:
    for session_id in session_ids:
        with store.use(opening(session_id)):
            pass


def known(store: SessionStore, session_id: str) -> bool:
    try:
        with store.use(pb.Context(session_id=session_id, round=2, prefix_length=1, new_tokens=[1])):
            return True
    except SessionLost:
        return False


def test_a_session_is_found_again(make_store: Callable[..., SessionStore]) -> None:
    store = make_store()
    with store.use(opening("a")) as first:
        first.tokens = [1, 2, 3]
    with store.use(pb.Context(session_id="a", round=2, prefix_length=3, new_tokens=[4])) as again:
        assert again is first
    assert len(store) == 1


def test_an_unknown_session_is_opened_only_for_a_whole_context(make_store: Callable[..., SessionStore]) -> None:
    store = make_store()
    continued = pb.Context(session_id="a", round=7, prefix_length=3, new_tokens=[4])
    with pytest.raises(SessionLost, match=r"does not know the session.*prefix_length 0"), store.use(continued):
        pass
    assert len(store) == 0


# ---- who goes


def test_the_least_recently_used_session_goes_first(make_store: Callable[..., SessionStore]) -> None:
    store = make_store(limit=2)
    touch(store, "a", "b", "a", "c")
    assert len(store) == 2
    assert known(store, "a")
    assert known(store, "c")
    assert not known(store, "b")


def test_a_busy_session_is_never_evicted(make_store: Callable[..., SessionStore]) -> None:
    store = make_store(limit=2)
    with store.use(opening("busy")):
        touch(store, "idle", "new")
        assert not known(store, "idle")
    assert known(store, "busy")
    assert known(store, "new")


def test_when_all_sessions_are_busy_a_new_one_is_refused(make_store: Callable[..., SessionStore]) -> None:
    store = make_store(limit=2)
    with store.use(opening("a")), store.use(opening("b")):
        with pytest.raises(LimitReached, match="2 sessions are in use"), store.use(opening("c")):
            pass
        assert len(store) == 2
    touch(store, "c")
    assert known(store, "c")


def hold(store: SessionStore, session_id: str, peer: Peer = A, rounds: int = 1, cost_s: float = 1e-3) -> None:
    """A round, or more, of a stream that stays open. cost_s: of the first one."""
    for number in range(1, rounds + 1):
        with store.use(opening(session_id), Caller(peer=peer, holds=True, session_wait_s=0.05)) as session:
            session.remember(number, b"", None)
            session.cost_s = session.cost_s or cost_s


# While somebody waits: (seconds that the session was held, of these in silence, what reading its context took, its
# longest pause), and whether it goes to who waits. The next case is one line.
@pytest.mark.parametrize(
    ("held_s", "silent_s", "cost_s", "pause_s", "goes"),
    [
        (1.0, 1.0, 0.0, None, False),
        (1.9, 1.9, 0.0, None, False),
        (2.1, 2.1, 0.0, None, True),  # silent after its first round
        (9.9, 0.1, 0.0, 0.1, False),
        (10.1, 0.0, 0.0, 0.1, True),  # had its time
        (10.1, 0.0, 1.0, 0.1, False),  # but not soon after a context was read that cost much
        (20.1, 0.0, 1.0, 0.1, True),
        (5.0, 0.25, 0.0, 0.01, True),  # silent for longer than it ever was
        (5.0, 0.25, 0.0, 0.1, False),
        (5.0, 0.25, 0.5, 0.01, False),  # but for less than it would cost
        (5.0, 0.6, 0.5, 0.01, True),
    ],
)
def test_a_session_in_use_goes_to_who_waits_once_it_had_its_time_or_is_silent(
    make_store: Callable[..., SessionStore],
    clock: Clock,
    held_s: float,
    silent_s: float,
    cost_s: float,
    pause_s: float | None,
    goes: bool,
) -> None:
    store = make_store(limit=1)
    hold(store, "a")
    clock.now += held_s - silent_s
    session = store._sessions["a"]
    session.last_used, session.cost_s, session.pause_s = clock.now, cost_s, pause_s
    clock.now += silent_s
    if goes:
        hold(store, "b")
        assert not known(store, "a")
    else:
        with pytest.raises(Busy, match=r"1 session is in use; .*waited 0.05 s in line"):
            hold(store, "b")
        assert known(store, "a")


def test_sessions_change_hands_so_seldom_that_reading_anew_costs_a_twentieth(
    make_store: Callable[..., SessionStore], clock: Clock
) -> None:
    store = make_store(limit=2)
    hold(store, "a", cost_s=0.5)
    hold(store, "b", cost_s=0.5)
    clock.now += 11
    hold(store, "c", cost_s=0.5)  # all read the context of this one
    assert not known(store, "a")
    for passed_s in (5.0, 4.9):  # in which others go on
        clock.now += passed_s
        assert known(store, "b")
        assert known(store, "c")
        with pytest.raises(Busy):
            hold(store, "d")
    clock.now += 0.2
    hold(store, "d")
    assert (known(store, "b"), known(store, "c")) == (False, True)


def test_no_session_changes_hands_while_a_context_is_read(
    make_store: Callable[..., SessionStore], clock: Clock
) -> None:
    store = make_store(limit=2)
    hold(store, "a")
    clock.now += 11
    assert known(store, "a")
    with store.use(opening("b"), Caller(peer=A, holds=True)), pytest.raises(Busy):
        hold(store, "c")
    assert known(store, "a")


def test_who_had_its_time_gives_way_when_it_asks_for_its_next_round(
    make_store: Callable[..., SessionStore], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "POLL_S", 60.0)
    store = make_store(limit=1)
    hold(store, "a")
    waiting = threading.Thread(target=lambda: hold_long(store, "b"))
    waiting.start()
    assert wait_until(lambda: len(store._line) == 1)
    assert known(store, "a")
    clock.now += 11
    assert not known(store, "a")
    waiting.join(10)
    assert known(store, "b")
    with pytest.raises(SessionLost, match=ALL_TAKEN):
        store.use(opening("a"), new=False).__enter__()


def hold_long(store: SessionStore, session_id: str) -> None:
    with store.use(opening(session_id), Caller(peer=A, holds=True, session_wait_s=30)):
        pass


def test_nobody_has_to_go_while_nobody_waits(make_store: Callable[..., SessionStore], clock: Clock) -> None:
    store = make_store(limit=2)
    hold(store, "a")
    clock.now += 50  # and the time to live is 60
    hold(store, "b")
    assert known(store, "a")


def test_an_idle_session_goes_before_one_in_use(make_store: Callable[..., SessionStore], clock: Clock) -> None:
    store = make_store(limit=2)
    hold(store, "a")
    touch(store, "b")
    clock.now += 50
    touch(store, "c")
    assert (known(store, "a"), known(store, "b")) == (True, False)


def test_who_has_most_has_to_go_and_never_for_who_has_more(
    make_store: Callable[..., SessionStore], clock: Clock
) -> None:
    store = make_store(limit=3)
    hold(store, "b1", B)
    hold(store, "a1", A)
    hold(store, "a2", A)
    clock.now += 3
    hold(store, "b2", B)  # a has more
    assert (known(store, "b1"), known(store, "a1")) == (True, False)
    clock.now += 3
    with (
        store.use(opening("a2"), Caller(peer=A, holds=True)),
        store.use(opening("b1"), Caller(peer=B, holds=True)),
        store.use(opening("b2"), Caller(peer=B)),
        pytest.raises(Busy),
    ):
        hold(store, "a3", A)  # calls work with all of them


def test_a_greedy_client_takes_nothing_from_one_that_has_less(
    make_store: Callable[..., SessionStore], clock: Clock
) -> None:
    store = make_store(limit=3)
    hold(store, "b1", B)
    clock.now += 20
    hold(store, "a1", A)
    hold(store, "a2", A)
    with pytest.raises(Busy):
        hold(store, "a3", A)
    assert known(store, "b1")


def test_a_place_is_given_away_while_a_session_is_waited_for(make_store: Callable[..., SessionStore]) -> None:
    store, places = make_store(limit=1), Places(1)
    caller = Caller(peer=A, holds=True, session_wait_s=30, places=places)
    caller.work()
    with store.use(opening("a"), Caller(peer=B)):
        thread = threading.Thread(target=lambda: store.use(opening("b"), caller).__enter__())
        thread.start()
        assert wait_until(lambda: len(store._line) == 1)
        assert places._taken == 0
    thread.join(10)
    assert places._taken == 1


def test_an_idle_session_expires(make_store: Callable[..., SessionStore], clock: Clock) -> None:
    store = make_store(ttl_s=60)
    touch(store, "a")
    clock.now += 60
    assert known(store, "a")
    clock.now += 60.1
    assert not known(store, "a")
    assert len(store) == 0


def test_the_idle_time_counts_from_the_end_of_the_last_call(
    make_store: Callable[..., SessionStore], clock: Clock
) -> None:
    store = make_store(ttl_s=60)
    with store.use(opening("long")):
        clock.now += 500  # longer than the TTL, while the call runs
        touch(store, "other")
    clock.now += 59
    assert known(store, "long")


# ---- caches


def test_the_cache_of_an_ended_session_is_used_again_and_empty(make_store: Callable[..., SessionStore]) -> None:
    store = make_store()
    with store.use(opening("a")) as first:
        first.cache.advance(9)
    assert store.end("a")
    with store.use(opening("b")) as second:
        assert second.cache is first.cache
        assert second.cache.length == 0
        assert second.tokens == []


def test_the_cache_of_a_session_ended_during_a_call_is_not_given_away(
    make_store: Callable[..., SessionStore],
) -> None:
    store = make_store()
    with store.use(opening("a")) as first:
        assert store.end("a")
        with store.use(opening("b")) as second:
            assert second.cache is not first.cache


@pytest.mark.parametrize("how", ["evicted", "expired"])
def test_the_caches_of_lost_sessions_are_used_again(
    make_store: Callable[..., SessionStore], clock: Clock, how: str
) -> None:
    store = make_store(limit=1)
    with store.use(opening("a")) as first:
        pass
    clock.now += 61 if how == "expired" else 0
    with store.use(opening("b")) as second:
        assert second.cache is first.cache


def test_ending_an_unknown_session_is_no_error(make_store: Callable[..., SessionStore]) -> None:
    assert make_store().end("nobody") is False


# ---- calls at the same time


def test_calls_of_one_session_run_one_after_the_other(make_store: Callable[..., SessionStore]) -> None:
    store = make_store(limit=1)
    order: list[str] = []
    release = threading.Event()

    def second_call() -> None:
        with store.use(opening("a")):
            order.append("second")

    with store.use(opening("a")) as session:
        thread = threading.Thread(target=second_call)
        thread.start()
        deadline = time.monotonic() + 10
        while session.users < 2 and time.monotonic() < deadline:
            release.wait(0.005)
        assert session.users == 2  # it waits, and counts as a user: the session cannot be evicted
        assert order == []
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert session.users == 0


def test_a_failing_call_frees_the_session(make_store: Callable[..., SessionStore]) -> None:
    store = make_store(limit=1)
    with pytest.raises(ZeroDivisionError), store.use(opening("a")):
        raise ZeroDivisionError
    with store.use(opening("a")) as session:
        assert session.users == 1


# ---- rounds


def test_the_same_round_gets_the_same_reply() -> None:
    session = Session(KVCache(1, 4))
    reply = pb.VerifyDraftsReply(next_token=3)
    assert session.replay(1, b"request") is None
    session.remember(1, b"request", reply)
    assert session.replay(1, b"request") is reply
    assert session.replay(2, b"request") is None


@pytest.mark.parametrize(("number", "request_bytes"), [(2, b"another"), (1, b"request"), (0, b"request")])
def test_a_round_that_is_over_is_stale(number: int, request_bytes: bytes) -> None:
    session = Session(KVCache(1, 4))
    session.remember(2, b"request", pb.VerifyDraftsReply())
    with pytest.raises(StaleRound, match=f"round {number} is over.*answered round 2"):
        session.replay(number, request_bytes)


# ---- prefixes


@pytest.mark.parametrize("kept", [0, 1, 3, 5])
def test_a_context_is_a_prefix_of_the_session_and_new_tokens(kept: int) -> None:
    held = [5, 6, 7, 8, 9]
    session = Session(KVCache(1, 16), tokens=list(held))
    context = pb.Context(prefix_length=kept, prefix_crc32=tokens_crc32(held[:kept]), new_tokens=[1, 2])
    assert session.context_for(context) == [*held[:kept], 1, 2]
    assert session.tokens == held


@pytest.mark.parametrize(
    ("length", "crc"),
    [
        pytest.param(3, tokens_crc32([5, 6, 8]), id="other tokens"),
        pytest.param(3, 0, id="no checksum"),
        pytest.param(4, tokens_crc32([5, 6, 7, 8]), id="more than it holds"),
        pytest.param(0, 1, id="checksum without a prefix"),
    ],
)
def test_another_prefix_means_that_the_session_is_lost(length: int, crc: int) -> None:
    session = Session(KVCache(1, 16), tokens=[5, 6, 7])
    context = pb.Context(prefix_length=length, prefix_crc32=crc, new_tokens=[1])
    with pytest.raises(SessionLost, match=f"holds 3 tokens and not the prefix of {length}"):
        session.context_for(context)
