"""A head that drafts from the target's hidden states (EAGLE-3, Li et al. 2025), in PyTorch, with CausalLM's methods.

`HeadModule` says what it computes. A cache begins with token 1 of a text, for token 0 has no state before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from specsplit.decoding.tree import TokenTree
from specsplit.engines.head_module import HeadModule, load_head
from specsplit.engines.kv_cache import KVCache
from specsplit.engines.passes import EMPTY, Pass, all_or_none
from specsplit.engines.quantise import quantise_linears
from specsplit.engines.token_cache import tokens_of_pass
from specsplit.engines.transformers import CPU_PREFILL_CHUNK, DTYPES, PREFILL_CHUNK, pick_device
from specsplit.engines.tree_attention import positions, visible
from specsplit.models.head_files import EMBEDDING

GIVEN = -1  # instead of a slot: the state is given


def read_from(p: Pass) -> list[int]:
    """For every token fed the slot of the token whose output is its state; GIVEN where the state is given.

    A node's is that of its parent; a token's without a state that of the token before it.
    Raises ValueError for a first token without a state, and for states that are not one for each token.
    """
    held, linear = p.cache.length, len(p.tokens)
    if p.states is not None and len(p.states) != linear:
        raise ValueError(f"{len(p.states)} states for {linear} tokens")
    before = [GIVEN] * linear if p.states is not None else list(range(held - 1, held - 1 + linear))
    context = held - p.cached_nodes + linear
    slots = [
        *before,
        *(context + parent if parent >= 0 else context - 1 for parent in p.tree.parents[p.cached_nodes :]),
    ]
    if slots and slots[0] == GIVEN and (p.states is None or not linear):
        raise ValueError("the first token of a text has no state before it")
    return slots


def reach(sources: Sequence[int], held: int, start: int) -> int:
    """Up to which token a pass can be run at once, when those before `start` have been: they read outputs of earlier
    tokens. held: tokens in the cache before the pass."""
    return next((i for i in range(start + 1, len(sources)) if sources[i] >= held + start), len(sources))


class HiddenStatesHead:
    """A loaded head. vocab_size: rows of its output head.

    layers: of the target, whose inputs `project` joins; None = those that EAGLE reads (default_layers).
    hidden_size: numbers of one of the target's hidden states. raw_size: of those of a token that are joined;
    state_size: of what `project` makes of them.
    """

    batch_tokens = 0
    uses_torch_threads = True
    taps = False
    eos_token_ids: tuple[int, ...] = ()

    def __init__(self, module: HeadModule) -> None:
        config = module.config
        self.module = module.eval()
        self.device, self.dtype = module.device, module.dtype
        self.layers = config.layers
        self.hidden_size, self.state_size = config.target_hidden_size, config.layer.hidden_size
        self.raw_size: int = module.fc.in_features
        self.vocab_size = config.vocab_size
        self.max_context: int = config.layer.max_position_embeddings
        self.prefill_tokens = CPU_PREFILL_CHUNK if self.device.type == "cpu" else PREFILL_CHUNK

    @classmethod
    def load(
        cls, folder: Path, *, dtype: str = "float32", device: str = "auto", target: Path | None = None
    ) -> HiddenStatesHead:
        """The head in a folder, of either published layout (`load_head`). dtype, device: as CausalLM.load."""
        place = pick_device(device)
        module = load_head(folder, DTYPES[dtype], target).to(place)
        if dtype == "int8":
            quantise_linears(module)
        return cls(module)

    @property
    def parameters(self) -> int:
        """Numbers in the weights but for the embedding, of which a step reads a row."""
        return sum(p.numel() for name, p in self.module.named_parameters() if name != EMBEDDING)

    def cache_bytes(self, capacity: int, taps: int = 0) -> int:
        """As CausalLM.cache_bytes."""
        layer = self.module.config.layer
        numbers = 2 * layer.num_hidden_layers * layer.num_key_value_heads * self.module.midlayer.self_attn.head_dim
        numbers += self.state_size
        return numbers * self.dtype.itemsize * capacity

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache of at most `capacity` entries; its `states` are the head's own outputs."""
        layers = len(self.module.decoder_layers)
        cache = KVCache(layers, capacity, self.state_size, torch.empty(0, dtype=self.dtype, device=self.device))
        cache.tap((layers,))  # the output of the last one
        return cache

    @torch.inference_mode()
    def project(self, raw: torch.Tensor) -> torch.Tensor:
        """The target's hidden states [n, layers * hidden_size] -> [n, state_size], float32."""
        return self.module.project(raw.to(self.device, self.dtype)).float()

    @torch.inference_mode()
    def step(
        self,
        cache: Any,
        tokens: Sequence[int],
        tree: TokenTree = EMPTY,
        cached_nodes: int = 0,
        states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One pass, as CausalLM.step. Returns logits [rows, vocab_size].

        states: float32 [len(tokens), state_size], projected, for each of `tokens` that of the token before it; None =
        the head's own output for the token before it, as nodes of the tree take their parent's.
        """
        work = Pass(cache, tokens, tree, cached_nodes, states=states)
        ids = tokens_of_pass(cache, tokens, tree, cached_nodes)
        sources, held = read_from(work), cache.length
        context = held - cached_nodes
        mask = visible(context, len(tokens), tree, cached_nodes)
        places = positions(context, len(tokens), tree, cached_nodes)
        rows: list[torch.Tensor] = []
        with all_or_none([cache]):
            stop = 0
            while stop < len(ids):
                start, stop = stop, min(reach(sources, held, stop), stop + self.prefill_tokens)
                inputs = self._states(work, sources, start, stop)
                seen = mask[start:stop, : held + stop]
                outputs = self._forward(cache, ids[start:stop], inputs, places[start:stop], seen)
                if (first := max(work.first_wanted, start)) < stop:
                    rows.append(self.module.logits(outputs[first - start :]))
        return torch.cat(rows)

    def step_many(self, passes: Sequence[Pass]) -> list[torch.Tensor]:
        """The passes of several sessions; the logits of each."""
        with all_or_none(p.cache for p in passes):
            return [self.step(p.cache, p.tokens, p.tree, p.cached_nodes, p.states) for p in passes]

    def _states(self, work: Pass, sources: Sequence[int], start: int, stop: int) -> torch.Tensor:
        """The states of the tokens fed from `start` to `stop`, [n, state_size]."""
        slots = torch.tensor(sources[start:stop], device=self.device)
        states: torch.Tensor = work.cache.states[slots.clamp(min=0)]
        if work.states is not None:
            given = work.states[start:stop].to(self.device, self.dtype)
            states[: len(given)] = given
        return states

    def _forward(
        self, cache: Any, ids: Sequence[int], states: torch.Tensor, places: Sequence[int], seen: torch.Tensor
    ) -> torch.Tensor:
        module, outputs = self.module, states[None]
        rotary = module.rotary(torch.tensor([places], device=self.device))
        embedded = module.embed_tokens(torch.tensor([ids], device=self.device))
        for number, layer in enumerate(module.decoder_layers):
            q, k, v = layer.attention_inputs(embedded, outputs, rotary)
            k, v = cache.update(k, v, number)
            attended = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen.to(self.device), enable_gqa=True
            )
            outputs = layer.finish(outputs, attended)
        outputs = outputs[0]
        cache.states[cache.length : cache.length + len(ids)] = module.next_states(outputs)
        cache.advance(len(ids))
        return outputs
