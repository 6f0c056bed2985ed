"""Any model of transformers on buffers of fixed shape, so that a pass on a GPU is one CUDA graph that is replayed.

For models that `gpu_decoder` has no layers for. A pass over few tokens takes as long as reading the weights from
memory, unless the GPU waits for Python, which launches some ten kernels a layer. So every tensor keeps its address:
tokens, positions and mask are copied to fixed places, keys and values go to slots that the graph reads, and a pass is
padded to one of a few sizes. On the CPU the same passes run on the same buffers without a graph.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from specsplit.decoding.tree import TokenTree
from specsplit.engines.kv_cache import LayeredSlots, StaticLayer
from specsplit.engines.recording import Recorder
from specsplit.engines.state_slots import MOST_TAPS, forget_taps
from specsplit.engines.transformers import CausalLM
from specsplit.engines.tree_attention import additive, positions, visible

SMALLEST_PASS = 16  # tokens; a pass of one takes as long, since reading the weights decides
SMALLEST_VIEW = 256  # slots that attention looks at; more in powers of two


class Buffers(Cache):
    """Keys and values, and the passes recorded on them. Used by one session after another.

    capacity: slots for tokens, and a last one for padding.
    """

    def __init__(self, num_layers: int, slots: int) -> None:
        self.capacity = slots + 1
        self.programs: dict[Shape, Program] = {}
        self.states: torch.Tensor | None = None  # inputs of layers that caches tap, [capacity, MOST_TAPS * hidden]
        self.written: torch.Tensor  # slots that the pass being recorded writes
        self.seen = 0  # slots that it looks at
        super().__init__(layers=[BufferLayer(self) for _ in range(num_layers)])


class BufferLayer(StaticLayer):
    """Keys and values of one decoder layer, [1, kv_heads, capacity, head_dim], at places read from a tensor."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.clear(0, self.owner.capacity)

    def clear(self, start: int, stop: int) -> None:
        """Zero slots: one that is masked still counts 0 times what is in it, which is NaN where that is not finite."""
        for states in (self.keys, self.values):
            states[:, :, start:stop].zero_()

    def write(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.index_copy_(2, self.owner.written, key_states)
        self.values.index_copy_(2, self.owner.written, value_states)
        return self.keys[:, :, : self.owner.seen], self.values[:, :, : self.owner.seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.seen, 0

    def get_seq_length(self) -> int:
        return 0  # the positions are given


class GraphCache(LayeredSlots):
    """The cache of one session, on buffers that are its own as long as it lives."""

    def __init__(self, buffers: Buffers, capacity: int, hidden_size: int, states_like: torch.Tensor) -> None:
        self.buffers, self.hidden_size, self.states_like = buffers, hidden_size, states_like
        self.layers = buffers.layers
        self.length = 0
        self.capacity = capacity
        self.written = True  # since the last `clean`; another session may have had the buffers before

    def new_states(self, width: int) -> torch.Tensor:
        """As StateSlots.new_states: a part of the buffers, where recorded passes write."""
        if self.buffers.states is None:
            self.buffers.states = self.states_like.new_zeros(self.buffers.capacity, MOST_TAPS * self.hidden_size)
        return self.buffers.states[: self.capacity, :width]

    def rollback(self, length: int) -> None:
        """As KVCache.rollback. Of one text, nothing is left to the next."""
        super().rollback(length)
        if not length:
            self.clean()

    @torch.inference_mode()
    def clean(self) -> None:
        """Zero the slots behind `length`."""
        for layer in self.layers:
            if self.written and layer.is_initialized:
                layer.clear(self.length, self.buffers.capacity)
        self.written = False


class GraphLM(CausalLM):
    """CausalLM with passes that are recorded when first used; same methods, same logits but for rounding."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._free: dict[int, list[Buffers]] = defaultdict(list)
        self.recorder = Recorder(self.device, compiles=False)

    def new_cache(self, capacity: int) -> GraphCache:
        """An empty cache for one sequence of at most `capacity` tokens, tree nodes included."""
        slots = _power_of_two(capacity, SMALLEST_VIEW)
        free = self._free[slots]
        buffers = free.pop() if free else Buffers(self.num_layers, slots)
        states_like = torch.empty(0, dtype=self.dtype, device=self.device)
        cache = GraphCache(buffers, capacity, self.hidden_size, states_like)
        cache.clean()
        weakref.finalize(cache, free.append, buffers)
        return cache

    def cache_bytes(self, capacity: int, taps: int = 0) -> int:
        """As CausalLM.cache_bytes: all slots of the buffers, and what the passes recorded on them keep.

        Counted are passes of every size up to parts of prompts, at every view, with logits of SMALLEST_PASS rows.
        """
        slots = _power_of_two(capacity, SMALLEST_VIEW)
        kept, view = super().cache_bytes(slots + 1, taps), SMALLEST_VIEW
        masks = 2 if self._masks_by_type else 1
        logits = SMALLEST_PASS * self.vocab_size * self.dtype.itemsize
        sizes = [size for size in (SMALLEST_PASS << i for i in range(16)) if size <= self.prefill_tokens]
        while view <= slots:
            # On the device; on the CPU there is one more copy, and no logits are kept.
            kept += sum(masks * size * view * (1 if self.recorder.records else 2) + logits for size in sizes)
            view *= 2
        return kept

    def _forward(
        self, cache: Any, tokens: Sequence[int], tree: TokenTree, cached_nodes: int, keep_logits: int
    ) -> torch.Tensor:
        ids = [*tokens, *tree.token_ids[cached_nodes:]]
        context, end = cache.length - cached_nodes, cache.length + len(ids)
        size, rows = _power_of_two(len(ids), SMALLEST_PASS), _power_of_two(keep_logits, SMALLEST_PASS)
        shape = Shape(size, rows, _power_of_two(end, SMALLEST_VIEW), cache.taps)
        cache.written = True
        program = cache.buffers.programs.get(shape)
        if program is None:
            forget_taps(cache.buffers.programs, shape.taps)
            program = cache.buffers.programs[shape] = Program(self, cache.buffers, shape)
        windows = (None, self._window) if self._masks_by_type else (self._window,)
        logits = program.run(
            ids,
            positions(context, len(tokens), tree, cached_nodes),
            [visible(context, len(tokens), tree, cached_nodes, window) for window in windows],
            first_row=len(ids) - keep_logits,
            start=cache.length,
        )
        cache.advance(len(ids))
        return logits[:keep_logits].clone()  # the next pass writes there


class Shape(NamedTuple):
    """Of a recorded pass. size: tokens fed. rows: logits. seen: slots that attention looks at. All but the first ones
    of each may be padding. taps: layers whose inputs are kept."""

    size: int
    rows: int
    seen: int
    taps: tuple[int, ...]


class Program:
    """A pass of one shape on one cache."""

    def __init__(self, lm: GraphLM, buffers: Buffers, shape: Shape) -> None:
        self._lm, self._buffers = lm, buffers
        size, self._rows, self._seen, self._taps = shape
        rows, seen, self._size = self._rows, self._seen, size
        self._masks = 2 if lm._masks_by_type else 1
        cuda = lm.device.type == "cuda"
        # Tokens, positions, rows wanted and the first slot in one copy, the masks in another.
        self._host_numbers = torch.zeros(2 * size + rows + 1, dtype=torch.long, pin_memory=cuda)
        self._host_masks = torch.zeros(self._masks, size, seen, dtype=torch.bool, pin_memory=cuda)
        self._numbers = self._host_numbers.to(lm.device, copy=True)
        self._mask_bits = self._host_masks.to(lm.device, copy=True)
        self._copied = torch.cuda.Event() if cuda else None
        self._replay: Callable[[], None] | None = None
        self._logits: torch.Tensor | None = None

    def run(
        self, ids: list[int], positions: list[int], masks: list[torch.Tensor], *, first_row: int, start: int
    ) -> torch.Tensor:
        """Logits [rows, vocab_size] of the tokens from `first_row` on; they are overwritten by the next run.

        masks: [tokens, slots] of each kind of layer. start: the slot of the first token.
        """
        if self._copied is not None:
            self._copied.synchronize()  # the last copy may not have ended
        size, count = self._size, len(ids)
        numbers, bits = self._host_numbers.numpy(), self._host_masks
        numbers[:] = 0
        numbers[:count] = ids
        numbers[size : size + count] = positions
        numbers[2 * size : 2 * size + count - first_row] = range(first_row, count)
        numbers[-1] = start
        bits.zero_()
        bits[:, count:, 0] = True  # padding sees one slot, so that its softmax is finite
        for own, mask in zip(bits, masks, strict=True):
            own[:count, : mask.shape[1]] = mask
        self._numbers.copy_(self._host_numbers, non_blocking=True)
        self._mask_bits.copy_(self._host_masks, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if self._replay is None:
            self._replay = self._lm.recorder.recorded(self._pass)
        self._replay()
        assert self._logits is not None
        return self._logits

    def _pass(self) -> None:
        size, buffers = self._size, self._buffers
        slots = self._numbers[-1] + torch.arange(size, device=self._numbers.device)
        buffers.written = slots.clamp_(max=buffers.capacity - 1)
        buffers.seen = self._seen
        masks = [additive(bits, self._lm.dtype, self._lm.device) for bits in self._mask_bits]
        kinds = ("full_attention", "sliding_attention")
        hidden = self._lm.hidden_size

        def keep(place: int, states: torch.Tensor) -> None:
            assert buffers.states is not None
            buffers.states[:, place * hidden : (place + 1) * hidden].index_copy_(0, buffers.written, states)

        with self._lm._tapped(self._taps, keep):
            output = self._lm.model(
                input_ids=self._numbers[None, :size],
                position_ids=self._numbers[None, size : 2 * size],
                attention_mask=dict(zip(kinds, masks, strict=True)) if self._masks > 1 else masks[0],
                past_key_values=buffers,
                use_cache=True,
                logits_to_keep=self._numbers[2 * size : 2 * size + self._rows],
            )
        self._logits = output.logits[0]


def _power_of_two(count: int, least: int) -> int:
    return max(least, 1 << (count - 1).bit_length())
