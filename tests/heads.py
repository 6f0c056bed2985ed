"""Made-up heads that read the target's hidden states, in each published layout, and a plain computation of what they
say, written from the published code and sharing nothing with the package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, HEADS, KV_HEADS, DIM, INNER, VOCAB, ROWS = 32, 4, 2, 8, 48, 128, 40
EPS, THETA = 1e-5, 5000.0
LAYER = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "hidden_act": "silu",
    "rms_norm_eps": EPS,
    "rope_theta": THETA,
    "max_position_embeddings": 256,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
}
LAYERS = [0, 1, 2]


def head_config(layout: str, **changes: Any) -> dict[str, Any]:
    """config.json as it is published. changes: of flags, or of keys of the layer."""
    layer = {key: changes.pop(key, value) for key, value in LAYER.items()}
    if layout == "original":
        return {**layer, "architectures": ["LlamaForCausalLM"], "draft_vocab_size": ROWS, **changes}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "org/target"}},
        "transformer_layer_config": layer,
        "draft_vocab_size": ROWS,
        "eagle_aux_hidden_state_layer_ids": LAYERS,
        "norm_before_residual": True,
        **changes,
    }


def head_tensors(seed: int = 0, hidden: int = HIDDEN, bias: bool = False, layers: int = 1) -> dict[str, torch.Tensor]:
    """Random tensors by the names of the original checkpoints, those of every flag among them. layers: those after the
    first, which only `speculators` has, are called as there."""
    draw = torch.Generator().manual_seed(seed)

    def matrix(*shape: int, scale: float = 0.3) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * scale

    def norm(size: int) -> torch.Tensor:
        return 1 + matrix(size)

    a, m = "midlayer.self_attn.", "midlayer.mlp."
    tensors = {
        "embed_tokens.weight": matrix(VOCAB, hidden, scale=1.0),
        "fc.weight": matrix(hidden, 3 * HIDDEN),
        "input_norm.weight": norm(3 * HIDDEN),
        **{f"fc_norm.{i}.weight": norm(HIDDEN) for i in range(3)},
        "midlayer.input_layernorm.weight": norm(hidden),
        "midlayer.hidden_norm.weight": norm(hidden),
        "midlayer.post_attention_layernorm.weight": norm(hidden),
        f"{a}q_proj.weight": matrix(HEADS * DIM, 2 * hidden),
        f"{a}k_proj.weight": matrix(KV_HEADS * DIM, 2 * hidden),
        f"{a}v_proj.weight": matrix(KV_HEADS * DIM, 2 * hidden),
        f"{a}o_proj.weight": matrix(hidden, HEADS * DIM),
        f"{a}q_norm.weight": norm(DIM),
        f"{a}k_norm.weight": norm(DIM),
        f"{m}gate_proj.weight": matrix(INNER, hidden),
        f"{m}up_proj.weight": matrix(INNER, hidden),
        f"{m}down_proj.weight": matrix(hidden, INNER),
        "norm.weight": norm(hidden),
        "lm_head.weight": matrix(ROWS, hidden),
    }
    if bias:
        tensors |= {f"{a}{p}.bias": matrix(len(tensors[f"{a}{p}.weight"])) for p in ("q_proj", "k_proj", "v_proj")}
        tensors[f"{a}o_proj.bias"] = torch.zeros(hidden)
    for number in range(1, layers):
        for name in [name for name in tensors if name.startswith("midlayer.") and "hidden_norm" not in name]:
            wide = 2 if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) else 1
            shape = list(tensors[name].shape)
            own = norm(*shape) if len(shape) == 1 else matrix(shape[0], shape[1] // wide)
            tensors[name.replace("midlayer.", f"layers.{number}.")] = own
    tokens = torch.randperm(VOCAB, generator=draw)[:ROWS].sort().values
    tensors["d2t"] = tokens - torch.arange(ROWS)
    tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, tokens, True)
    return tensors


def write_head(
    folder: Path, layout: str, tensors: dict[str, torch.Tensor], *, pickled: bool = False, **changes: Any
) -> dict[str, Any]:
    """Write a head without the tensors that its flags do not ask for; returns its config.json."""
    config = head_config(layout, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    unused = () if config.get("norm_before_fc") else ("input_norm.",)
    unused += () if config.get("fc_norm") else ("fc_norm.",)
    if not has_head_norms(config):
        unused += (".q_norm.", ".k_norm.")
    kept = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in unused)}
    if layout == "speculators":
        kept = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in kept.items()}
    if pickled:
        torch.save(kept, folder / "pytorch_model.bin")
    else:
        save_file(kept, folder / "model.safetensors")
    return config


def has_head_norms(config: dict[str, Any]) -> bool:
    return config.get("transformer_layer_config", {}).get("model_type") == "qwen3"


class PlainHead:
    """What a head computes, a token at a time; every text from its beginning."""

    def __init__(self, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        self.w = {name: tensor.float() for name, tensor in tensors.items()}
        self.flags = {
            flag for flag in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output") if config.get(flag)
        }
        self.head_norms = has_head_norms(config)
        after = sorted({name[:9] for name in tensors if name.startswith("layers.")})
        self.layers = ["midlayer.", *after]

    @staticmethod
    def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight

    def project(self, raw: torch.Tensor) -> torch.Tensor:
        if "norm_before_fc" in self.flags:
            raw = self.rms(raw, self.w["input_norm.weight"])
        if "fc_norm" in self.flags:
            parts = raw.split(HIDDEN, -1)
            raw = torch.cat([self.rms(part, self.w[f"fc_norm.{i}.weight"]) for i, part in enumerate(parts)], -1)
        return raw @ self.w["fc.weight"].T

    def read(self, tokens: Sequence[int], states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The logits after the last of `tokens`, the first of which stands at position 0, and all the states that were
        read: the given ones, and then the head's own."""
        keys: list[list[torch.Tensor]] = [[] for _ in self.layers]
        values: list[list[torch.Tensor]] = [[] for _ in self.layers]
        read = list(states)
        output = torch.zeros(0)
        for position, token in enumerate(tokens):
            output = read[position]
            for layer, *held in zip(self.layers, keys, values, strict=True):
                output = self._layer(layer, self.w["embed_tokens.weight"][token], output, position, *held)
            if position + 1 >= len(read):
                own = self.rms(output, self.w["norm.weight"]) if "norm_output" in self.flags else output
                read.append(own)
        return self.rms(output, self.w["norm.weight"]) @ self.w["lm_head.weight"].T, read

    def _layer(
        self, layer: str, embedded: torch.Tensor, state: torch.Tensor, position: int, keys: list[Any], values: list[Any]
    ) -> torch.Tensor:
        w, a = self.w, f"{layer}self_attn."
        if layer == "midlayer.":
            normed = self.rms(state, w["midlayer.hidden_norm.weight"])
            residual = normed if "norm_before_residual" in self.flags else state
            both = torch.cat([self.rms(embedded, w["midlayer.input_layernorm.weight"]), normed])
        else:
            residual, both = state, self.rms(state, w[f"{layer}input_layernorm.weight"])

        def heads(name: str, turned: bool) -> torch.Tensor:
            out = both @ w[f"{a}{name}.weight"].T + w.get(f"{a}{name}.bias", torch.zeros(1))
            out = out.view(-1, DIM)
            if not turned:
                return out
            if self.head_norms:
                out = self.rms(out, w[f"{a}{name[0]}_norm.weight"])
            angle = position * THETA ** (-torch.arange(0, DIM, 2).double() / DIM)
            cos, sin = angle.cos().float(), angle.sin().float()
            x, y = out[:, : DIM // 2], out[:, DIM // 2 :]
            return torch.cat([x * cos - y * sin, y * cos + x * sin], -1)

        q = heads("q_proj", True)
        keys.append(heads("k_proj", True))
        values.append(heads("v_proj", False))
        attended = []
        for head in range(HEADS):
            own = head // (HEADS // KV_HEADS)
            scores = torch.stack([k[own] for k in keys]) @ q[head] / DIM**0.5
            attended.append(scores.softmax(0) @ torch.stack([v[own] for v in values]))
        x = residual + torch.cat(attended) @ w[f"{a}o_proj.weight"].T
        inner = self.rms(x, w[f"{layer}post_attention_layernorm.weight"])
        gate, up = inner @ w[f"{layer}mlp.gate_proj.weight"].T, inner @ w[f"{layer}mlp.up_proj.weight"].T
        return x + (gate * torch.sigmoid(gate) * up) @ w[f"{layer}mlp.down_proj.weight"].T
