"""Caches that keep a vector of each token beside its keys and values.

Of a target these are the residual streams at the inputs of some layers, which EAGLE-3 (Li et al. 2025) drafts from and
which vLLM calls auxiliary hidden states; of a head that drafts so, its own output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from specsplit.engines.token_cache import Slots

MOST_TAPS = 4  # layers of a cache; memory for as many is counted in each session of a target worker
TAPPED = 4  # choices of layers that passes stay recorded for


class StateSlots(Slots):
    """A cache that can keep hidden states, moved and forgotten with the keys of their tokens.

    hidden_size: numbers of a token between layers. taps: layers whose inputs are kept; none at first.
    states: [capacity, len(taps) * hidden_size], the first tap first; None as long as nothing is kept. A pass writes its
    tokens' rows; those from `length` on mean nothing.
    """

    hidden_size: int
    taps: tuple[int, ...] = ()
    states: torch.Tensor | None = None
    states_like: torch.Tensor  # an empty tensor of the states' type and device

    def tap(self, layers: Sequence[int]) -> None:
        """Keep the inputs of these layers from now on. With other layers than before the cache is emptied, so that the
        states of all tokens held are those of `layers`; what it held must be run again. Raises ValueError for more than
        MOST_TAPS."""
        if tuple(layers) == self.taps:
            return
        if len(layers) > MOST_TAPS:
            raise ValueError(f"{len(layers)} layers are tapped; a cache keeps the inputs of {MOST_TAPS} at most")
        self.rollback(0)
        self.taps = tuple(layers)
        self.states = self.new_states(len(layers) * self.hidden_size) if layers else None

    def new_states(self, width: int) -> torch.Tensor:
        """Room for the states, [capacity, width]."""
        return self.states_like.new_empty(self.capacity, width)

    def move_states(self, context: int, path: Sequence[int]) -> None:
        """Put the states of the tree nodes of `path` where `keep` puts their keys."""
        if self.states is not None:
            slots = torch.tensor([context + node for node in path], device=self.states.device)
            self.states[context : context + len(path)] = self.states[slots]  # the right side is a copy

    def state_bytes(self) -> int:
        """Bytes of the states."""
        return 0 if self.states is None else self.states.untyped_storage().nbytes()


def forget_taps(programs: dict[Any, Any], taps: tuple[int, ...]) -> None:
    """Drop passes with the oldest `taps`, when those with others than these have TAPPED choices already, as each client
    may name its own. programs: recorded, by shapes that have `taps`."""
    choices = list(dict.fromkeys(shape.taps for shape in programs if shape.taps))
    if taps and taps not in choices and len(choices) >= TAPPED:
        for shape in [shape for shape in programs if shape.taps == choices[0]]:
            del programs[shape]
