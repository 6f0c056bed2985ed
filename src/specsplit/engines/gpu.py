"""Llama-type models on a GPU: each pass, each draft and each verification is one recorded launch.

The host sends one small array of numbers and gets back what was decided; positions, masks, choices and the move of the
accepted path are made on the device (`gpu_passes`). Sessions are rows of one cache, so that one pass serves several. On
the CPU the same passes run on the same buffers without a graph.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from specsplit.decoding.sampling import GREEDY
from specsplit.engines.gpu_cache import GpuCache, Pool, shape_of
from specsplit.engines.gpu_decoder import Decoder, unsuitable
from specsplit.engines.gpu_passes import Program, Runtime, Shape, Then
from specsplit.engines.hidden_states import HiddenStatesHead
from specsplit.engines.passes import MakesTogether, Pass, Propose, Walk, all_or_none
from specsplit.engines.state_slots import forget_taps
from specsplit.engines.token_cache import tokens_of_pass
from specsplit.engines.transformers import CausalLM

log = logging.getLogger(__name__)
SMALLEST_PASS = 16  # tokens; a pass of one takes as long, since reading the weights decides
SMALLEST_DRAFT = 2  # tokens that a draft begins with: the target's own, and the last drafted one
CAPACITIES = 256  # Texts of capacities up to the next multiple share a pool.


class GpuPasses(MakesTogether):
    """What makes passes through the layers of a model or of a head.

    sessions: rows of a pool of caches, which can share a pass. compiles: as in Recorder.
    """

    uses_torch_threads = True
    smallest_draft = SMALLEST_DRAFT
    hidden_size: int

    def __init__(
        self, source: CausalLM | HiddenStatesHead, decoder: Decoder, sessions: int, compiles: bool | None
    ) -> None:
        self.device, self.dtype = source.device, source.dtype
        self.vocab_size, self.max_context = source.vocab_size, source.max_context
        self.eos_token_ids, self.parameters = source.eos_token_ids, source.parameters
        self.batch_tokens = self.prefill_tokens = source.prefill_tokens
        self.sessions = sessions
        self.runtime = Runtime(source, decoder, compiles)
        self._bytes_of_slot = source.cache_bytes(1)
        self._pools: list[Pool] = []

    # ---- caches

    def cache_bytes(self, capacity: int, taps: int = 0) -> int:
        """As CausalLM.cache_bytes: a row of a pool, padding included."""
        blocks, block = shape_of(_multiple(capacity))
        return blocks * block * (self._bytes_of_slot + taps * self.hidden_size * self.dtype.itemsize)

    @torch.no_grad()
    def new_cache(self, capacity: int) -> GpuCache:
        """An empty cache for one sequence of at most `capacity` tokens, tree nodes included."""
        most = _multiple(capacity)
        for pool in self._pools:
            if pool.capacity == most and (cache := pool.take(capacity)):
                return cache
        pool = Pool(self.runtime.decoder, self.sessions, most, self.dtype, self.device)
        self._pools.append(pool)
        made = pool.take(capacity)
        assert made is not None
        return made

    # ---- passes

    def decides(self, then: Walk | Propose) -> bool:
        """As Pass.then: all but rejection sampling's verdicts, which need the logits."""
        return isinstance(then, Propose) or not then.sampling.uses_rejection

    @torch.no_grad()
    def step_many(self, passes: Sequence[Pass]) -> list[Any]:
        """The passes of several sessions, each of another one; those of one kind and size are made as one.

        Returns of each what Pass.then says. Raises NonFiniteLogits where a verdict meets such.
        """
        for work in passes:
            _check(work)
        with all_or_none(work.cache for work in passes):
            rest = [self._last_part(work) for work in passes]
            results: dict[int, Any] = {}
            for group in self._groups(rest):
                found = self._run([rest[i] for i in group])
                results.update(zip(group, found, strict=True))
            return [results[i] for i in range(len(passes))]

    def _last_part(self, work: Pass) -> Pass:
        """Feed what comes before the last part of a long prompt, and before the last token of one that is drafted
        after; what is left."""
        while len(work.tokens) > self.prefill_tokens:
            first, work = work.split(self.prefill_tokens)
            self._run([first])
        if work.steps and len(work.tokens) > SMALLEST_PASS:
            first, work = work.split(len(work.tokens) - 1)
            self._run([first])
        return work

    def _groups(self, passes: Sequence[Pass]) -> Iterator[list[int]]:
        """Which of the passes share a launch."""
        groups: dict[Any, list[int]] = {}
        for i, work in enumerate(passes):
            alone = i if work.size > SMALLEST_PASS else None
            # Nodes move in a group where they move in one of its trees, and the longest draft sets the steps.
            kind = replace(Then.of(work), moves=False, steps=int(bool(work.steps)))
            given = work.states is not None
            groups.setdefault((id(work.cache.pool), kind, alone, work.cache.taps, given), []).append(i)
        yield from groups.values()

    def _run(self, passes: Sequence[Pass]) -> list[Any]:
        pool, shape = passes[0].cache.pool, self._shape(passes)
        program = pool.programs.get(shape)
        if program is None:
            forget_taps(pool.programs, shape.taps)
            program = pool.programs[shape] = Program(self.runtime, pool, shape, passes[0])
        for work in passes:
            work.cache.written = True
        results: list[Any] = program.run(passes)
        for work, result in zip(passes, results, strict=True):
            work.cache.advance(work.size + work.steps)
            if isinstance(work.then, Walk):
                work.cache.has_kept(work.cache.length - len(work.tree), result.path)
        return results

    def _shape(self, passes: Sequence[Pass]) -> Shape:
        """The shape that serves the passes, whatever else has one of its own."""
        pool, thens = passes[0].cache.pool, [Then.of(work) for work in passes]
        first, last = (edge(work.cache.row for work in passes) for edge in (min, max))
        sessions = 1  # a power of two of adjacent rows
        while first // sessions != last // sessions:
            sessions *= 2
        row = first // sessions * sessions
        sessions = min(sessions, pool.rows - row)
        proposes = thens[0].what == "propose"
        # As many tokens in all as in a pass of one session that is not a draft.
        least = self.smallest_draft if proposes else SMALLEST_PASS
        tokens = _power_of_two(max(work.size for work in passes), max(least // sessions, 1))
        cached = max(work.cached_nodes for work in passes)
        wanted = _power_of_two(max(work.size - work.first_wanted for work in passes), 1)
        rows = wanted if proposes else min(max(wanted, SMALLEST_PASS), tokens)
        steps = max(then.steps for then in thens)
        return Shape(
            row,
            sessions,
            tokens,
            _power_of_two(cached + tokens, 1) if cached else tokens,
            rows,
            rows if thens[0].kind.method == "greedy" else min(wanted, rows),
            pool.view(min(max(work.cache.length + work.size + steps for work in passes), pool.padding)),
            replace(thens[0], moves=any(then.moves for then in thens), steps=steps),
            passes[0].cache.taps,
            passes[0].states is not None,
        )

    # ---- before the first request

    def prepare(self, capacity: int, sessions: int, *, drafts: bool) -> None:
        """Record, and compile, what passes over the cache of one session need; the log says how far that is.

        capacity, sessions: of the caches that will be asked for. drafts: whether the model drafts or verifies.
        """
        self.sessions = sessions
        recorder = self.runtime.recorder
        if not (recorder.compiles or recorder.records):
            return
        cache, began = self.new_cache(capacity), time.perf_counter()
        count = self.smallest_draft if drafts else SMALLEST_PASS
        states = torch.zeros(count, cache.pool.hidden_size) if self.runtime.decoder.reads_states else None
        for number, view in enumerate(cache.pool.views, 1):
            log.info("recording passes: %d of %d (%.0f s)", number, len(cache.pool.views), time.perf_counter() - began)
            then = Propose(GREEDY, self.vocab_size, steps=1) if drafts else Walk(GREEDY)
            cache.length = max(0, min(view[0] * view[1], capacity) - count - 1)  # of zeros, as good as a text
            work = Pass(cache, [1] * count, then=then, states=states)
            if recorder.compiles:
                self.runtime.prepared |= self._shape([work]).layers
            self._run([work])
        cache.rollback(0)
        how = "compiled and recorded" if recorder.compiles else "recorded"
        log.info("passes were %s in %.0f s", how, time.perf_counter() - began)


class GpuLM(GpuPasses):
    """A Llama-type model, with the methods of CausalLM; same logits but for rounding.

    Raises ValueError where `gpu_decoder.unsuitable` has a reason.
    """

    taps = True

    def __init__(self, source: CausalLM, sessions: int = 4, compiles: bool | None = None) -> None:
        if reason := unsuitable(source):
            raise ValueError(reason)
        super().__init__(source, Decoder.of(source), sessions, compiles)
        self.num_layers, self.hidden_size = source.num_layers, source.hidden_size


def _check(work: Pass) -> None:
    tokens_of_pass(work.cache, work.tokens, work.tree, work.cached_nodes)
    if work.steps and len(work.tree):
        raise ValueError("tokens are fed one by one after a context, not after a tree")
    if work.cache.length + work.size + work.steps > work.cache.capacity:
        fed = work.size + work.steps
        raise ValueError(f"{work.cache.length} + {fed} tokens exceed the cache of {work.cache.capacity}")


def _power_of_two(count: int, least: int) -> int:
    return max(least, 1 << (count - 1).bit_length())


def _multiple(capacity: int) -> int:
    return -(-capacity // CAPACITIES) * CAPACITIES
