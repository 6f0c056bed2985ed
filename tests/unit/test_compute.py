"""The one thread that runs the model."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
import torch

from specsplit.workers.compute import ModelThread


def test_one_at_a_time_in_order_and_timed() -> None:
    thread = ModelThread(1, seed=0)
    names, order, started = set(), [], threading.Event()

    def slow(i: int) -> int:
        names.add(threading.current_thread().name)
        started.set()
        time.sleep(0.02)
        order.append(i)
        return i

    with ThreadPoolExecutor(3) as callers:
        first = callers.submit(thread.run, lambda: slow(0))
        assert started.wait(10)
        second = callers.submit(thread.run, lambda: slow(1))
        assert (first.result().value, second.result().value) == (0, 1)
    assert (order, names) == ([0, 1], {"model"})
    assert second.result().queue_ms > 5
    assert all(20 <= done.result().compute_ms < 1000 for done in (first, second))
    thread.close()


def test_settings_are_those_of_the_thread() -> None:
    thread = ModelThread(1, seed=7)
    drawn = thread.run(lambda: (torch.get_num_threads(), torch.initial_seed(), torch.rand(1).item())).value
    torch.manual_seed(7)
    assert drawn == (1, 7, torch.rand(1).item())
    thread.close()


def test_what_fails_is_raised_and_the_next_runs() -> None:
    thread = ModelThread(1, seed=0)
    with pytest.raises(ZeroDivisionError):
        thread.run(lambda: 1 / 0)
    assert thread.run(lambda: 5).value == 5
    thread.close()


def test_closing_drops_what_waits_and_tells_what_runs() -> None:
    thread = ModelThread(1, seed=0)
    entered, leave = threading.Event(), threading.Event()

    def held() -> str:
        entered.set()
        leave.wait(30)
        return "done"

    with ThreadPoolExecutor(2) as callers:
        running = callers.submit(thread.run, held)
        assert entered.wait(30)
        waiting = callers.submit(thread.run, lambda: "never")
        while not thread._jobs.qsize():
            time.sleep(0.001)
        assert thread.close() is False
        leave.set()
        assert running.result(30).value == "done"
        with pytest.raises(CancelledError):
            waiting.result(30)
    with pytest.raises(CancelledError):
        thread.run(lambda: "never")
    assert thread.close() is True
