"""Reading the weights of a GGUF file: which tensors it has, in which types, and where.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md is the format. Only the table of tensors is read here, which
takes a tenth of a second; the metadata (configuration, tokenizer) is read by transformers when a model is prepared.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from specsplit.errors import UserError

MAGIC, VERSIONS = b"GGUF", (2, 3)
ROPE_FREQS = "rope_freqs.weight"  # divisors of the frequencies of the position embedding
# Bytes of a metadata value by its type; 8 is text, 9 a list.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _LIST, _UINT32 = 8, 9, 4
# Architectures whose tensors have these names, by what the file calls them, and llama alone with rows of q and k that
# the converter of llama.cpp put in another order.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Tensor:
    """One tensor. type: as GGUF calls it, e.g. Q4_1; shape: of a matrix [outputs, inputs]; offset: in the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUF:
    """The table of tensors of a file. architecture: as the file calls it."""

    path: Path
    architecture: str
    tensors: dict[str, Tensor]

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def types(self) -> list[str]:
        """Types of the tensors, that of the most numbers first."""
        counts = Counter[str]()
        for tensor in self.tensors.values():
            counts[tensor.type] += math.prod(tensor.shape)
        return [kind for kind, _ in counts.most_common()]

    def stored(self, tensor: Tensor) -> Stored:
        """A tensor with its bytes, which are mapped and not read yet."""
        data = np.memmap(self.path, np.uint8, "r", tensor.offset, (tensor.nbytes,))
        return Stored(tensor.type, data.reshape(math.prod(tensor.shape[:-1]), -1), tensor.shape)


def read_gguf(path: Path) -> GGUF:
    """The table of tensors. Raises UserError for a file that is none, is cut off, or has types that cannot be read."""
    try:
        with path.open("rb") as file:
            return _read(path, file, path.stat().st_size)
    except (struct.error, UnicodeDecodeError, OverflowError, MemoryError):
        raise UserError(f"{path}: damaged or cut off in its header; fetch it again") from None


def _read(path: Path, file: BinaryIO, size: int) -> GGUF:
    if file.read(4) != MAGIC:
        raise UserError(f"{path}: not a GGUF file")
    (version,) = _numbers(file, "I")
    if version not in VERSIONS:
        raise UserError(f"{path}: version {version} of GGUF, where 2 and 3 are known")
    count, keys = _numbers(file, "QQ")
    known: dict[str, Any] = {}
    for _ in range(keys):
        key = _text(file)
        (kind,) = _numbers(file, "I")
        if key == "general.architecture" and kind == _TEXT:
            known[key] = _text(file)
        elif key == "general.alignment" and kind == _UINT32:
            (known[key],) = _numbers(file, "I")
        else:
            _skip(file, kind, size)
    found = [_tensor_info(file) for _ in range(count)]
    alignment = known.get("general.alignment", 32)
    if not alignment:
        raise UserError(f"{path}: general.alignment is 0; the file is damaged")
    start = -(-file.tell() // alignment) * alignment
    tensors = {name: _tensor(path, name, shape, kind, start + at, size) for name, shape, kind, at in found}
    if "general.architecture" not in known or not tensors:
        raise UserError(f"{path}: names no architecture or no tensors")
    return GGUF(path, known["general.architecture"], tensors)


def _numbers(file: BinaryIO, kinds: str) -> tuple[int, ...]:
    kinds = "<" + kinds
    return struct.unpack(kinds, file.read(struct.calcsize(kinds)))


def _text(file: BinaryIO) -> str:
    (length,) = _numbers(file, "Q")
    if length > 1 << 20 or len(data := file.read(length)) < length:
        raise struct.error
    return data.decode()


def _skip(file: BinaryIO, kind: int, size: int) -> None:
    """Go past a value of the metadata."""
    if kind in _SIZES:
        file.seek(_SIZES[kind], 1)
    elif kind == _TEXT:
        file.seek(_numbers(file, "Q")[0], 1)
    elif kind == _LIST:
        inner, length = _numbers(file, "IQ")
        if inner in _SIZES:
            file.seek(_SIZES[inner] * length, 1)
        else:
            for _ in range(length):
                _skip(file, inner, size)
    else:
        raise struct.error
    if file.tell() > size:
        raise struct.error


def _tensor_info(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name = _text(file)
    (dimensions,) = _numbers(file, "I")
    if not 0 < dimensions <= 8:
        raise struct.error
    shape = _numbers(file, "Q" * dimensions)[::-1]  # GGUF names the innermost first
    kind, offset = _numbers(file, "IQ")
    return name, shape, kind, offset


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, size: int) -> Tensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        quantization = GGMLQuantizationType(kind)
    except ValueError:
        raise UserError(f"{path}: tensor {name} is of type number {kind}, which is not known") from None
    block, block_bytes = GGML_QUANT_SIZES[quantization]
    if shape[-1] % block:
        raise UserError(
            f"{path}: tensor {name} has rows of {shape[-1]} numbers, no multiple of the {block} in a block of "
            f"{quantization.name}; the file is damaged"
        )
    nbytes = math.prod(shape) // block * block_bytes
    if offset + nbytes > size:
        raise UserError(
            f"{path}: cut off in tensor {name}: it ends at byte {offset + nbytes} of {size}; fetch it again"
        )
    return Tensor(name, quantization.name, tuple(shape), offset, nbytes)


# ---- as a model


def check_types(file: GGUF) -> None:
    """Raise UserError for a type that cannot be turned to numbers."""
    from gguf import GGMLQuantizationType, dequantize
    from gguf.constants import GGML_QUANT_SIZES

    for kind in file.types:
        quantization = GGMLQuantizationType[kind]
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[quantization][1]), np.uint8), quantization)
        except NotImplementedError:
            name = next(tensor.name for tensor in file.tensors.values() if tensor.type == kind)
            raise UserError(f"{file.path}: tensor {name} is of type {kind}, which cannot be read") from None


