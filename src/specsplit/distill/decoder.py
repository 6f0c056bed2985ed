"""A plain batched decoder for the writer: several texts a pass, a cache of fixed size, rows that end leave it.

What training needs of a text comes from the very passes that write it: the target's likeliest tokens, and its hidden
states. Llama-type models of transformers; their own modules compute everything but attention.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch.nn import functional as F

from specsplit.engines.architectures import LLAMA_TYPE
from specsplit.engines.transformers import CausalLM
from specsplit.errors import UserError

STATES_DTYPE = torch.bfloat16
PREFILL_TOKENS = 1 << 12  # of a pass over prompts
BLOCK = 256  # tokens
CROWDED = 0.8  # share of the rows in the cache that must still write; below it the others leave


@dataclass(frozen=True)
class Answer:
    """tokens: what follows a prompt. top_ids, top_log_probs: [tokens, k], the target's likeliest at each of them.
    states: [prompt + tokens - 1, layers, hidden], STATES_DTYPE, those of all tokens but the last, which is not read."""

    tokens: list[int]
    top_ids: torch.Tensor
    top_log_probs: torch.Tensor
    states: torch.Tensor


class BatchDecoder:
    """Continues texts, many at once. Raises UserError for a model that is none of LLAMA_TYPE."""

    def __init__(self, model: CausalLM) -> None:
        hf = model.model
        if type(hf).__name__ not in LLAMA_TYPE:
            raise UserError(
                f"training text is written by one of {', '.join(LLAMA_TYPE)}; the target is a {type(hf).__name__}"
            )
        self._model, self._head, self._windows, self.device = hf.model, hf.lm_head, model.windows(), model.device

    @torch.inference_mode()
    def generate(
        self,
        rows: Sequence[Sequence[int]],
        count: int,
        temperature: float,
        stop: Collection[int],
        seed: int,
        *,
        top_k: int = 0,
        layers: Sequence[int] = (),
    ) -> list[Answer]:
        """At most `count` tokens after each row, the first of `stop` included; greedy at temperature 0.

        top_k: likeliest tokens to note at each. layers: those whose inputs are noted as hidden states.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        ends = torch.tensor(sorted(stop) or [-1], device=self.device)
        cache = _Cache(self._model, rows, count, layers, self._windows)
        hidden = cache.read(rows)
        tokens = torch.full((len(rows), count), -1, device=self.device)
        top_ids = tokens.new_zeros(len(rows), count, top_k)
        log_probs = torch.zeros(len(rows), count, top_k, device=self.device)
        over = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        for written in range(count):
            logits = self._head(self._model.norm(hidden)).float()
            token = _choose(logits, temperature, generator)
            top = logits.topk(top_k, dim=-1)
            log_probs[cache.number, written] = top.values - logits.logsumexp(-1, keepdim=True)
            top_ids[cache.number, written] = top.indices
            tokens[cache.number, written] = torch.where(over, -1, token)
            over = over | torch.isin(token, ends)
            going = (~over).nonzero().squeeze(-1)
            if written + 1 == count or not len(going):
                break
            if len(going) < CROWDED * len(over):
                cache.keep(going)
                token, over = token[going], over[going]
            hidden = cache.feed(token)
        lengths = (tokens >= 0).sum(-1).tolist()
        return [
            Answer(
                tokens[i, :n].tolist(),
                top_ids[i, :n].cpu(),
                log_probs[i, :n].cpu(),
                cache.states[i, : len(row) + n - 1].cpu(),
            )
            for i, (row, n) in enumerate(zip(rows, lengths, strict=True))
        ]


