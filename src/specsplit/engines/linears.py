"""The linear layers of a model as the kernels read them.

All weights are in one piece of memory, in the order in which a pass reads them. A table says where the rows of each
layer are and which function multiplies with them (numba_kernels.run_pass).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from specsplit.engines.blocks import BlockEmbedding, BlockLinear, Blocks
from specsplit.engines.numba_kernels import PAD
from specsplit.engines.quantise import Int8Linear
from specsplit.engines.reduced_vocabulary import ReducedEmbedding
from specsplit.engines.vector_kernels import product, unpacking
from specsplit.engines.weight_forms import FORMS, NUMBERS

HUGE_PAGE = 1 << 21  # memory that starts at one is mapped in such pages, where the system has them
FORM_OF = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}


def padded(inputs: int) -> int:
    """Inputs of a product with the zeros after them."""
    return -(-inputs // PAD) * PAD


@dataclass(frozen=True)
class _Stored:
    """One layer's weights. rows: uint8 [outputs, bytes of a row], unpadded; row_bytes: with padding."""

    form: str
    rows: np.ndarray
    row_bytes: int
    scale: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        return -(-len(self.rows) * self.row_bytes // 64) * 64


class Linears:
    """layers: int64 [layers, 7, 8], head: int64 [8], as run_pass documents them; head_rows: those of the output head.

    The weights of the decoder layers and of the output head, or of one linear layer alone, are taken out of these
    modules. They may be of several forms. nbytes: of all of them.
    """

    def __init__(self, decoder_layers: Iterable[Any], head: Any) -> None:
        modules: list[Any] = []
        for layer in decoder_layers:
            a, m = layer.self_attn, layer.mlp
            modules += [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]
        modules.append(head)
        total = sum(_stored(module).nbytes for module in modules)
        memory = np.empty(total + HUGE_PAGE, np.uint8)
        self._memory = memory[-memory.ctypes.data % HUGE_PAGE :][:total]
        self._constants = np.array([1, 0], np.float32)  # the scale and the bias of layers that have none
        self._floats: list[np.ndarray] = []
        table, at = [], 0
        for module in modules:
            stored = _stored(module)
            rows = self._memory[at : at + len(stored.rows) * stored.row_bytes].reshape(-1, stored.row_bytes)
            rows[:, : stored.rows.shape[1]] = stored.rows
            rows[:, stored.rows.shape[1] :] = 0
            table.append(self._entry(stored, rows))
            at += stored.nbytes
            _empty(module)
        self.nbytes = total
        self.layers = np.array(table[:-1], np.int64).reshape(-1, 7, 8)
        self.head = np.array(table[-1], np.int64)
        self.head_rows = rows[:, : stored.rows.shape[1]]

    def _entry(self, stored: _Stored, rows: np.ndarray) -> Sequence[int]:
        one, zero = self._constants.ctypes.data, self._constants.ctypes.data + 4
        scale, bias = (one, 0), (zero, 0)
        if stored.scale is not None:
            scale = (self._address(stored.scale), 4)
        if stored.bias is not None:
            bias = (self._address(stored.bias), 4)
        return (product(stored.form).address, rows.ctypes.data, stored.row_bytes, len(rows), *scale, *bias)

    def _address(self, values: torch.Tensor) -> int:
        floats = values.detach().float().numpy().copy()
        self._floats.append(floats)
        return int(floats.ctypes.data)


def tied(hf: Any) -> bool:
    """Whether the input embedding and the output head have the same weights."""
    embedding, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    if isinstance(embedding, BlockEmbedding):
        return isinstance(head, BlockLinear) and head.blocks is embedding.blocks
    return getattr(head, "weight", None) is embedding.weight


class Embedding:
    """An input embedding as the kernels read it. table: int64 [4], as run_pass has it.

    head_rows: those of the output head that it is tied to; else it is copied, as otherwise all of its file would stay
    in memory.
    """

    def __init__(self, embedding: Any, head_rows: np.ndarray | None = None) -> None:
        if isinstance(embedding, BlockEmbedding):
            form, rows = FORMS[NUMBERS[embedding.blocks.form]], embedding.blocks.data
        else:
            form = FORMS[NUMBERS[FORM_OF[embedding.weight.dtype]]]
            rows = _bits(embedding.weight).view(np.uint8)
        units = -(-rows.shape[1] // form.bytes)
        if head_rows is None:
            head_rows = np.zeros((len(rows), units * form.bytes), np.uint8)
            head_rows[:, : rows.shape[1]] = rows
        if not isinstance(embedding, BlockEmbedding):
            _give_back(embedding.weight)
        self._rows = head_rows
        self._row_of: list[int] | None = None
        if isinstance(embedding, ReducedEmbedding):
            self._row_of = embedding.rows.tolist()
        place = unpacking(form.name).address, head_rows.ctypes.data, head_rows.strides[0], units
        self.table = np.array(place, np.int64)

    def rows_of(self, tokens: Sequence[int]) -> Sequence[int]:
        """The rows that are read for tokens. Raises IndexError for what is no token: the kernel reads any address."""
        count = len(self._rows if self._row_of is None else self._row_of)
        if tokens and not (min(tokens) >= 0 and max(tokens) < count):
            raise IndexError(f"tokens {min(tokens)} to {max(tokens)} in an embedding of {count}")
        return tokens if self._row_of is None else [self._row_of[token] for token in tokens]


def _stored(module: Any) -> _Stored:
    if isinstance(module, BlockLinear):
        data = module.blocks.data
        return _Stored(module.blocks.form, data, data.shape[1], None, module.bias)
    form = FORMS[NUMBERS[FORM_OF[module.weight.dtype]]]
    bits = _bits(module.weight)
    row_bytes = padded(bits.shape[1]) * bits.itemsize
    scale = module.scale if isinstance(module, Int8Linear) else None
    return _Stored(form.name, bits.view(np.uint8), row_bytes, scale, module.bias)


def _empty(module: Any) -> None:
    """Take a layer's weights out of the model, which keeps its shape in name only."""
    if isinstance(module, BlockLinear):
        module.blocks = Blocks(module.blocks.form, module.blocks.data[:0])
    else:
        _give_back(module.weight)
        module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)


def _give_back(copied: torch.Tensor) -> None:
    """Give back the memory of a weight that nobody reads any more: a mapped file's would stay until the last goes."""
    if sys.platform == "linux" and copied.is_contiguous():
        page, start, size = mmap.PAGESIZE, copied.data_ptr(), copied.nbytes
        first, end = -(-start // page) * page, (start + size) // page * page  # whole pages of it alone
        if end > first:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a tensor: float32 and int8 as they are, bfloat16 as uint16."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
