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

from specsplit.errors import UserError, shortened
from specsplit.io import refuse_stand_in

MAGIC, VERSIONS = b"GGUF", (2, 3)
ROPE_FREQS = "rope_freqs.weight"  # divisors of the frequencies of the position embedding
# Metadata values by their types, as `struct` calls them.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
MOST_TEXT = 1 << 26  # bytes of a text, and texts of a list
MOST_LAYERS = 2048  # lists of so many are made when a configuration is read
# Keys that say how large a model is, after its architecture, and the most that is read.
SIZES = {
    **{"block_count": MOST_LAYERS, "context_length": 1 << 32, "embedding_length": 1 << 24},
    **{"feed_forward_length": 1 << 24, "attention.head_count": 1 << 16, "attention.head_count_kv": 1 << 16},
}
# Files that are no model, by their general.type.
NO_MODELS = {
    "adapter": "an adapter (LoRA), not a whole model; merge it into its base model (llama-export-lora of llama.cpp)",
    "imatrix": "an importance matrix, with which models are quantised; name the file of the model itself",
    "mmproj": "the part of a model that reads pictures or sound; name the file of its language model",
}
OTHER_TYPE = "take the model in another one (Q4_K_M, Q8_0, BF16)"
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
    """The table of tensors of a file. metadata: its keys; of a list its length alone, as [length]."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        """As the file calls it."""
        found: str = self.metadata["general.architecture"]
        return found

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
    """The table of tensors. Raises UserError for a file that is none, is damaged or cut off, is not a whole language
    model, or has types that cannot be read."""
    with path.open("rb") as file:
        header = _Header(path, file)
        try:
            table = header.read()
        except (struct.error, UnicodeDecodeError):
            raise UserError(f"{path}: damaged or cut off in its header, at {header.place}; fetch it again") from None
    _check_types(table)
    return table


class _Header:
    """Reads the header of a file. place: what is being read, for a message. Lengths in the file are compared with what
    is left of it before anything is read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = path.stat().st_size
        self.place = "its beginning"

    def read(self) -> GGUF:
        self._check_kind()
        count, keys = self._numbers("QQ")
        metadata: dict[str, Any] = {}
        for number in range(keys):
            self.place = f"key {number + 1} of {keys}"
            key = self._text()
            self.place = f"key {shortened(repr(key)[1:-1])}"
            if not key:
                raise struct.error
            if key in metadata:
                raise self._refusal("stands twice")
            metadata[key] = self._value()
        infos = []
        for number in range(count):
            self.place = f"tensor {number + 1} of {count}"
            infos.append(self._tensor_info())
        _check_metadata(self.path, metadata)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise UserError(f"{self.path}: general.alignment is {alignment!r}, no power of 2; the file is damaged")
        start = self._aligned(self.file.tell(), alignment)
        tensors: dict[str, Tensor] = {}
        end = 0
        for name, shape, kind, offset in infos:
            tensor = _tensor(self.path, name, shape, kind, start + offset)
            if name in tensors:
                raise UserError(f"{self.path}: tensor {name} stands twice; the file is damaged")
            if offset != end:  # as llama.cpp demands
                raise UserError(
                    f"{self.path}: tensor {name} begins at byte {offset} of the weights, where those before it end at "
                    f"{end}: the file is damaged, or a type or shape in it is wrong; fetch it again"
                )
            if tensor.offset + tensor.nbytes > self.size:
                raise UserError(
                    f"{self.path}: cut off in tensor {name}: it ends at byte {tensor.offset + tensor.nbytes} of "
                    f"{self.size}; fetch it again"
                )
            tensors[name] = tensor
            end += self._aligned(tensor.nbytes, alignment)
        return GGUF(self.path, metadata, tensors)

    def _check_kind(self) -> None:
        if (magic := self.file.read(4)) != MAGIC:
            refuse_stand_in(self.path)
            older = magic in (b"lmgg", b"fmgg", b"tjgg", b"algg")
            what = "a GGML file from before GGUF; convert the model again with today's llama.cpp" if older else ""
            raise UserError(f"{self.path}: {what or 'not a GGUF file'}")
        (version,) = self._numbers("I")
        if version in VERSIONS:
            return
        if not version & 0xFFFF:
            mend = "of the other byte order; turn it with gguf-convert-endian of the Python package gguf"
        else:
            mend = f"version {version} of GGUF, where 2 and 3 are known; convert the model again"
        raise UserError(f"{self.path}: {mend}, or fetch another file of the model")

    def _refusal(self, why: str) -> UserError:
        return UserError(f"{self.path}: {self.place} {why}; the file is damaged: fetch it again")

    @staticmethod
    def _aligned(at: int, alignment: int) -> int:
        return -(-at // alignment) * alignment

    def _numbers(self, kinds: str) -> tuple[Any, ...]:
        kinds = "<" + kinds
        return struct.unpack(kinds, self.file.read(struct.calcsize(kinds)))

    def _skip(self, length: int) -> None:
        if length > self.size - self.file.tell():
            raise struct.error
        self.file.seek(length, 1)

    def _text(self) -> str:
        (length,) = self._numbers("Q")
        if length > min(MOST_TEXT, self.size - self.file.tell()):
            raise struct.error
        return self.file.read(length).decode()

    def _value(self) -> Any:
        """A value of the metadata; of a list, which is gone past, its length as [length]."""
        (kind,) = self._numbers("I")
        if kind == _TEXT:
            return self._text()
        if kind in _SCALARS:
            (value,) = self._numbers(_SCALARS[kind])
            if not math.isfinite(value):
                raise self._refusal(f"is {value}")
            return value
        if kind != _LIST:
            raise struct.error
        inner, length = self._numbers("IQ")
        if inner in _SCALARS:
            self._skip(struct.calcsize(_SCALARS[inner]) * length)
        elif inner == _TEXT and length < MOST_TEXT:
            for _ in range(length):
                self._skip(*self._numbers("Q"))
        else:
            raise struct.error  # lists of lists are in no file of a model
        return [length]

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        self.place = f"tensor {shortened(repr(name)[1:-1])}"
        (dimensions,) = self._numbers("I")
        if not 0 < dimensions <= 8:
            raise struct.error
        shape = self._numbers("Q" * dimensions)[::-1]  # GGUF names the innermost first
        if not all(shape):
            raise self._refusal(f"has the shape {shape}")
        kind, offset = self._numbers("IQ")
        return name, shape, kind, offset


def _check_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raise UserError unless the file is a whole language model, whose sizes are numbers."""
    architecture = metadata.get("general.architecture")
    if (parts := metadata.get("split.count", 1)) != 1:
        raise UserError(
            f"{path}: one of the {parts} parts of a model (split.count); join them: llama-gguf-split --merge FIRST "
            "WHOLE.gguf (llama.cpp)"
        )
    kind = "mmproj" if architecture == "clip" else metadata.get("general.type")
    if kind in NO_MODELS:
        raise UserError(f"{path}: {NO_MODELS[kind]}")
    if not isinstance(architecture, str) or not architecture:
        raise UserError(f"{path}: names no architecture (general.architecture), so holds no model")
    for name, most in SIZES.items():
        key = f"{architecture}.{name}"
        size = metadata.get(key)
        several = isinstance(size, list) and architecture not in ARCHITECTURES  # a number for each layer
        if size is None and architecture in ARCHITECTURES and not name.endswith("_kv"):
            raise UserError(f"{path}: {key} is missing; take another file of the model")
        if size is not None and not several and (type(size) is not int or not 0 < size <= most):
            raise UserError(f"{path}: {key} is {size!r}, where a number from 1 to {most} is wanted; fetch it again")


def check_gguf_tokenizer(file: GGUF) -> None:
    """Raise UserError unless the metadata of the file has a tokenizer whose special tokens are some of its tokens."""
    for key in ("tokenizer.ggml.model", "tokenizer.ggml.tokens"):
        if key not in file.metadata:
            raise UserError(f"{file.path}: no tokenizer, for there is no {key}; take a file with one")
    tokens = file.metadata["tokenizer.ggml.tokens"]
    count = tokens[0] if isinstance(tokens, list) else 0
    for name in ("bos", "eos", "unknown", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        token = file.metadata.get(key, 0)
        if type(token) is not int or not 0 <= token < count:
            raise UserError(f"{file.path}: {key} is {token!r}, where the file has {count} tokens; fetch it again")


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        quantization = GGMLQuantizationType(kind)
    except ValueError:
        raise UserError(f"{path}: tensor {name} is of type number {kind}, which is not known; {OTHER_TYPE}") from None
    block, block_bytes = GGML_QUANT_SIZES[quantization]
    if shape[-1] % block:
        raise UserError(
            f"{path}: tensor {name} has rows of {shape[-1]} numbers, no multiple of the {block} in a block of "
            f"{quantization.name}; the file is damaged"
        )
    return Tensor(name, quantization.name, tuple(shape), offset, math.prod(shape) // block * block_bytes)


def _check_types(file: GGUF) -> None:
    """Raise UserError for a type that cannot be turned to numbers."""
    from gguf import GGMLQuantizationType, dequantize
    from gguf.constants import GGML_QUANT_SIZES

    for kind in file.types:
        quantization = GGMLQuantizationType[kind]
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[quantization][1]), np.uint8), quantization)
        except NotImplementedError:
            name = next(tensor.name for tensor in file.tensors.values() if tensor.type == kind)
            raise UserError(
                f"{file.path}: tensor {name} is of type {kind}, which cannot be read; {OTHER_TYPE}"
            ) from None


# ---- as a model


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
