"""A static key/value cache: allocated once, rolled back in O(1), compacted to the accepted path of a tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from specsplit.engines.state_slots import StateSlots

NO_STATES = torch.empty(0)


class StaticLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, shape [1, kv_heads, capacity, head_dim], written in place.

    The write position is the owner's `length`, which moves only when a whole pass has succeeded: a pass that
    fails half-way leaves the cache as it was.
    """

    is_sliding = False

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads, _, key_dim = key_states.shape
        if batch != 1:
            raise ValueError(f"the cache holds one sequence, got a batch of {batch}")
        capacity = self.owner.capacity
        self.keys = key_states.new_empty(1, heads, capacity, key_dim)
        self.values = value_states.new_empty(1, heads, capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.write(key_states, value_states)

    def write(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the states in their place; returns the keys and values that attention looks at."""
        start = self.owner.length
        end = start + key_states.shape[-2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.owner.length

    def get_max_length(self) -> int:
        return self.owner.capacity


class LayeredSlots(StateSlots):
    """A cache whose `layers` have keys and values of shape [1, kv_heads, slots, head_dim]."""

    layers: list[Any]

    @torch.inference_mode()
    def keep(self, context: int, path: Sequence[int]) -> None:
        """Keep the first `context` tokens and, after them, the tree nodes of `path` (increasing offsets from
        `context`); everything else is forgotten. Costs nothing when the path is already in place."""
        end = context + len(path)
        self.check_keep(context, path)
        if path and path[-1] != len(path) - 1:
            self.length = context  # a path that is moved only in part must not count
            slots = torch.tensor([context + node for node in path], device=self.layers[0].keys.device)
            for layer in self.layers:
                # index_select copies first, so overlapping source and destination are safe.
                layer.keys[:, :, context:end] = layer.keys.index_select(2, slots)
                layer.values[:, :, context:end] = layer.values.index_select(2, slots)
            self.move_states(context, path)
        self.length = end

    def nbytes(self) -> int:
        """Bytes reserved by this cache."""
        return self.state_bytes() + sum(
            tensor.numel() * tensor.element_size()
            for layer in self.layers
            if layer.is_initialized
            for tensor in (layer.keys, layer.values)
        )


class KVCache(LayeredSlots, Cache):
    """The cache of one session, for `past_key_values` of a Hugging Face model.

    length: tokens held. capacity: the most it can hold; memory is reserved for all of them at the first pass
    (the operating system commits it page by page as it is written). hidden_size, states_like: as StateSlots.
    """

    def __init__(
        self, num_layers: int, capacity: int, hidden_size: int = 0, states_like: torch.Tensor = NO_STATES
    ) -> None:
        self.length = 0
        self.capacity = capacity
        self.hidden_size, self.states_like = hidden_size, states_like
        super().__init__(layers=[StaticLayer(self) for _ in range(num_layers)])
