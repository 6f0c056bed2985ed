"""The layers of a Llama-type model as operations on tensors that stay where they are.

Queries, keys and values are one product, gate and up another. Keys and values are written to their slots, and attention
looks at a view of the cache of fixed size through a mask. With few tokens it is two products around a softmax, split
over the blocks of the cache where there is more than one, so that a single session's long text keeps all of a GPU busy
(as in Flash-Decoding, Dao et al. 2023); with many it is scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from specsplit.engines.architectures import not_llama_type
from specsplit.engines.transformers import CausalLM

MOST_SPLIT = 64  # tokens of a session, in passes with attention by products
Weights = tuple[torch.Tensor | None, ...]
Layer = Callable[..., torch.Tensor]


def unsuitable(model: CausalLM) -> str | None:
    """Why a model cannot be run by these layers; None when it can."""
    if reason := not_llama_type(model.model):
        return reason
    if any(type(module) is not nn.Linear for module in _projections(model.model.model.layers[0])):
        return "its linear layers are not plain ones"
    return None


def _projections(layer: Any) -> list[Any]:
    a, m = layer.self_attn, layer.mlp
    return [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]


@dataclass(frozen=True)
class Sizes:
    """heads: of queries. eps: of the norms. scale: of the products of queries and keys."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    scale: float


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of a pass are, `count` of each of some sessions, flattened to [sessions * count].

    cos, sin: of their positions [tokens, head_dim]. slots: (session, block, slot of the block) that each goes to.
    masks: from `mask_of`, one for each of Decoder.windows.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    slots: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    masks: Sequence[torch.Tensor]


class Decoder:
    """The weights of a model, and passes through its layers.

    windows: the sizes of sliding windows that there are, 0 = all positions.
    source: its projections become views of joined matrices, so it can still be run and nothing is in memory twice.
    """

    def __init__(self, source: CausalLM) -> None:
        hf, config = source.model, source.model.config.get_text_config()
        attention = hf.model.layers[0].self_attn
        self.sizes = Sizes(
            config.num_attention_heads,
            config.num_key_value_heads,
            attention.head_dim,
            config.rms_norm_eps,
            getattr(attention, "scaling", attention.head_dim**-0.5),
        )
        self.embed = source.model.get_input_embeddings()
        self.num_layers = len(hf.model.layers)
        self._rotary = hf.model.rotary_emb
        self._norm = hf.model.norm.weight.detach()
        self._head = source.model.get_output_embeddings()
        windows = source.windows()
        self.windows = sorted(set(windows))
        self._mask_of = [self.windows.index(window) for window in windows]
        self._layers = [_weights(layer) for layer in hf.model.layers]

    def rotary(self, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the first `count` positions, [count, head_dim] each."""
        device = self._norm.device
        cos, sin = self._rotary(torch.zeros(1, dtype=dtype, device=device), torch.arange(count, device=device)[None])
        return cos[0].contiguous(), sin[0].contiguous()

    def forward(
        self, ids: torch.Tensor, tokens: Tokens, caches: Sequence[torch.Tensor], view: tuple[int, int], layer: Layer
    ) -> Iterator[torch.Tensor]:
        """The inputs of all layers, one after another, and what the last one gives, [tokens, hidden] each. caches: of
        each layer, the rows of the pass's sessions (as in Pool). view: as from Pool.view. layer: `one_layer`, or the
        same compiled."""
        x = self.embed(ids)
        for weights, cache, mask in zip(self._layers, caches, self._mask_of, strict=True):
            yield x
            x = layer(x, tokens.cos, tokens.sin, *tokens.slots, tokens.masks[mask], cache, view, self.sizes, weights)
        yield x

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> [rows, vocab]."""
        rows: torch.Tensor = self._head(F.rms_norm(states, states.shape[-1:], self._norm, self.sizes.eps))
        return rows


def _weights(layer: Any) -> Weights:
    q, k, v, o, gate, up, down = _projections(layer)
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    heads = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
    biases = [m.bias.detach() for m in (q, k, v) if m.bias is not None]
    return (
        *(norm.weight.detach() for norm in norms),
        *(None if norm is None else norm.weight.detach() for norm in heads),
        _joined(q, k, v),
        torch.cat(biases) if biases else None,
        o.weight.detach(),
        _joined(gate, up),
        down.weight.detach(),
    )


def _joined(*modules: Any) -> torch.Tensor:
    """The weights as one matrix, of which those of the modules become parts."""
    joined = torch.cat([module.weight.detach() for module in modules])
    start = 0
    for module in modules:
        end = start + len(module.weight)
        module.weight = nn.Parameter(joined[start:end], requires_grad=False)
        start = end
    return joined


def one_layer(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    session: torch.Tensor,
    block: torch.Tensor,
    slot: torch.Tensor,
    mask: torch.Tensor,
    cache: torch.Tensor,
    view: tuple[int, int],
    sizes: Sizes,
    weights: Weights,
) -> torch.Tensor:
    """One decoder layer; see `Tokens` and `Decoder.forward`. x: [tokens, hidden]. Writes to `cache`."""
    input_norm, mlp_norm, q_norm, k_norm, qkv, qkv_bias, o, gate_up, down = weights
    heads, kv_heads = sizes.heads, sizes.kv_heads
    projected = F.linear(_normed(x, input_norm, sizes), qkv, qkv_bias)  # type: ignore[arg-type]
    projected = projected.view(len(x), heads + 2 * kv_heads, sizes.head_dim)
    turned, values = projected[:, : heads + kv_heads], projected[:, heads + kv_heads :]
    if q_norm is not None:
        queries, keys = turned.split([heads, kv_heads], 1)
        turned = torch.cat([_normed(queries, q_norm, sizes), _normed(keys, k_norm, sizes)], 1)
    first, second = turned.chunk(2, -1)
    turned = turned * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    queries, keys = turned.split([heads, kv_heads], 1)
    cache[:, session, block, :, slot] = torch.stack([keys, values], 1)
    x = x + F.linear(_attended(queries, cache, mask, view, sizes), o)  # type: ignore[arg-type]
    gate, up = F.linear(_normed(x, mlp_norm, sizes), gate_up).chunk(2, -1)  # type: ignore[arg-type]
    return x + F.linear(F.silu(gate) * up, down)  # type: ignore[arg-type]


def _normed(x: torch.Tensor, weight: torch.Tensor | None, sizes: Sizes) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, sizes.eps)