def check_model(file: GGUF, shapes: Mapping[str, tuple[int, ...]], *, tied: bool) -> None:
    """Raise UserError unless the file has exactly the tensors of a model. shapes: of its parameters, by name; tied: the
    output head has the weights of the embedding, so that the file has none for it."""
    found = {}
    for tensor in file.tensors.values():
        name = model_name(tensor.name)
        if name is None and tensor.name == ROPE_FREQS:
            continue
        if name is None or name not in shapes:
            raise UserError(f"{file.path}: tensor {tensor.name} has no place in the model that its metadata describes")
        if shapes[name] != tensor.shape:
            raise UserError(f"{file.path}: tensor {tensor.name} is {tensor.shape}, where the model has {shapes[name]}")
        found[name] = tensor
    missing = sorted(set(shapes) - set(found) - ({"lm_head.weight"} if tied else set()))
    if missing:
        raise UserError(f"{file.path}: no tensor for {missing[0]} ({len(missing)} missing)")


def rope_scaling(file: GGUF, theta: float) -> dict[str, Any]:
    """What rope_parameters lacks of a model with frequencies of its own (Llama 3.1 and later), {} when it has none.

    The file has a divisor for each frequency, transformers a formula. Raises UserError when it does not give them.
    """
    if (tensor := file.tensors.get(ROPE_FREQS)) is None:
        return {}
    divisors = file.stored(tensor).floats().astype(float)
    if np.all(divisors == 1):
        return {}
    factor, low, high, original = float(round(divisors.max())), 1.0, 4.0, 8192
    turns = original * theta ** (-np.arange(len(divisors)) / len(divisors)) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(1 / ((1 - smooth) / factor + smooth), divisors, rtol=1e-3):
        raise UserError(f"{file.path}: {ROPE_FREQS} is not as for Llama 3; take the model in Hugging Face format")
    return {
        **{"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high},
        "original_max_position_embeddings": original,
    }


def model_name(name: str) -> str | None:
    """What transformers calls a tensor of a Llama-type model; None when it knows none of this name."""
    stem, _, suffix = name.rpartition(".")
    if suffix not in ("weight", "bias"):
        return None
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{suffix}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[1].isdigit() and parts[2] in _INNER:
        return f"model.layers.{parts[1]}.{_INNER[parts[2]]}.{suffix}"
    return None


@dataclass(frozen=True)
class Stored:
    """A tensor of a model as stored. type: of GGUF; data: uint8 [rows, bytes of a row]; shape: of the numbers."""

    type: str
    data: np.ndarray
    shape: tuple[int, ...]

    def floats(self) -> np.ndarray:
        """float32, as `gguf.quants.dequantize` gives them."""
        from gguf import GGMLQuantizationType, dequantize

        kind = GGMLQuantizationType[self.type]
        found: np.ndarray = dequantize(self.data.view(np.float32) if self.type == "F32" else self.data, kind)
        return found.reshape(self.shape)


def model_tensors(file: GGUF, heads: int, kv_heads: int) -> dict[str, Stored]:
    """The tensors of a Llama-type model by the names of transformers, rows in its order.

    llama.cpp's converter pairs the rows of q and k that are rotated together; transformers wants the halves of a head.
    """
    stored = {}
    for tensor in file.tensors.values():
        if (name := model_name(tensor.name)) is None:
            continue
        stored[name] = file.stored(tensor)
        if file.architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            count, data = heads if ".q_proj." in name else kv_heads, stored[name].data
            rows = data.reshape(tensor.shape[0], -1)  # of a bias each number, float32
            order = np.arange(len(rows)).reshape(count, -1, 2).swapaxes(1, 2).reshape(-1)
            stored[name] = replace(stored[name], data=rows[order].reshape(data.shape))
    return stored
