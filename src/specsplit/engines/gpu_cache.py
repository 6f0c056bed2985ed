"""Keys and values of several sessions side by side, so that one pass can serve any of them at fixed addresses."""

from __future__ import annotations

import heapq
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from specsplit.engines.state_slots import MOST_TAPS, StateSlots

if TYPE_CHECKING:
    from specsplit.engines.gpu_decoder import Decoder

BLOCK = 1024  # slots, about: attention over more than one block is split into them
FEWEST = 256  # slots that attention looks at; more in powers of two


class Pool:
    """Caches for sessions of at most `capacity` tokens each, one a row.

    kv: of each layer [2 (keys, values), rows, blocks, kv_heads, block, head_dim]; slot s of a session is slot s % block
    of its block s // block. The last slot of a row takes what padding writes; no token ever sees it.
    states: inputs of layers that caches tap, [rows, blocks, block, most_taps * hidden]; made when the first one does. A
    head keeps its output alone.
    cos, sin: of all positions, [slots, head_dim]. programs: the passes recorded on this pool.
    """

    def __init__(self, decoder: Decoder, rows: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.capacity = rows, capacity
        self.blocks, self.block = shape_of(capacity)
        self.views = _views(self.blocks, self.block)
        shape = (2, rows, self.blocks, decoder.sizes.kv_heads, self.block, decoder.sizes.head_dim)
        self.kv = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(decoder.num_layers)]
        self.hidden_size = decoder.embed.weight.shape[1]
        self.most_taps = 1 if decoder.reads_states else MOST_TAPS
        self.states: torch.Tensor | None = None
        self.cos, self.sin = decoder.rotary(self.blocks * self.block, dtype)
        self.programs: dict[Any, Any] = {}
        self._free = list(range(rows))

    @property
    def padding(self) -> int:
        """The slot that padding writes to."""
        return self.blocks * self.block - 1

    def take(self, capacity: int) -> GpuCache | None:
        """A cache for so many tokens in the first free row; None when there is none."""
        if not self._free:
            return None
        row = heapq.heappop(self._free)
        cache = GpuCache(self, row, capacity)
        weakref.finalize(cache, heapq.heappush, self._free, row)
        return cache

    def view(self, end: int) -> tuple[int, int]:
        """Blocks, and slots of each, that hold the first `end` slots: the smallest of `views` that does."""
        return next(view for view in self.views if end <= view[0] * view[1])


def _views(blocks: int, block: int) -> list[tuple[int, int]]:
    """What attention may look at: parts of one block, or several whole ones, each twice the one before."""
    parts = [(1, FEWEST << i) for i in range(32) if FEWEST << i <= block // 2]
    return [*parts, *((1 << i, block) for i in range(32) if 1 << i < blocks), (blocks, block)]


def shape_of(capacity: int) -> tuple[int, int]:
    """Blocks of a row, and slots of each: for `capacity` tokens and one of padding, a multiple of 64 each."""
    blocks = max(1, round(capacity / BLOCK))
    return blocks, -(-(capacity + 1) // (64 * blocks)) * 64


class GpuCache(StateSlots):
    """The cache of one session: a row of a pool that is its own as long as it lives."""

    def __init__(self, pool: Pool, row: int, capacity: int) -> None:
        self.pool, self.row, self.hidden_size = pool, row, pool.hidden_size
        self.length = 0
        self.capacity = capacity
        self.written = True  # since the last `clean`; another session may have had the row before
        self._kept: tuple[int, list[int]] | None = None  # the arguments of `keep` that the last pass has seen to
        self.clean()

    def advance(self, count: int) -> None:
        """As Slots.advance."""
        super().advance(count)
        self._kept = None

    def rollback(self, length: int) -> None:
        """As KVCache.rollback. Of one text, nothing is left to the next."""
        super().rollback(length)
        self._kept = None
        if not length:
            self.clean()

    @torch.no_grad()
    def clean(self) -> None:
        """Zero the slots behind `length`: one that is masked still counts 0 times what is in it, which may be NaN."""
        if self.written:
            block, slot = divmod(self.length, self.pool.block)
            for kv in self.pool.kv:
                kv[:, self.row, block, :, slot:].zero_()
                kv[:, self.row, block + 1 :].zero_()
        self.written = False

    def new_states(self, width: int) -> torch.Tensor:
        """As StateSlots.new_states: a part of the pool's, where recorded passes write."""
        pool = self.pool
        if pool.states is None:
            width_of_all = pool.most_taps * self.hidden_size
            pool.states = pool.kv[0].new_zeros(pool.rows, pool.blocks, pool.block, width_of_all)
        return pool.states[self.row].flatten(0, 1)[: self.capacity, :width]

    def has_kept(self, context: int, path: Sequence[int]) -> None:
        """The last pass has done what `keep` with these arguments does; what it fed besides is lost."""
        self.length = context + len(path)
        self._kept = context, list(path)

    @torch.no_grad()
    def keep(self, context: int, path: Sequence[int]) -> None:
        """As KVCache.keep."""
        if self._kept != (context, list(path)):
            self.check_keep(context, path)
            if path and path[-1] != len(path) - 1:
                self.length = context  # as long as the path is being moved, it cannot be relied on
                places = torch.arange(context, context + len(path))
                to, origin = (slots.to(self.pool.kv[0].device) for slots in (places, context + torch.tensor(path)))
                block = self.pool.block
                for kv in self.pool.kv:
                    own = kv[:, self.row]  # the right side is a copy
                    own[:, to // block, :, to % block] = own[:, origin // block, :, origin % block]
                self.move_states(context, path)
        self.length = context + len(path)
        self._kept = None

    def nbytes(self) -> int:
        """Bytes reserved by this cache."""
        states = 0 if self.pool.states is None else self.pool.states.nbytes
        return (states + sum(kv.nbytes for kv in self.pool.kv)) // self.pool.rows