def mask_of(visible: torch.Tensor, view: tuple[int, int], sizes: Sizes, dtype: torch.dtype) -> torch.Tensor:
    """What attention adds to its scores. visible: bool [sessions, count, slots of the view]."""
    sessions, count, slots = visible.shape
    group = sizes.heads // sizes.kv_heads
    # Half of the lowest number, so that a sum with it stays finite in float16 as well.
    mask = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min / 2)
    mask = mask[:, None].expand(sessions, group, count, slots).reshape(sessions, 1, group * count, slots)
    if count > MOST_SPLIT:
        return mask
    return mask.view(sessions, 1, group * count, *view).permute(0, 3, 1, 2, 4).contiguous()


def _attended(
    queries: torch.Tensor, cache: torch.Tensor, mask: torch.Tensor, view: tuple[int, int], sizes: Sizes
) -> torch.Tensor:
    """[tokens, heads, head_dim] -> [tokens, heads * head_dim]. Heads that share keys are taken as more queries."""
    sessions, (blocks, seen) = len(mask), view
    count, group, dim = len(queries) // sessions, sizes.heads // sizes.kv_heads, sizes.head_dim
    q = queries.view(sessions, count, sizes.kv_heads, group, dim).permute(0, 2, 3, 1, 4)
    q = q.reshape(sessions, sizes.kv_heads, group * count, dim)
    k, v = cache[:, :, :blocks, :, :seen].unbind(0)  # [sessions, blocks, kv_heads, seen, dim]
    if count > MOST_SPLIT:
        k, v = (each.transpose(1, 2).reshape(sessions, sizes.kv_heads, blocks * seen, dim) for each in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=sizes.scale)
    else:
        scores = torch.matmul((q * sizes.scale)[:, None], k.transpose(-1, -2)) + mask
        parts = torch.matmul(scores.softmax(-1), v)  # [sessions, blocks, kv_heads, group * count, dim]
        if blocks > 1:
            shares = scores.float().logsumexp(-1, keepdim=True).softmax(1)
            out = (parts * shares).sum(1).to(parts.dtype)
        else:
            out = parts[:, 0]
    out = out.view(sessions, sizes.kv_heads, group, count, dim).permute(0, 3, 1, 2, 4)
    return out.reshape(sessions * count, sizes.heads * dim)
