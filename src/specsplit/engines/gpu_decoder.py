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
    return not_llama_type(model.model) or not_plain(model.model.model.layers[0])


def not_plain(layer: Any) -> str | None:
    """Why the weights of a layer cannot be joined; None when they can."""
    plain = all(type(module) is nn.Linear for module in _projections(layer))
    return None if plain else "its linear layers are not plain ones"


def _projections(layer: Any) -> list[Any]:
    a, m = layer.self_attn, layer.mlp
    return [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]


@dataclass(frozen=True)
class Sizes:
    """heads: of queries. eps: of the norms. scale: of the products of queries and keys.

    norm_before_residual: of a head, as HeadConfig has it.
    """

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    scale: float
    norm_before_residual: bool = False


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

    windows: the sizes of sliding windows that there are, 0 = all positions. reads_states: it is a head that reads each
    token beside a state (`HeadModule`).
    """

    def __init__(
        self,
        config: Any,
        layers: Sequence[Any],
        head: Any,
        final_norm: Any,
        rotary: Any,
        embedding: Any,
        windows: Sequence[int],
        *,
        norm_output: bool = False,
    ) -> None:
        """config: of a Llama-type model. layers, head, final_norm, rotary, embedding: its modules; the projections of
        layers become views of joined matrices, so they can still be run and nothing is in memory twice. windows: of
        each layer. norm_output: of a head, as HeadConfig has it."""
        attention = layers[0].self_attn
        self.sizes = Sizes(
            config.num_attention_heads,
            config.num_key_value_heads,
            attention.head_dim,
            config.rms_norm_eps,
            getattr(attention, "scaling", attention.head_dim**-0.5),
            getattr(layers[0], "norm_before_residual", False),
        )
        self.embed = embedding
        self.num_layers = len(layers)
        self.reads_states = hasattr(layers[0], "hidden_norm")
        self._norm_output = norm_output
        self._rotary = rotary
        self._norm = final_norm.weight.detach()
        self._head = head
        self.windows = sorted(set(windows))
        self._mask_of = [self.windows.index(window) for window in windows]
        self._layers = [_weights(layer) for layer in layers]

    @classmethod
    def of(cls, source: CausalLM) -> Decoder:
        """The layers of a model that is not `unsuitable`."""
        hf = source.model
        embedding, head = hf.get_input_embeddings(), hf.get_output_embeddings()
        config, own = hf.config.get_text_config(), hf.model
        return cls(config, own.layers, head, own.norm, own.rotary_emb, embedding, source.windows())

    def rotary(self, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the first `count` positions, [count, head_dim] each."""
        device = self._norm.device
        cos, sin = self._rotary(torch.zeros(1, dtype=dtype, device=device), torch.arange(count, device=device)[None])
        return cos[0].contiguous(), sin[0].contiguous()

    def forward(
        self,
        ids: torch.Tensor,
        states: torch.Tensor | None,
        tokens: Tokens,
        caches: Sequence[torch.Tensor],
        view: tuple[int, int],
        layer: Layer,
    ) -> Iterator[torch.Tensor]:
        """The inputs of all layers, one after another, and what the last one gives, [tokens, hidden] each; of a head
        that is the next token's state. states: those that a head reads the tokens with. caches: of each layer, the rows
        of the pass's sessions (as in Pool). view: as from Pool.view. layer: `one_layer`, or the same compiled."""
        embedded = self.embed(ids)
        x, beside = (embedded, None) if states is None else (states, embedded)
        for weights, cache, number in zip(self._layers, caches, self._mask_of, strict=True):
            yield x
            mask = tokens.masks[number]
            x = layer(x, beside, tokens.cos, tokens.sin, *tokens.slots, mask, cache, view, self.sizes, weights)
            beside = None
        yield _normed(x, self._norm, self.sizes) if self._norm_output else x

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """[rows, hidden], of what `forward` gives last -> [rows, vocab]."""
        rows: torch.Tensor = self._head(outputs if self._norm_output else _normed(outputs, self._norm, self.sizes))
        return rows


def _weights(layer: Any) -> Weights:
    q, k, v, o, gate, up, down = _projections(layer)
    norms = [layer.input_layernorm, layer.post_attention_layernorm, getattr(layer, "hidden_norm", None)]
    norms += [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
    biases = [m.bias.detach() for m in (q, k, v) if m.bias is not None]
    return (
        *(None if norm is None else norm.weight.detach() for norm in norms),
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
    beside: torch.Tensor | None,
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
    """One decoder layer; see `Tokens` and `Decoder.forward`. x: [tokens, hidden]. beside: in the first layer of a head
    the embeddings, which attention reads side by side with the states x. Writes to `cache`."""
    input_norm, mlp_norm, state_norm, q_norm, k_norm, qkv, qkv_bias, o, gate_up, down = weights
    heads, kv_heads = sizes.heads, sizes.kv_heads
    fed = _normed(x if beside is None else beside, input_norm, sizes)
    if beside is not None:
        normed = _normed(x, state_norm, sizes)
        fed = torch.cat([fed, normed], -1)
        x = normed if sizes.norm_before_residual else x
    projected = F.linear(fed, qkv, qkv_bias)  # type: ignore[arg-type]
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
