"""One recorded pass: from one small array of numbers to logits, candidates or a verdict, all on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specsplit.decoding.tree import ROOT
from specsplit.engines import gpu_choice
from specsplit.engines.gpu_cache import Pool
from specsplit.engines.gpu_choice import NUMBERS, Kind
from specsplit.engines.gpu_decoder import Decoder, Tokens, mask_of, one_layer
from specsplit.engines.hidden_states import HiddenStatesHead
from specsplit.engines.passes import Pass, Propose, Walk
from specsplit.engines.recording import Recorder
from specsplit.engines.transformers import CausalLM

FIELDS = 5  # a session's numbers besides its tokens, their parents and its sampling: base, cached, count, first, offset


@dataclass(frozen=True)
class Then:
    """What follows the layers. what: logits | walk | propose. kind: of choices.

    moves: walk alone: whether nodes may have to move, which those of a chain never have. steps, vocab_size, targets: as
    in Propose; targets by its address.
    """

    what: str = "logits"
    kind: Kind = Kind()  # noqa: RUF009 (frozen)
    moves: bool = False
    steps: int = 0
    vocab_size: int = 0
    targets: int = 0

    @classmethod
    def of(cls, work: Pass) -> Then:
        match work.then:
            case Walk(sampling):
                return cls("walk", Kind.of(sampling), moves=not work.tree.is_chain)
            case Propose(sampling, vocab_size, targets, steps):
                address = 0 if targets is None else targets.data_ptr()
                return cls("propose", Kind.of(sampling), steps=steps, vocab_size=vocab_size, targets=address)
        return cls()


@dataclass(frozen=True)
class Shape:
    """Of a recorded pass. All but `row`, `sessions` and `view` may be padded.

    row, sessions: the rows of the pool that it is for. tokens: fed for each. window: the last slots, in which a token
    sees its ancestors alone. rows: whose logits are wanted. chosen: the first of them, after which a token is chosen:
    fewer where that takes noise; the logits are computed for as many as ever, so that their bits stay. view: of the
    cache, as from Pool.view. taps: layers whose inputs are kept, as in StateSlots. given: a head's states come with the
    tokens; else they are its outputs for the tokens before.
    """

    row: int
    sessions: int
    tokens: int
    window: int
    rows: int
    chosen: int
    view: tuple[int, int]
    then: Then
    taps: tuple[int, ...] = ()
    given: bool = False

    @property
    def layers(self) -> set[tuple[int, int, tuple[int, int]]]:
        """What of it the layers are compiled for."""
        counts = {self.tokens, 1} if self.then.steps else {self.tokens}
        return {(self.sessions, count, self.view) for count in counts}


@dataclass(frozen=True)
class Functions:
    """What is compiled, or the same as it is."""

    layer: Any
    lay_out: Any


class Runtime:
    """What all passes of a model share.

    plain, compiled: the functions that passes are made of. prepared: what they have been compiled for; nothing else is
    compiled, as it would keep a request waiting.
    """

    def __init__(self, source: CausalLM | HiddenStatesHead, decoder: Decoder, compiles: bool | None) -> None:
        self.device, self.dtype = source.device, source.dtype
        self.decoder = decoder
        self.recorder = Recorder(self.device, compiles)
        self.plain = self.compiled = Functions(one_layer, lay_out)
        if self.recorder.compiles:
            self.compiled = Functions(*(self.recorder.compiled(function) for function in (one_layer, lay_out)))
        self.prepared: set[tuple[int, int, tuple[int, int]]] = set()
        self._vocab_size = source.vocab_size
        self._logits: dict[int, torch.Tensor] = {}

    def logits_buffer(self, rows: int) -> torch.Tensor:
        """[rows, vocab_size], which all passes with so many write to, one after the other."""
        if rows not in self._logits:
            self._logits[rows] = torch.zeros(rows, self._vocab_size, dtype=self.dtype, device=self.device)
        return self._logits[rows]


def numbers_of(work: Pass, shape: Shape) -> list[int]:
    """What the device is told of one session's part of a pass.

    Its tokens; for each slot of the window the place of its parent there, -1 where that is the context before it; and
    `base` (slots before the window), `cached` (slots of the window that are in the cache), `count` (tokens fed),
    `first` (the first of them whose logits are wanted), `offset` (of the positions in the text), and its sampling.
    """
    linear, cached = len(work.tokens), work.cached_nodes
    ids = [*work.tokens, *work.tree.token_ids[cached:]]
    parents = [*range(ROOT, linear - 1), *(linear + parent for parent in work.tree.parents)]
    if not linear:
        parents = list(work.tree.parents)
    sampling = gpu_choice.packed(work.then.sampling) if work.then else [0] * NUMBERS
    return [
        *ids, *[0] * (shape.tokens - len(ids)),
        *parents, *[ROOT] * (shape.window - len(parents)),
        work.cache.length - cached, cached, len(ids), work.first_wanted,
        work.then.offset if isinstance(work.then, Propose) else 0,
        *sampling,
    ]  # fmt: skip


def lay_out(
    numbers: torch.Tensor, shape: Shape, padding: int, windows: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Where the tokens of a pass are and what they see, from the numbers of its sessions, [sessions, ...].

    Returns the ancestors of each slot of the window, itself included, bool [sessions, window, window]; the positions
    and the slots of the tokens fed, [sessions, tokens]; and for each of `windows` which slots of the view they see,
    bool [sessions, tokens, slots]. Padding goes to slot `padding` and sees slot 0.
    """
    count, window = shape.tokens, shape.window
    parents = numbers[:, count : count + window]
    base, cached, fed, *_ = numbers[:, count + window : count + window + FIELDS, None].unbind(1)
    ancestors = torch.eye(window, dtype=torch.bool, device=numbers.device).expand(len(numbers), window, window)
    # Ever longer ways up: after n turns, ancestors of up to 2^n - 1 generations. A way that ends at the context stays.
    above = parents
    for _ in range((window - 1).bit_length()):
        up = above.clamp(min=0)
        more = ancestors.gather(1, up[:, :, None].expand_as(ancestors))
        ancestors = ancestors | (more & (above >= 0)[:, :, None])
        above = torch.where(above >= 0, above.gather(1, up), above)
    depth = ancestors.sum(-1)
    token = torch.arange(count, device=numbers.device)
    place = (cached + token).clamp(max=window - 1)
    valid = token < fed
    positions = torch.where(valid, base + depth.gather(1, place) - 1, 0)
    slots = torch.where(valid, base + cached + token, padding)
    slot = torch.arange(shape.view[0] * shape.view[1], device=numbers.device)
    inside = slot - base  # of the window
    among = inside.clamp(0, window - 1)
    own = ancestors.gather(1, place[:, :, None].expand(-1, -1, window))
    related = own.gather(2, among[:, None].expand(-1, count, -1))
    visible = (inside < 0)[:, None] | (related & ((inside >= 0) & (inside < window))[:, None])
    position = torch.where(inside < 0, slot, base + depth.gather(1, among) - 1)  # of what is in a slot
    distance = positions[:, :, None] - position[:, None]
    padded = (slot == 0).expand_as(visible)
    sees = [
        torch.where(valid[:, :, None], visible & (distance < size) if size else visible, padded) for size in windows
    ]
    return ancestors, positions, slots, sees


