"""One thread runs the model: each pass serves every session that is waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from specsplit.decoding.sampling import GREEDY
from specsplit.decoding.tree import TokenTree
from specsplit.engines.cuda_graphs import GraphLM
from specsplit.engines.gpu import GpuLM
from specsplit.engines.numba import FusedLM
from specsplit.engines.passes import Pass, Propose
from specsplit.engines.synthetic import SyntheticLM
from specsplit.engines.transformers import CausalLM
from specsplit.worker import batching
from specsplit.worker.batching import MAX_SKIPPED_WAITS, SharedModel
from specsplit.worker.refusals import Abandoned, Stopped

from tiny_models import make_tiny_model


class Held(SyntheticLM):
    """Notes which passes were run together, and waits in the first until `leave` is set."""

    def __init__(self, **settings: float) -> None:
        super().__init__(**settings)
        self.together: list[list[int]] = []
        self.entered, self.leave = threading.Event(), threading.Event()

    def step_many(self, passes: Sequence[Pass]) -> list[torch.Tensor]:
        self.together.append([p.size for p in passes])
        self.entered.set()
        self.leave.wait(30)
        if any(90 in p.tokens for p in passes):
            raise ZeroDivisionError("a token that breaks the pass")
        return super().step_many(passes)


@pytest.mark.parametrize("steps", range(6))
def test_a_chain_that_pauses_goes_on_as_it_would_have(steps: int) -> None:
    model = FusedLM(CausalLM(make_tiny_model("llama")), 1)
    whole = model.step_many([Pass(model.new_cache(64), [5, 6], then=Propose(GREEDY, model.vocab_size, steps=5))])[0]
    cache, asked = model.new_cache(64), iter(range(6))
    first = Propose(GREEDY, model.vocab_size, steps=5)
    found = model.step_many([Pass(cache, [5, 6], then=first, pause=lambda: next(asked) == steps)])[0]
    assert (len(found), cache.length) == (1 + steps, 2 + steps)
    for _ in range(5 - steps):
        then = Propose(GREEDY, model.vocab_size)
        found += model.step_many([Pass(cache, [found[-1][0].token_ids[0]], then=then)])[0]
    assert found == whole


def test_a_chain_makes_way_for_who_waits() -> None:
    model = FusedLM(CausalLM(make_tiny_model("llama")), 1)
    sizes: list[list[int]] = []
    run, inside, leave = model.step_many, threading.Event(), threading.Event()

    def noted(passes: Sequence[Pass]) -> list[Any]:
        sizes.append([p.steps for p in passes])
        inside.set()
        leave.wait(30)
        return run(passes)

    model.step_many = noted  # type: ignore[method-assign]
    shared = SharedModel(model, 1, seed=0)

    def draft(first: int) -> int:
        return len(shared.step(model.new_cache(64), [first], then=Propose(GREEDY, model.vocab_size, steps=9)))

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(draft, 5)
        inside.wait(30)
        two = pool.submit(draft, 6)
        wait_for(shared, 1)
        leave.set()
        assert (one.result(30), two.result(30)) == (1, 10)
    assert sizes == [[9], [9]]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_failed_outside_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = SharedModel(SyntheticLM(vocab_size=256), 1, seed=0)

    def fail(_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(shared, "_run_pass", fail)
    for _ in range(2):
        with pytest.raises(Stopped):
            shared.step(shared.new_cache(8), [5])


def wait_for(shared: SharedModel, count: int) -> None:
    while shared.waiting < count:
        time.sleep(0.001)


def alone(tokens: Sequence[int]) -> torch.Tensor:
    model = SyntheticLM()
    return model.step(model.new_cache(64), tokens)


def test_passes_that_wait_are_run_as_one() -> None:
    model = Held()
    shared = SharedModel(model, 1, seed=0)
    texts = [[40 + i] * (i + 1) for i in range(5)]

    def ask(tokens: list[int]) -> tuple[torch.Tensor, float, float]:
        with shared.timed() as watch:
            logits = shared.step(shared.new_cache(64), tokens)
        return logits, watch.queue_ms, watch.compute_ms

    with ThreadPoolExecutor(5) as callers:
        first = callers.submit(ask, texts[0])
        assert model.entered.wait(10)
        others = []
        for i, tokens in enumerate(texts[1:], 1):
            others.append(callers.submit(ask, tokens))
            wait_for(shared, i)
        time.sleep(0.02)
        model.leave.set()
        results = [future.result(30) for future in (first, *others)]
    assert model.together == [[1], [2, 3, 4, 5]]
    assert all(torch.equal(logits, alone(tokens)) for (logits, _, _), tokens in zip(results, texts, strict=True))
    assert results[0][1] < 20 <= results[0][2]  # the first did not wait, but computed
    assert all(queued > 15 for _, queued, _ in results[1:])


def test_sessions_that_return_in_a_moment_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "RETURN_WAIT", 2.0)  # a moment, on a machine that is busy with other tests
    model = Held(step_ms=50)
    shared = SharedModel(model, 1, seed=0)

    def write(token: int) -> list[torch.Tensor]:
        cache = shared.new_cache(64)
        return [shared.step(cache, [token]) for _ in range(8)]

    with ThreadPoolExecutor(2) as callers:
        first = callers.submit(write, 40)
        assert model.entered.wait(10)
        second = callers.submit(write, 41)  # would always come when the other one has just begun
        wait_for(shared, 1)
        model.leave.set()
        texts = [first.result(30), second.result(30)]
    assert model.together.count([1, 1]) >= 4
    for token, text in zip((40, 41), texts, strict=True):
        assert all(torch.equal(logits, alone([token] * (i + 1))) for i, logits in enumerate(text))


def test_sessions_that_never_return_soon_are_not_waited_for_any_more() -> None:
    shared = SharedModel(SyntheticLM(step_ms=0.5), 1, seed=0)
    caches = [shared.new_cache(256) for _ in range(2)]
    for i in range(400):
        shared.step(caches[i % 2], [40])
    assert shared._skips == MAX_SKIPPED_WAITS


def test_a_pass_that_fails_fails_alone() -> None:
    model = Held()
    shared = SharedModel(model, 1, seed=0)
    caches = [shared.new_cache(64) for _ in range(4)]
    with ThreadPoolExecutor(4) as callers:
        first = callers.submit(shared.step, caches[0], [40])
        assert model.entered.wait(10)
        rest = []
        for i, token in enumerate((41, 90, 43), 1):
            rest.append(callers.submit(shared.step, caches[i], [token]))
            wait_for(shared, i)
        model.leave.set()
        assert torch.equal(first.result(30), alone([40]))
        assert torch.equal(rest[0].result(30), alone([41]))
        assert torch.equal(rest[2].result(30), alone([43]))
        with pytest.raises(ZeroDivisionError):
            rest[1].result(30)
    assert [cache.length for cache in caches] == [1, 1, 0, 1]
    assert model.together == [[1], [1, 1, 1], [1], [1], [1]]


def test_a_long_prompt_takes_turns_with_others_and_is_undone_when_it_fails() -> None:
    model = Held()
    model.batch_tokens = 4
    model.leave.set()
    shared = SharedModel(model, 1, seed=0)
    cache = shared.new_cache(64)
    tokens = list(range(40, 50))
    tree = TokenTree([5, 6], [-1, 0], [-1.0] * 2)
    whole = SyntheticLM()
    expected = whole.step(whole.new_cache(64), tokens, tree)
    assert torch.equal(shared.step(cache, tokens, tree), expected)
    assert model.together == [[4], [4], [4]]
    with pytest.raises(ZeroDivisionError):
        shared.step(cache, [41, 42, 43, 44, 90])
    assert cache.length == 12


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("batch_tokens", [0, 4])
def test_between_two_tokens_of_a_text_there_is_one_part_of_a_prompt(batch_tokens: int, prompts: int) -> None:
    class Slow(SyntheticLM):
        """Notes whose passes were run; sessions are told apart by their first token."""

        prefill_tokens = 4

        def step_many(self, passes: Sequence[Pass]) -> list[torch.Tensor]:
            ran.append([p.tokens[0] for p in passes])
            return super().step_many(passes)

    ran: list[list[int]] = []
    model = Slow(step_ms=5)
    model.batch_tokens = batch_tokens
    shared = SharedModel(model, 1, seed=0)
    texts, over = [100, 101], threading.Event()

    def write(token: int) -> None:
        cache = shared.new_cache(4096)
        while not over.is_set():
            shared.step(cache, [token])

    with ThreadPoolExecutor(8) as callers:
        for token in texts:
            callers.submit(write, token)
        time.sleep(0.05)
        long = [callers.submit(shared.step, shared.new_cache(256), [50 + i] * 120) for i in range(prompts)]
        for future in long:
            future.result(60)
        over.set()
    began = next(i for i, each in enumerate(ran) if min(each) < 100)
    ended = max(i for i, each in enumerate(ran) if min(each) < 100)
    for token in texts:
        parts = 0
        for each in ran[began:ended]:
            parts = 0 if token in each else parts + (min(each) < 100)
            assert parts <= 2
    assert sum(min(each) < 100 for each in ran) >= prompts * 30


@pytest.mark.parametrize("engine", ["transformers", "graphs", "gpu", "fused"])
def test_a_prompt_is_abandoned_between_its_parts_and_its_parts_do_not_depend_on_load(engine: str) -> None:
    causal = CausalLM(make_tiny_model("llama"))
    model = {
        "transformers": lambda: causal,
        "graphs": lambda: GraphLM(causal.model),
        "gpu": lambda: GpuLM(causal),
        "fused": lambda: FusedLM(causal, 1),
    }
    lm = model[engine]()
    prompt = [5 + i % 90 for i in range(2 * lm.prefill_tokens + 9)]
    expected = lm.step(lm.new_cache(512), prompt)
    passes: list[int] = []
    step_many = lm.step_many
    lm.step_many = lambda work: (passes.extend(p.size for p in work), step_many(work))[1]
    shared = SharedModel(lm, 1, seed=0)
    assert torch.equal(shared.step(shared.new_cache(512), prompt), expected)
    assert passes == [lm.prefill_tokens, lm.prefill_tokens, 9]
    cache = shared.new_cache(512)
    with shared.timed(lambda: len(passes) > 3), pytest.raises(Abandoned):
        shared.step(cache, prompt)
    assert len(passes) == 4  # one part, and then nobody waits for it
    assert cache.length == 0


def test_requests_are_served_in_the_order_of_arrival() -> None:
    model = Held()
    model.batch_tokens = 4
    shared = SharedModel(model, 1, seed=0)
    sizes = [1, 3, 2, 3, 1, 2, 2, 1]  # none overtakes one that does not fit
    with ThreadPoolExecutor(len(sizes)) as callers:
        futures = []
        for i, size in enumerate(sizes):
            futures.append(callers.submit(shared.step, shared.new_cache(64), [40 + i] * size))
            assert model.entered.wait(10)
            wait_for(shared, i)  # the first one runs
        model.leave.set()
        for i, (size, future) in enumerate(zip(sizes, futures, strict=True)):
            assert torch.equal(future.result(30), alone([40 + i] * size))
    assert model.together == [[1], [3], [2], [3, 1], [2, 2], [1]]


def test_many_threads_get_the_bits_that_they_would_get_alone() -> None:
    """Random sizes, trees, steps that fail and clients that leave, over a real engine."""
    lengths = torch.Generator().manual_seed(5)
    model = FusedLM(CausalLM(make_tiny_model("llama")), 2)
    plans = []
    for i in range(12):
        sizes = torch.randint(1, 9, (12,), generator=lengths).tolist()
        sizes[0] = 70 if i % 4 == 0 else sizes[0]  # over batch_tokens
        plans.append([[3 + (7 * i + 5 * k + at) % 100 for at in range(n)] for k, n in enumerate(sizes)])

    def write(step, plan: list[list[int]], caller: int) -> list[torch.Tensor]:
        cache, rows = model.new_cache(256), []
        for number, tokens in enumerate(plan):
            tree = TokenTree.chain(tokens[1:]) if number % 3 == caller % 3 else TokenTree()
            rows.append(step(cache, tokens[:1] if len(tree) else tokens, tree).clone())
        return rows

    expected = [write(model.step, plan, caller) for caller, plan in enumerate(plans)]
    shared, left = SharedModel(model, 2, seed=0), threading.Event()

    def disturb(caller: int) -> None:
        cache = model.new_cache(8)
        while not left.is_set():
            with pytest.raises((ValueError, Abandoned)), shared.timed(lambda: caller % 2 == 0):
                shared.step(cache, [5] * 9)  # does not fit
            assert cache.length == 0

    with ThreadPoolExecutor(len(plans) + 2) as callers:
        disturbers = [callers.submit(disturb, caller) for caller in range(2)]
        futures = [callers.submit(write, shared.step, plan, caller) for caller, plan in enumerate(plans)]
        try:
            found = [future.result(120) for future in futures]
        finally:
            left.set()
        for disturber in disturbers:
            disturber.result(30)
    shared.close()
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_client_that_leaves_while_it_waits_costs_no_pass() -> None:
    model, left = Held(), threading.Event()
    shared = SharedModel(model, 1, seed=0)
    cache = shared.new_cache(64)

    def ask() -> None:
        with shared.timed(left.is_set):
            shared.step(cache, [41])

    with ThreadPoolExecutor(2) as callers:
        first = callers.submit(shared.step, shared.new_cache(64), [40])
        assert model.entered.wait(10)
        second = callers.submit(ask)
        wait_for(shared, 1)
        left.set()
        model.leave.set()
        first.result(30)
        with pytest.raises(Abandoned):
            second.result(30)
    assert model.together == [[1]]
    assert cache.length == 0


def test_sessions_that_ran_before_one_that_fails_are_run_again_from_where_they_were() -> None:
    class InTurn(Held):
        """Has run the first sessions when the last one fails."""

        def step_many(self, passes: Sequence[Pass]) -> list[torch.Tensor]:
            return [super(InTurn, self).step_many([p])[0] for p in passes]

    model = InTurn()
    shared = SharedModel(model, 1, seed=0)
    caches = [shared.new_cache(64) for _ in range(3)]
    with ThreadPoolExecutor(3) as callers:
        futures = [callers.submit(shared.step, caches[0], [40])]
        assert model.entered.wait(10)
        for i, token in enumerate((41, 90), 1):
            futures.append(callers.submit(shared.step, caches[i], [token]))
            wait_for(shared, i)
        model.leave.set()
        assert torch.equal(futures[1].result(30), alone([41]))
        with pytest.raises(ZeroDivisionError):
            futures[2].result(30)
    assert [cache.length for cache in caches] == [1, 1, 0]


def test_closing_drops_what_waits() -> None:
    model = Held()
    shared = SharedModel(model, 1, seed=0)
    with ThreadPoolExecutor(2) as callers:
        running = callers.submit(shared.step, shared.new_cache(8), [40])
        assert model.entered.wait(30)
        waiting = callers.submit(shared.step, shared.new_cache(8), [41])
        wait_for(shared, 1)
        shared.close()
        model.leave.set()
        assert torch.equal(running.result(30), alone([40]))
        with pytest.raises(Stopped):
            waiting.result(30)
    with pytest.raises(Stopped):
        shared.step(shared.new_cache(8), [42])


def test_the_thread_ends_with_the_model() -> None:
    model = Held()
    model.leave.set()
    shared = SharedModel(model, 1, seed=0)
    seen: list[threading.Thread] = []
    step_many = model.step_many
    model.step_many = lambda passes: seen.append(threading.current_thread()) or step_many(passes)  # type: ignore[method-assign]
    with ThreadPoolExecutor(4) as callers:
        list(callers.map(lambda token: shared.step(shared.new_cache(8), [token]), range(40, 48)))
    assert {thread.name for thread in seen} == {"model"}
    assert len(set(seen)) == 1
    shared.close()
    seen[0].join(30)
    assert not seen[0].is_alive()


def test_pytorch_is_called_from_one_thread_with_its_settings() -> None:
    seen = set()

    class Torch(SyntheticLM):
        uses_torch_threads = True

        def step_many(self, passes: Sequence[Pass]) -> list[torch.Tensor]:
            seen.add((threading.get_ident(), torch.get_num_threads()))
            return super().step_many(passes)

    shared = SharedModel(Torch(), 2, seed=0)
    with ThreadPoolExecutor(4) as callers:
        list(callers.map(lambda token: shared.step(shared.new_cache(8), [token]), range(40, 48)))
    assert [threads for _, threads in seen] == [2]
    SharedModel(SyntheticLM(), 1, seed=7)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert drawn == torch.rand(1)
