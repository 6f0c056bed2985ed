"""GGUF files of tiny models with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

SCALES_AT = {"Q4_0": [0], "Q8_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}


def random_blocks(kind: str, rows: int, inputs: int, random: np.random.Generator) -> np.ndarray:
    """Bytes of a matrix in blocks of any content, with small scales."""
    unit, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = random.integers(0, 256, (rows, inputs // unit, size), np.uint8)
    for at in SCALES_AT[kind]:
        scales = (random.standard_normal((rows, inputs // unit, 1)) * 2e-3).astype(np.float16)
        blocks[:, :, at : at + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


def write_gguf(
    path: Path,
    kinds: Mapping[str, str] | None = None,
    *,
    architecture: str = "llama",
    hidden: int = 32,
    ffn: int = 64,
    heads: int = 4,
    kv_heads: int = 4,
    tied: bool = True,
    extra: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """A quantized llama of one layer with byte-level BPE; returns its dequantized down_proj.

    kinds: types of tensors by their names without layer and suffix (e.g. ffn_down), else Q8_0. extra: more tensors.
    """
    random = np.random.default_rng(0)
    words = ["<unk>", "<s>", "<end>", *sorted(ByteLevel.alphabet()), "ab"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(words) - 3))
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}<end>")
    kv = hidden // heads * kv_heads
    layer = {"attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden)}
    layer |= {"attn_output": (hidden, hidden), "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden)}
    layer |= {"ffn_down": (hidden, ffn)}
    shapes = {"token_embd.weight": (len(words), hidden), **{f"blk.0.{k}.weight": s for k, s in layer.items()}}
    if not tied:
        shapes["output.weight"] = shapes["token_embd.weight"]
    down = np.empty(0)
    for name, shape in shapes.items():
        stem = name.removeprefix("blk.0.").removesuffix(".weight")
        kind = gguf.GGMLQuantizationType[(kinds or {}).get(stem, "Q8_0")]
        data = random.standard_normal(shape, dtype=np.float32)
        written = kind.name not in ("Q4_K", "Q6_K")  # which the package only reads
        data = gguf.quantize(data, kind) if written else random_blocks(kind.name, *shape, random)
        writer.add_tensor(name, data, raw_dtype=kind)
        if stem == "ffn_down":
            down = gguf.dequantize(data, kind)
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        writer.add_tensor(name, np.ones(hidden, dtype=np.float32))
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return down
