"""A head that drafts from the target's hidden states on a GPU: its layers in the passes of `gpu`.

The tokens that the target has accepted are read with its states and the whole chain after them is drafted in one
launch: each step reads the output of the one before where that is. A level of a tree is one launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from specsplit.decoding.tree import TokenTree
from specsplit.engines.architectures import not_llama_layer
from specsplit.engines.gpu import GpuPasses
from specsplit.engines.gpu_cache import GpuCache
from specsplit.engines.gpu_decoder import Decoder, not_plain
from specsplit.engines.hidden_states import HiddenStatesHead, reach, read_from
from specsplit.engines.passes import Pass, all_or_none
from specsplit.engines.token_cache import tokens_of_pass


class GpuHead(GpuPasses):
    """A head, with the methods of HiddenStatesHead; same logits but for rounding.

    sessions, compiles: as GpuPasses. Raises ValueError where `unsuitable_head` has a reason.
    """

    taps = False
    smallest_draft = 8  # a draft begins with the tokens that were accepted, read again with true states

    def __init__(self, source: HiddenStatesHead, sessions: int = 4, compiles: bool | None = None) -> None:
        if reason := unsuitable_head(source):
            raise ValueError(reason)
        module, layers = source.module, source.module.decoder_layers
        decoder = Decoder(
            module.config.layer,
            layers,
            module.lm_head,
            module.norm,
            module.position_embedding,
            module.embed_tokens,
            [0] * len(layers),
            norm_output=module.config.norm_output,
        )
        super().__init__(source, decoder, sessions, compiles)
        self.layers, self.hidden_size = source.layers, source.hidden_size
        self.raw_size, self.state_size = source.raw_size, source.state_size
        self.project = source.project

    def new_cache(self, capacity: int) -> GpuCache:
        """As HiddenStatesHead.new_cache."""
        cache = super().new_cache(capacity)
        cache.tap((self.runtime.decoder.num_layers,))  # the output of the last one
        return cache

    def step_many(self, passes: Sequence[Pass]) -> list[Any]:
        """As GpuPasses.step_many. What reads outputs of tokens of the same pass is run after these."""
        for work in passes:
            tokens_of_pass(work.cache, work.tokens, work.tree, work.cached_nodes)
        parts = [list(_parts(work)) for work in passes]
        found: list[list[Any]] = [[] for _ in passes]
        with all_or_none(work.cache for work in passes):
            for turn in range(max(map(len, parts))):
                here = [i for i, own in enumerate(parts) if turn < len(own)]
                for i, result in zip(here, super().step_many([parts[i][turn] for i in here]), strict=True):
                    found[i].append(result)
        return [_joined(work, results) for work, results in zip(passes, found, strict=True)]


def _parts(work: Pass) -> Iterator[Pass]:
    """What of a pass is run at once: tokens with given states, one token without, or a level of the tree."""
    sources, held, linear = read_from(work), work.cache.length, len(work.tokens)
    stop = 0
    while stop < work.size:
        start, stop = stop, reach(sources, held, stop)
        if start < linear:
            states = None if work.states is None else work.states[start:stop]
            then = work.then if stop == linear else None
            yield Pass(work.cache, work.tokens[start:stop], then=then, states=states)
        else:
            tree, end = work.tree, work.cached_nodes + stop - linear
            seen = TokenTree(tree.token_ids[:end], tree.parents[:end], tree.log_probs[:end])
            yield replace(work, tokens=(), states=None, tree=seen, cached_nodes=work.cached_nodes + start - linear)


def _joined(work: Pass, results: list[Any]) -> Any:
    """What a pass gives from what its parts gave: nobody wants the rows of tokens before the last."""
    wanted = results[work.first_wanted if work.states is None else 0 :]
    return torch.cat(wanted) if work.then is None else [each for result in wanted for each in result]


def unsuitable_head(head: HiddenStatesHead) -> str | None:
    """Why a head cannot be run by this engine; None when it can."""
    layer = head.module.midlayer
    return not_llama_layer(layer, head.module.config.layer) or not_plain(layer)
