"""A head that drafts from the target's hidden states on the CPU without PyTorch: one layer of `run_pass`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from specsplit.engines.hidden_states import GIVEN, HiddenStatesHead, reach, read_from
from specsplit.engines.linears import Linears, padded
from specsplit.engines.numba import CHUNK, FusedCache, FusedPasses, Part, unsuitable_layer
from specsplit.engines.numba_kernels import normalise, run_product
from specsplit.engines.numba_team import Workspace
from specsplit.engines.passes import Pass


class FusedHead(FusedPasses):
    """A head on the CPU, with the methods of HiddenStatesHead.

    source: taken apart, as its weights move here. threads: that run a pass, the calling one included.
    Raises ValueError where `unsuitable_head` has a reason.
    """

    taps = False
    eos_token_ids: tuple[int, ...] = ()

    def __init__(self, source: HiddenStatesHead, threads: int) -> None:
        if reason := unsuitable_head(source):
            raise ValueError(reason)
        module, layer = source.module, source.module.midlayer
        config = module.config
        self.layers, self.raw_size, self.state_size = source.layers, source.raw_size, source.state_size
        self.vocab_size, self.max_context = source.vocab_size, source.max_context
        self.parameters = source.parameters
        super().__init__(
            config.layer,
            module.decoder_layers,
            module.lm_head,
            module.norm,
            module.position_embedding,
            module.embed_tokens,
            threads,
            joined=2 * source.state_size,
        )
        self.hidden_size = source.hidden_size
        self._state_norm = _floats(layer.hidden_norm)
        self._norm_before_residual = config.norm_before_residual
        if config.norm_output:
            self._output_norm = _floats(module.norm)
        self._fc = Linears([], module.fc)
        norms = [module.input_norm] if config.norm_before_fc else list(module.fc_norm) if config.fc_norm else []
        self._norms_before_fc = [_floats(norm) for norm in norms]
        self._no_team = np.zeros(16, np.int64)

    def cache_bytes(self, capacity: int, taps: int = 0) -> int:
        """As CausalLM.cache_bytes."""
        return super().cache_bytes(capacity, 1)  # its own output is kept

    def new_cache(self, capacity: int) -> FusedCache:
        """As HiddenStatesHead.new_cache."""
        cache = super().new_cache(capacity)
        cache.tap((self.num_layers,))  # the output of the last one
        return cache

    def project(self, raw: torch.Tensor) -> torch.Tensor:
        """As HiddenStatesHead.project, from any thread, also while a pass runs; the bits of a row do not depend on the
        others."""
        rows = np.ascontiguousarray(raw.float().numpy())
        if rows.ndim != 2 or rows.shape[1] != self.raw_size:  # the kernel reads as much as the weights have
            raise ValueError(f"hidden states of shape {list(rows.shape)}; wanted [.., {self.raw_size}]")
        if self._norms_before_fc:
            normed = np.empty_like(rows)
            for row, out in zip(rows, normed, strict=True):
                parts = len(self._norms_before_fc)
                for norm, part, place in zip(
                    self._norms_before_fc, np.split(row, parts), np.split(out, parts), strict=True
                ):
                    normalise(part, norm, self._eps, place)
            rows = normed
        states = np.empty((len(rows), self.state_size), np.float32)
        packed = np.empty(CHUNK * padded(rows.shape[1]), np.float32)
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            arguments = (self._fc.head, self._functions[0], part, packed, states[start : start + CHUNK])
            run_product(0, 1, self._no_team, *arguments)
        return torch.from_numpy(states)

    def _reach(self, work: Pass, start: int) -> int:
        return reach(read_from(work), work.cache.length, start)

    def _fill(self, space: Workspace, parts: Sequence[Part]) -> None:
        at = 0
        for part in parts:
            sources = read_from(part.of)[part.start : part.stop]
            given = sources.count(GIVEN)  # they come first
            if given and part.of.states is not None:
                space.x[at : at + given] = part.of.states[part.start : part.start + given].float().numpy()
            space.x[at + given : at + len(sources)] = part.of.cache.states.numpy()[sources[given:]]
            at += len(sources)


def unsuitable_head(head: HiddenStatesHead) -> str | None:
    """Why a head cannot be run by this engine; None when it can."""
    return unsuitable_layer(head.module.midlayer, head.module.config.layer, head.device, head.dtype)


def _floats(norm: torch.nn.Module) -> np.ndarray:
    weight: torch.Tensor = norm.weight  # type: ignore[assignment]
    return weight.detach().float().numpy().copy()
