"""Who is next: what is short goes to who has least, nobody is kept waiting for ever, silent calls make room."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from specsplit.worker.calls import Caller, OpenCalls, Peer, Places, Shares
from specsplit.worker.refusals import Abandoned, Busy, SessionLost

from waiting import wait_until

A, B = Peer("a", "ipv4:10.0.0.1", "ipv4:10.0.0.1:1"), Peer("b", "ipv4:10.0.0.2", "ipv4:10.0.0.2:1")
A2, A3 = Peer("a", "ipv4:10.0.0.1", "ipv4:10.0.0.1:2"), Peer("a", "ipv4:10.0.0.3", "ipv4:10.0.0.3:1")


def test_a_peer_is_read_from_what_grpc_says() -> None:
    assert Peer.of("o", "ipv4:127.0.0.1:5") == Peer("o", "ipv4:127.0.0.1", "ipv4:127.0.0.1:5")
    assert Peer.of("", "ipv6:%5B::1%5D:5").address == "ipv6:%5B::1%5D"


def test_shares_are_counted_by_token_address_and_connection() -> None:
    shares = Shares()
    for peer in (A, A, A2, A3, B):
        shares.add(peer)
    assert [shares.of(peer) for peer in (A, A2, A3, B)] == [(4, 3, 2), (4, 3, 1), (4, 1, 1), (1, 1, 1)]
    for peer in (A, A, A2, A3, B):
        shares.add(peer, -1)
    assert shares.of(A) == (0, 0, 0)
    assert not shares._counts


# Who waits, in order of arrival, while `holds` have the places; and who then gets them.
@pytest.mark.parametrize(
    ("holds", "waits", "order"),
    [
        ([A], [A, A2, A3], [0, 1, 2]),  # equals by token and address: first come, first served
        ([A, A], [A, A, B], [2, 0, 1]),  # another token that has nothing
        ([A, A], [A, A3], [1, 0]),  # another address
        ([A, A], [A, A2], [1, 0]),  # another connection
        ([A, B], [B, A, B], [0, 1, 2]),
    ],
)
def test_who_has_least_is_next(holds: list[Peer], waits: list[Peer], order: list[int]) -> None:
    places = Places(len(holds))
    holders = [Caller(peer=peer, places=places) for peer in holds]
    for caller in holders:
        caller.work()
    served: list[int] = []
    rest = threading.Semaphore(0)

    def wait(number: int) -> None:
        caller = Caller(peer=waits[number], places=places, place_wait_s=30)
        caller.work()
        served.append(number)
        rest.acquire()

    with ThreadPoolExecutor(len(waits)) as pool:
        for number in range(len(waits)):
            pool.submit(wait, number)
            assert wait_until(lambda number=number: len(places._line) == number + 1)
        first = holders[-1]
        first.rest()
        assert wait_until(lambda: len(served) == 1)
        assert served == order[:1]
        places.give(first)  # it has none: nothing happens
        time.sleep(0.02)
        assert len(served) == 1
        for _ in range(len(waits)):
            with places._lock:
                places._taken -= 1
                places._line.wake()
        assert wait_until(lambda: len(served) == len(waits))
        for _ in waits:
            rest.release()


def test_who_waits_in_vain_is_told_and_who_left_is_forgotten() -> None:
    places = Places(1)
    Caller(places=places).work()
    with pytest.raises(Busy, match=r"1 call or stream runs already .*waited 0.01 s in line"):
        Caller(places=places, place_wait_s=0.01).work()
    with pytest.raises(Abandoned):
        Caller(left=lambda: True, places=places, place_wait_s=30).work()
    assert not len(places._line)


def test_work_and_rest_may_be_said_twice() -> None:
    places = Places(1)
    one, other = Caller(places=places), Caller(places=places)
    one.work()
    one.work()
    one.rest()
    one.rest()
    other.work()
    assert places._taken == 1


# ---- calls that are open


def opened(stack: ExitStack, calls: OpenCalls, *peers: Peer, state: str = "quiet") -> list[Caller]:
    callers = []
    for peer in peers:
        caller = Caller(peer=peer)
        caller._set(state)  # type: ignore[arg-type]
        stack.enter_context(calls.open(caller))
        callers.append(caller)
    return callers


def test_of_too_many_calls_a_silent_one_of_who_has_most_is_ended() -> None:
    calls = OpenCalls(3, 60)
    with ExitStack() as stack:
        callers = opened(stack, calls, A, A, A)
        ended: list[int] = []
        for number, caller in enumerate(callers):
            caller.end = lambda number=number: ended.append(number)
        callers[0]._set("works")
        callers[1].since -= 1  # the one that is silent for longest
        opened(stack, calls, B)
        assert ended == [1]
        assert isinstance(callers[1].displaced, Busy)
        with pytest.raises(Busy, match="3 calls are open already"):
            opened(stack, calls, B)  # b would have as many as a
        assert (len(calls), ended) == (3, [1])
    assert (len(calls), calls._shares._counts) == (0, {})


def test_who_was_silent_for_long_makes_room_for_anybody() -> None:
    calls = OpenCalls(1, 60)
    with ExitStack() as stack:
        (silent,) = opened(stack, calls, B)
        with pytest.raises(Busy):
            opened(stack, calls, B)
        silent.since -= 10
        opened(stack, calls, B)
        assert silent.displaced is not None


def test_a_call_in_line_makes_room_only_for_who_has_less() -> None:
    calls = OpenCalls(2, 60)
    with ExitStack() as stack:
        first, second = opened(stack, calls, A, A, state="waits")
        for caller in (first, second):
            caller.since -= 10
        with pytest.raises(Busy):
            opened(stack, calls, A)
        opened(stack, calls, B)
        assert [caller.displaced is not None for caller in (first, second)].count(True) == 1


def test_silence_has_a_limit_and_work_has_none() -> None:
    calls = OpenCalls(9, 60)
    with ExitStack() as stack:
        quiet, fresh = opened(stack, calls, A, A)
        working, waiting = opened(stack, calls, A, state="works") + opened(stack, calls, A, state="waits")
        for caller in (quiet, working, waiting):
            caller.since -= 100
        calls.sweep()
        assert isinstance(quiet.displaced, SessionLost)
        assert not any(caller.displaced for caller in (fresh, working, waiting))
        assert len(calls) == 3