class _Cache:
    """Keys and values of the rows that still write, [layers, rows, kv_heads, slots, head_dim]; a token's slot is its
    position. number: of each row. length: its tokens. states: of all rows, [rows, slots, layers wanted, hidden]."""

    def __init__(
        self, model: Any, rows: Sequence[Sequence[int]], count: int, layers: Sequence[int], windows: Sequence[int]
    ) -> None:
        weight = model.embed_tokens.weight
        self._model, self._layers, self._windows = model, list(layers), windows
        slots = max(map(len, rows)) + count
        attention = model.layers[0].self_attn
        self._head_dim = attention.head_dim
        shape = (len(model.layers), len(rows), attention.k_proj.out_features // self._head_dim, slots, self._head_dim)
        self.keys, self.values = weight.new_zeros(shape), weight.new_zeros(shape)  # what is masked must be finite
        self.number = torch.arange(len(rows), device=weight.device)
        self.length = torch.tensor([len(row) for row in rows], device=weight.device)
        self.states = weight.new_empty((len(rows), slots, len(layers), weight.shape[1]), dtype=STATES_DTYPE)
        cos, sin = model.rotary_emb(weight, torch.arange(slots, device=weight.device)[None])
        self._cos, self._sin = cos[0], sin[0]

    def read(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read the prompts, what all begin with only once; the residual stream after the last token of each."""
        same = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
        shared = min(sum(1 for _ in same), min(map(len, rows)) - 1)
        device = self.keys.device
        if shared:
            self._pass(torch.tensor([rows[0][:shared]], device=device), slice(0, 1), 0)
            for cache in (self.keys, self.values):
                cache[:, 1:, :, :shared] = cache[:, :1, :, :shared]
            self.states[1:, :shared] = self.states[:1, :shared]
        width = max(map(len, rows)) - shared
        ids = torch.tensor([[*row[shared:], *[0] * (width + shared - len(row))] for row in rows], device=device)
        at_once = max(1, PREFILL_TOKENS // width)
        found = []
        for start in range(0, len(rows), at_once):
            part = slice(start, min(len(rows), start + at_once))
            last = self.length[part] - shared - 1
            hidden = self._pass(ids[part], part, shared)
            found.append(hidden[torch.arange(len(last), device=device), last])
        return torch.cat(found)

    def _pass(self, ids: torch.Tensor, rows: slice, start: int) -> torch.Tensor:
        """Padded at the right, whose slots are written over before they are seen. ids: [rows, width]."""
        end = start + ids.shape[1]
        place = torch.arange(end, device=ids.device)
        distance = place[start:, None] - place[None]
        cos, sin = self._cos[start:end], self._sin[start:end]
        x = self._model.embed_tokens(ids)
        for n, (layer, window) in enumerate(zip(self._model.layers, self._windows, strict=True)):
            self._note(n, x, (rows, slice(start, end)))
            query, key, value = self._projections(layer, x, cos[:, None], sin[:, None])
            self.keys[n, rows, :, start:end] = key.transpose(1, 2)
            self.values[n, rows, :, start:end] = value.transpose(1, 2)
            group = query.shape[2] // key.shape[2]
            keys, values = (cache[n, rows, :, :end].repeat_interleave(group, 1) for cache in (self.keys, self.values))
            seen = (distance >= 0) & (distance < window) if window else distance >= 0
            mixed = F.scaled_dot_product_attention(
                query.transpose(1, 2), keys, values, attn_mask=seen, scale=layer.self_attn.scaling
            )
            x = self._finish(layer, x, mixed.transpose(1, 2))
        return x

    def feed(self, token: torch.Tensor) -> torch.Tensor:
        """One more token of every row; the residual stream after it, [rows, hidden]."""
        rows, length = torch.arange(len(token), device=token.device), self.length
        seen = int(length.max()) + 1
        distance = length[:, None] - torch.arange(seen, device=token.device)
        cos, sin = self._cos[length][:, None], self._sin[length][:, None]
        x = self._model.embed_tokens(token)
        masks = {w: self._mask((distance >= 0) & (distance < (w or seen))) for w in set(self._windows)}
        for n, (layer, window) in enumerate(zip(self._model.layers, self._windows, strict=True)):
            self._note(n, x, (self.number, length))
            query, key, value = self._projections(layer, x, cos, sin)
            self.keys[n, rows, :, length], self.values[n, rows, :, length] = key, value
            # Heads that share keys count as queries at one place.
            grouped = query.view(len(token), key.shape[1], -1, self._head_dim)
            mixed = F.scaled_dot_product_attention(
                grouped,
                self.keys[n, :, :, :seen],
                self.values[n, :, :, :seen],
                attn_mask=masks[window].expand(-1, *grouped.shape[1:3], -1),
                scale=layer.self_attn.scaling,
            )
            x = self._finish(layer, x, mixed)
        self.length = length + 1
        return x

    def keep(self, rows: torch.Tensor) -> None:
        """Let all other rows leave."""
        self.number, self.length = self.number[rows], self.length[rows]
        self.keys, self.values = self.keys.index_select(1, rows), self.values.index_select(1, rows)

    def _mask(self, seen: torch.Tensor) -> torch.Tensor:
        zeros = self.keys.new_zeros(seen.shape)
        return zeros.masked_fill_(~seen, float("-inf"))[:, None, None]

    def _note(self, layer: int, x: torch.Tensor, where: tuple[Any, Any]) -> None:
        if layer in self._layers:
            self.states[(*where, self._layers.index(layer))] = x.to(STATES_DTYPE)

    def _projections(self, layer: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values, [..., heads, head_dim], the first two turned to their positions."""
        attention = layer.self_attn
        x = layer.input_layernorm(x)
        found = []
        for name in ("q", "k", "v"):
            y = getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, self._head_dim))
            if hasattr(attention, f"{name}_norm"):
                y = getattr(attention, f"{name}_norm")(y)
            if name != "v":
                first, second = y.chunk(2, -1)
                y = y * cos + torch.cat([-second, first], -1) * sin
            found.append(y)
        return found

    def _finish(self, layer: Any, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The residual stream after the layer. mixed: [..., heads, head_dim], or with the heads in groups."""
        x = x + layer.self_attn.o_proj(mixed.reshape(*x.shape[:-1], -1))
        return x + layer.mlp(layer.post_attention_layernorm(x))


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """A token of each row, [rows]: a block of the vocabulary is drawn, then a token of it, as short sums are fast."""
    if not temperature:
        return logits.argmax(-1)
    blocks = F.pad((logits / temperature).softmax(-1), (0, -logits.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    block = _draw(blocks.sum(-1), generator)
    return block * BLOCK + _draw(blocks[torch.arange(len(block), device=block.device), block], generator)


def _draw(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An index of each row of weights that are not negative, [rows]; never of a weight of zero."""
    sums = weights.cumsum(-1)
    drawn = torch.rand(len(sums), 1, generator=generator, device=sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, drawn, right=True).squeeze(-1).clamp_(max=weights.shape[-1] - 1)
