"""The network of a head that drafts from the target's hidden states (EAGLE-3, Li et al. 2025), to run and to train.

Token j is read with a state of token j - 1: a projection of the target's hidden states, or, of a token that the target
has not run yet, the head's own output. One decoder layer attends over embedding and state side by side; its output is
the next state and, after a norm, gives the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from specsplit.io import write_json
from specsplit.models.head_config import HeadConfig, config_json
from specsplit.models.head_files import EMBEDDING, read_head, target_embedding

WEIGHTS = "model.safetensors"
Pair = tuple[torch.Tensor, torch.Tensor]


class HeadAttention(nn.Module):
    """The projections of attention, which in the first layer have inputs twice as wide as elsewhere."""

    def __init__(self, config: Any, inputs: int, qk_norm: bool) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.attention_bias
        self.head_dim: int = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        self.q_proj = nn.Linear(inputs, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(inputs, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(inputs, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=bias)
        if qk_norm:
            self.q_norm, self.k_norm = (LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps) for _ in range(2))


class HeadLayer(nn.Module):
    """A decoder layer. Its modules have the names of the original checkpoints.

    first: it attends over embedding and state side by side; one after it is as in any model.
    """

    def __init__(self, config: HeadConfig, first: bool = True) -> None:
        super().__init__()
        hidden, eps = config.layer.hidden_size, config.layer.rms_norm_eps
        self.first, self.norm_before_residual = first, first and config.norm_before_residual
        self.self_attn = HeadAttention(config.layer, 2 * hidden if first else hidden, config.qk_norm)
        self.mlp = LlamaMLP(config.layer)
        self.input_layernorm = LlamaRMSNorm(hidden, eps=eps)
        if first:
            self.hidden_norm = LlamaRMSNorm(hidden, eps=eps)
        self.post_attention_layernorm = LlamaRMSNorm(hidden, eps=eps)

    def attention_inputs(
        self, embedded: torch.Tensor, states: torch.Tensor, rotary: Pair
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [batch, heads, n, head_dim], turned to their positions.

        embedded, states: [batch, n, hidden]; after the first layer states are what the one before gave, and nothing
        else is read. rotary: of `HeadModule.rotary`.
        """
        if self.first:
            joined = torch.cat([self.input_layernorm(embedded), self.hidden_norm(states)], dim=-1)
        else:
            joined = self.input_layernorm(states)
        attention = self.self_attn
        q, k, v = (
            projection(joined).unflatten(-1, (-1, attention.head_dim))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        return q, k, v

    def finish(self, states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The output [batch, n, hidden]. states: as in `attention_inputs`; attended: [batch, heads, n, head_dim]."""
        residual = self.hidden_norm(states) if self.norm_before_residual else states
        residual = residual + self.self_attn.o_proj(attended.transpose(1, 2).flatten(-2))
        return residual + self.mlp(self.post_attention_layernorm(residual))

    def forward(
        self,
        embedded: torch.Tensor,
        states: torch.Tensor,
        rotary: Pair,
        mask: torch.Tensor | None = None,
        past: Pair | None = None,
    ) -> tuple[torch.Tensor, Pair]:
        """Output [batch, n, hidden], and the keys and values of `past` and of these tokens, [batch, kv_heads, .., dim].

        mask: boolean, True where a token may attend, broadcast to [batch, heads, n, keys]; None = causal, without past.
        """
        q, k, v = self.attention_inputs(embedded, states, rotary)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.finish(states, attended), (k, v)


class HeadModule(nn.Module):
    """A head with random weights. Parameters are named as in the original checkpoints, or in those of `speculators`.

    layers: after the first one, `midlayer`, by their numbers.

    d2t: for every row of the output head the target's token less the row. t2d: whether a row has the token.
    embed_tokens: of the target; its weights may be shared with it.
    """

    d2t: torch.Tensor
    t2d: torch.Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        hidden = config.layer.hidden_size
        self.config = config
        self.embed_tokens = nn.Embedding(config.layer.vocab_size, hidden)
        sizes = config.states * [config.target_hidden_size]
        if config.norm_before_fc:
            self.input_norm = LlamaRMSNorm(sum(sizes), eps=config.layer.rms_norm_eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(LlamaRMSNorm(size, eps=config.layer.rms_norm_eps) for size in sizes)
        self.fc = nn.Linear(sum(sizes), hidden, bias=False)
        self.midlayer = HeadLayer(config)
        self.layers = nn.ModuleDict(
            {str(number): HeadLayer(config, first=False) for number in range(1, config.layer.num_hidden_layers)}
        )
        self.norm = LlamaRMSNorm(hidden, eps=config.layer.rms_norm_eps)
        self.lm_head = nn.Linear(hidden, config.vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(config.vocab_size, dtype=torch.long))
        self.register_buffer("t2d", torch.zeros(config.layer.vocab_size, dtype=torch.bool))
        self.set_tokens(range(config.vocab_size))
        self._rotary = (LlamaRotaryEmbedding(config.layer),)  # no submodule: its frequencies stay float32

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    @property
    def decoder_layers(self) -> list[Any]:
        """Each HeadLayer in its order."""
        return [self.midlayer, *self.layers.values()]

    def set_tokens(self, tokens: Any) -> None:
        """Name the target's token of every row of the output head."""
        targets = torch.tensor(list(tokens))
        self.d2t = targets - torch.arange(len(targets))
        self.t2d = torch.zeros(self.config.layer.vocab_size, dtype=torch.bool)
        self.t2d[targets] = True

    @property
    def position_embedding(self) -> LlamaRotaryEmbedding:
        return self._rotary[0]

    def rotary(self, positions: torch.Tensor) -> Pair:
        """Cosines and sines [batch, n, head_dim] of positions [batch, n]; token 1 of a text, the first, is at 0."""
        cos, sin = self._rotary[0](self.norm.weight, positions)
        return cos, sin

    def project(self, raw: torch.Tensor) -> torch.Tensor:
        """The target's hidden states [.., states * target_hidden_size], side by side -> one state [.., hidden]."""
        if self.config.norm_before_fc:
            raw = self.input_norm(raw)
        if self.config.fc_norm:
            parts = raw.split(self.config.target_hidden_size, dim=-1)
            raw = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        state: torch.Tensor = self.fc(raw)
        return state

    def next_states(self, outputs: torch.Tensor) -> torch.Tensor:
        """Outputs of the layer -> the states with which the tokens after them are read."""
        return self.norm(outputs) if self.config.norm_output else outputs

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """[.., hidden] outputs of the layer -> [.., vocab_size]."""
        logits: torch.Tensor = self.lm_head(self.norm(outputs))
        return logits


def load_head(folder: Path, dtype: torch.dtype, target: Path | None = None) -> HeadModule:
    """The head in a folder, of either published layout, on the CPU.

    target: a folder of the target, whose embedding is read when the head has none. Raises UserError for a head that
    cannot be read, by the file, key or tensor that is wrong.
    """
    config, tensors, tokens = read_head(folder)
    with torch.device("meta"):
        module = HeadModule(config)
    if EMBEDDING not in tensors:
        tensors[EMBEDDING] = target_embedding(target, config, folder)
    module.load_state_dict({name: t.to(dtype) for name, t in tensors.items()}, strict=False, assign=True)
    module.set_tokens(tokens)
    module._rotary = (LlamaRotaryEmbedding(config.layer),)
    return module


def save_head(module: HeadModule, folder: Path, dtype: torch.dtype, *, with_embedding: bool = False) -> None:
    """Write a head in the original layout, the weights last. The same head gives the same bytes.

    with_embedding: write `embed_tokens.weight` too; else whoever loads the head takes it from the target.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config_json(module.config))
    tensors = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in sorted(module.state_dict().items())
        if with_embedding or name != EMBEDDING
    }
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes it readable by its owner alone