class Program:
    """A pass of one shape on a pool: recorded when it is first run, then replayed."""

    def __init__(self, runtime: Runtime, pool: Pool, shape: Shape, example: Pass) -> None:
        self._runtime, self._pool, self.shape = runtime, pool, shape
        then, cuda = shape.then, runtime.device.type == "cuda"
        targets = example.then.targets if isinstance(example.then, Propose) else None
        self.targets = None if targets is None else targets.to(runtime.device)
        rows = slice(shape.row, shape.row + shape.sessions)
        self._caches = [kv[:, rows] for kv in pool.kv]
        self._states = None if pool.states is None or not shape.taps else pool.states[rows]
        width = shape.tokens + shape.window + FIELDS + NUMBERS
        self._host = torch.zeros(shape.sessions, width, dtype=torch.long, pin_memory=cuda)
        self._numbers = self._host.to(runtime.device, copy=True)
        self._given = self._host_given = torch.empty(0)
        if shape.given:
            size = shape.sessions, shape.tokens, pool.hidden_size
            self._host_given = torch.zeros(size, dtype=runtime.dtype, pin_memory=cuda)
            self._given = self._host_given.to(runtime.device, copy=True)
        self._copied = torch.cuda.Event() if cuda else None
        self._reply = self._host_reply = torch.empty(0)
        if then.what == "logits":
            self._reply = runtime.logits_buffer(shape.sessions * shape.rows)
        else:
            per_session: tuple[int, ...] = (1 + shape.chosen,)
            if then.what == "propose":
                per_session = (shape.rows + then.steps, gpu_choice.reply_width(then.kind))
            self._reply = torch.zeros(shape.sessions, *per_session, dtype=torch.long, device=runtime.device)
            self._host_reply = torch.zeros(self._reply.shape, dtype=torch.long, pin_memory=cuda)
        self._run: Any = None

    def run(self, passes: Sequence[Pass]) -> list[Any]:
        """The results of the passes, whose caches are rows of the pool within those of the shape."""
        shape = self.shape
        if self._copied is not None:
            self._copied.synchronize()  # the last copy may not have ended
        numbers = self._host.numpy()
        numbers[:] = 0  # nothing is fed for sessions that are not there
        for work in passes:
            numbers[work.cache.row - shape.row] = numbers_of(work, shape)
            if work.states is not None:
                self._host_given[work.cache.row - shape.row, : len(work.states)] = work.states
        self._numbers.copy_(self._host, non_blocking=True)
        if shape.given:
            self._given.copy_(self._host_given, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if self._run is None:
            self._record()
        self._run()
        if shape.then.what == "logits":
            rows = self._reply.view(shape.sessions, shape.rows, -1)  # the next pass writes there
            return [rows[work.cache.row - shape.row, : work.size - work.first_wanted].clone() for work in passes]
        self._host_reply.copy_(self._reply, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
            self._copied.synchronize()
        return [self._read(work) for work in passes]

    def _read(self, work: Pass) -> Any:
        reply = self._host_reply[work.cache.row - self.shape.row].numpy()
        if isinstance(work.then, Walk):
            return gpu_choice.walked(reply, work.cache.length + len(work.tokens))
        wanted = work.size - work.first_wanted
        rows = [*reply[:wanted], *reply[self.shape.rows : self.shape.rows + work.steps]]
        return [gpu_choice.ranked(row) for row in rows]

    def _record(self) -> None:
        runtime = self._runtime
        fast = runtime.compiled if self.shape.layers <= runtime.prepared else None
        self._run = runtime.recorder.recorded(
            lambda: self._pass(runtime.plain), None if fast is None else lambda: self._pass(fast)
        )

    # ---- what is recorded

    @torch.no_grad()
    def _pass(self, functions: Functions) -> None:
        runtime, shape, numbers = self._runtime, self.shape, self._numbers
        at = shape.tokens + shape.window
        ancestors, positions, slots, sees = functions.lay_out(
            numbers, shape, self._pool.padding, runtime.decoder.windows
        )
        states = self._layers(functions, numbers[:, : shape.tokens], self._states_read(), positions, slots, sees)
        first = numbers[:, at + 3 : at + 4]
        rows = first + torch.arange(shape.rows, device=runtime.device)
        within = rows.clamp(max=shape.tokens - 1)  # [sessions, rows]
        places = within + shape.tokens * torch.arange(shape.sessions, device=runtime.device)[:, None]
        states = states[places.flatten()]
        logits = runtime.decoder.logits(states)
        if shape.then.what == "logits":
            self._reply.copy_(logits)
        elif shape.then.what == "walk":
            chosen = logits.view(*within.shape, -1)[:, : shape.chosen].flatten(0, 1)
            self._walk(chosen, within[:, : shape.chosen], ancestors, positions)
        else:
            self._propose(functions, logits, positions.gather(1, within), states)

    def _states_read(self) -> torch.Tensor | None:
        """The states that a head reads the tokens fed with, [sessions * tokens, hidden]; None for other models."""
        shape, numbers, padding = self.shape, self._numbers, self._pool.padding
        if not self._runtime.decoder.reads_states:
            return None
        at, token = shape.tokens + shape.window, torch.arange(shape.tokens, device=numbers.device)
        base, cached, count, *_ = numbers[:, at : at + FIELDS, None].unbind(1)
        if shape.given:
            states = self._given.flatten(0, 1)
        else:
            parents = numbers[:, shape.tokens : at].gather(1, (cached + token).clamp(max=shape.window - 1))
            assert self._states is not None
            states = self._states[self._slots((base + parents).clamp(0, padding))]
        return torch.where((token < count).flatten()[:, None], states, 0)  # of padding they may be any, NaN too

    def _layers(
        self,
        functions: Functions,
        ids: torch.Tensor,
        states: torch.Tensor | None,
        positions: torch.Tensor,
        slots: torch.Tensor,
        sees: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """What the layers give, [sessions * tokens, hidden]; ids, positions, slots: [sessions, tokens]. states: those
        that a head reads."""
        runtime, view = self._runtime, self.shape.view
        places = positions.flatten()
        masks = [mask_of(see, view, runtime.decoder.sizes, runtime.dtype) for see in sees]
        tokens = Tokens(self._pool.cos[places], self._pool.sin[places], self._slots(slots), masks)
        tapped = {}
        for layer, outputs in enumerate(
            runtime.decoder.forward(ids.flatten(), states, tokens, self._caches, view, functions.layer)
        ):
            if layer in self.shape.taps:
                tapped[layer] = outputs
        if self._states is not None:
            kept = torch.cat([tapped[layer] for layer in self.shape.taps], -1)
            self._states[(*tokens.slots, slice(kept.shape[1]))] = kept
        return outputs

    def _slots(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Slots of the sessions, [sessions, any], as places in their caches."""
        session = torch.arange(len(slots), device=slots.device)[:, None].expand_as(slots).flatten()
        block = self._pool.block
        return session, slots.flatten() // block, slots.flatten() % block

    def _sampling(self, rows: int) -> torch.Tensor:
        """The sampling of each session, for each of its rows."""
        return self._numbers[:, -NUMBERS:].repeat_interleave(rows, 0)

    def _walk(self, logits: torch.Tensor, rows: torch.Tensor, ancestors: torch.Tensor, positions: torch.Tensor) -> None:
        shape, numbers = self.shape, self._numbers
        at = shape.tokens + shape.window
        base, _, count, first, _ = numbers[:, at : at + FIELDS, None].unbind(1)
        sampling, kind = self._sampling(shape.chosen), shape.then.kind
        noise = gpu_choice.noise(positions.gather(1, rows).flatten() + 1, sampling, kind, logits.shape[-1])
        chances = gpu_choice.scores(logits, sampling, kind, noise)
        best, choices = (each.view(rows.shape) for each in chances.max(-1))
        among = ancestors.gather(1, rows[:, :, None].expand(-1, -1, shape.window))
        among = among.gather(2, rows[:, None].expand(-1, shape.chosen, -1))
        parents = numbers[:, shape.tokens : at].gather(1, rows) - first
        reply, accepted = gpu_choice.walk(
            numbers[:, : shape.tokens].gather(1, rows), parents, among, (count - first)[:, 0], choices, best.isfinite()
        )
        self._reply.copy_(reply)
        if shape.then.moves:
            start = base + first + 1
            to = start + torch.arange(shape.chosen - 1, device=numbers.device)
            origin = start + gpu_choice.moves(accepted)
            target, source = (self._slots(each.clamp(max=self._pool.padding)) for each in (to, origin))
            for cache in self._caches:  # the right side is a copy
                cache[:, target[0], target[1], :, target[2]] = cache[:, source[0], source[1], :, source[2]]
            if self._states is not None:
                self._states[target] = self._states[source]

    def _propose(
        self, functions: Functions, logits: torch.Tensor, positions: torch.Tensor, states: torch.Tensor
    ) -> None:
        """positions: of the rows, [sessions, rows]. states: what the layers gave for them. Where tokens are fed after
        them, there is one row."""
        runtime, shape, then, numbers = self._runtime, self.shape, self.shape.then, self._numbers
        at = shape.tokens + shape.window
        base, cached, count, _, offset = numbers[:, at : at + FIELDS, None].unbind(1)

        # All noise at once: it depends on positions alone.
        after = torch.cat([positions + 1, positions[:, -1:] + 2 + torch.arange(then.steps, device=runtime.device)], 1)
        noise = gpu_choice.noise(
            (offset + after).flatten(), self._sampling(after.shape[1]), then.kind, then.vocab_size, self.targets
        )

        def scores(logits: torch.Tensor, start: int, count: int) -> torch.Tensor:
            """Of the rows from `start` on, `count` of each session."""
            own = None
            if noise is not None:
                own = noise.view(*after.shape, -1)[:, start : start + count].flatten(0, 1)
            if self.targets is None:
                logits = logits[:, : then.vocab_size]
            sampling = self._sampling(count)
            return gpu_choice.scores(logits, sampling, then.kind, own, self.targets, then.vocab_size)

        chances = [scores(logits, 0, shape.rows)]
        slot = torch.arange(shape.view[0] * shape.view[1], device=runtime.device)
        end = base + cached + count
        for step in range(then.steps):
            ids = gpu_choice.best(chances[-1], then.kind, self.targets)[:, None]
            positions = positions + 1
            own = torch.where(count > 0, end + step, self._pool.padding).clamp(max=self._pool.padding)
            sees = [(slot <= own) & (own - slot < (size or slot.numel())) for size in runtime.decoder.windows]
            sees = [torch.where(count > 0, see, slot == 0)[:, None] for see in sees]
            read = states if runtime.decoder.reads_states else None
            states = self._layers(functions, ids, read, positions.clamp(max=len(self._pool.cos) - 1), own, sees)
            chances.append(scores(runtime.decoder.logits(states), shape.rows + step, 1))
        together = torch.cat([each.view(shape.sessions, -1, *each.shape[1:]) for each in chances], 1)
        self._reply.copy_(gpu_choice.rank(together.flatten(0, 1), then.kind, self.targets).view(self._reply.shape))
