"""Products with weights in every form: the numbers of gguf.quants, the same bits whatever the tile."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import binding, ir

from specsplit.engines.vector_kernels import (
    ARGUMENTS,
    QUERIES,
    TILE,
    _write_strip,
    _write_sums,
    accumulation,
    activation,
    packing,
    product,
)
from specsplit.engines.vectors import POINTER, call_own
from specsplit.engines.weight_forms import BLOCK_FORMS, FORMS, NUMBERS

NUMBERS_OF_STRIP = (1, 3, 4, 5, 8, 10, 11, 13)  # arguments that are no addresses
PLAIN = ("float32", "bfloat16", "int8")
CONSTANTS = np.array([1, 0], np.float32)


@cache
def compiled(make: Callable[..., object], arguments: int, *given: str) -> Callable[..., None]:
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(make(*given).address)


def packed(x: np.ndarray) -> np.ndarray:
    """Tokens [tokens, inputs] as a product reads them."""
    inputs = -(-x.shape[1] // 32) * 32
    found = np.full(len(x) * inputs, np.nan, np.float32)
    for token, row in enumerate(x):
        row = np.ascontiguousarray(row)
        compiled(packing, 6)(row.ctypes.data, len(row), token, len(x), inputs, found.ctypes.data)
    assert not np.isnan(found).any()
    return found


def multiply(
    form: str, x: np.ndarray, weight: np.ndarray, rows: tuple[int, int], scale: np.ndarray | None = None, y=None
) -> np.ndarray:
    """x weight^T for some rows of weight (bytes of each row), times scale; added to y if there is one."""
    inputs = -(-x.shape[1] // 32) * 32
    out = np.zeros((len(x), len(weight)), np.float32) if y is None else y.copy()
    terms = (CONSTANTS.ctypes.data + 4, 0, 0) if y is None else (out.ctypes.data, 4, 4 * len(weight))
    scales = (CONSTANTS.ctypes.data, 0) if scale is None else (scale.ctypes.data, 4)
    values = packed(x)
    compiled(product, ARGUMENTS, form)(
        values.ctypes.data, len(x), inputs, weight.ctypes.data, weight.strides[0], *rows, weight.ctypes.data,
        *scales, *terms, out.ctypes.data, 4 * len(weight),
    )  # fmt: skip
    return out


def random_blocks(form: str, rows: int, inputs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of a matrix in blocks of every content, float16 scales finite, and its numbers by gguf.quants."""
    random, kind = np.random.default_rng(seed), FORMS[NUMBERS[form]]
    blocks = random.integers(0, 256, (rows, inputs // kind.unit, kind.bytes), np.uint8)
    scales = random.integers(0, 1 << 16, (rows, inputs // kind.unit, 2), np.uint16)
    scales[scales & 0x7C00 == 0x7C00] &= 0x83FF  # no infinities, but subnormal numbers, zeros and signs
    at = {"Q4_0": [0], "Q8_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}[form]
    for i, start in enumerate(at):
        blocks[:, :, start : start + 2] = scales[:, :, i : i + 1].view(np.uint8)
    data = blocks.reshape(rows, -1)
    return data, gguf.dequantize(data, gguf.GGMLQuantizationType[form])


def random_plain(form: str, rows: int, inputs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The same in a type of NumPy, rows padded with zeros."""
    random, width = np.random.default_rng(seed), -(-inputs // 32) * 32
    floats = np.zeros((rows, width), np.float32)
    floats[:, :inputs] = random.standard_normal((rows, inputs))
    if form == "int8":
        stored = (floats * 40).astype(np.int8)
        return stored, stored.astype(np.float32)
    if form == "bfloat16":
        stored = (floats.view(np.uint32) >> 16).astype(np.uint16)
        return stored, (stored.astype(np.uint32) << 16).view(np.float32)
    return floats, floats


@pytest.mark.parametrize("form", [*PLAIN, *BLOCK_FORMS])
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 20) | st.sampled_from([24, 25, 63, 64]),
    rows=st.integers(1, 37),
    blocks=st.integers(1, 9),
    odd=st.integers(0, 31),
    seed=st.integers(0, 1 << 30),
    data=st.data(),
)
def test_bits_are_those_of_float32_one_token_and_one_row_at_a_time(form, tokens, rows, blocks, odd, seed, data) -> None:
    if form in PLAIN:
        inputs = 32 * blocks - odd
        weight, floats = random_plain(form, rows, inputs, seed)
    else:
        inputs = FORMS[NUMBERS[form]].unit * min(blocks, 4)
        weight, floats = random_blocks(form, rows, inputs, seed)
    x = np.random.default_rng(seed + 1).standard_normal((tokens, inputs)).astype(np.float32)
    low = data.draw(st.integers(0, rows - 1))
    high = data.draw(st.integers(low + 1, rows))
    found = multiply(form, x, weight, (low, high))
    token, row = data.draw(st.integers(0, tokens - 1)), data.draw(st.integers(low, high - 1))
    alone = multiply("float32", x[token : token + 1], floats[row : row + 1], (0, 1))
    assert found[token, row].tobytes() == alone[0, 0].tobytes()
    whole = multiply("float32", x, floats, (0, rows))
    assert found[:, low:high].tobytes() == whole[:, low:high].tobytes()
    assert not found[:, :low].any()
    assert not found[:, high:].any()
    expected = x.astype(float) @ floats[:, :inputs].T.astype(float)
    bound = np.abs(x).astype(float) @ np.abs(floats[:, :inputs]).T.astype(float)
    assert (np.abs(whole - expected) <= 1e-6 * inputs * bound + 1e-30).all()


EVERY_FORM = """
import numpy as np
import test_vector_kernels as own
for form in (*own.PLAIN, *own.BLOCK_FORMS):
    weight, floats = (own.random_plain if form in own.PLAIN else own.random_blocks)(form, 64, 768, 1)
    for tokens in (1, 6, 7, 40):
        x = np.random.default_rng(2).standard_normal((tokens, 768)).astype(np.float32)
        assert own.multiply(form, x, weight, (0, 64)).tobytes() == own.multiply("float32", x, floats, (0, 64)).tobytes()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory goes back to the system at once in glibc alone")
def test_memory_is_not_used_after_it_was_freed() -> None:
    """Every array is a mapping of its own here, so that one that was freed too early ends the process."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4096", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", EVERY_FORM], env=environment, check=True, timeout=300)


@pytest.mark.parametrize("tokens", [1, 3, TILE, TILE + 1])
def test_scales_and_the_residual_stream(tokens: int) -> None:
    weight, floats = random_plain("int8", 13, 64, 5)
    random = np.random.default_rng(1)
    x, scale = random.standard_normal((tokens, 64)).astype(np.float32), random.random(13).astype(np.float32)
    before = random.standard_normal((tokens, 13)).astype(np.float32)
    found = multiply("int8", x, weight, (0, 13), scale, before)
    np.testing.assert_allclose(found, before + (x @ floats.T) * scale, rtol=1e-5, atol=1e-4)


def test_block_values_are_exact() -> None:
    """A product with a unit vector gives each number of a matrix."""
    for form in BLOCK_FORMS:
        weight, floats = random_blocks(form, 9, 256, 11)
        for start in range(0, 256, 64):
            unit = np.eye(256, dtype=np.float32)[start : start + 64]
            assert (multiply(form, unit, weight, (0, 9)) == floats[:, start : start + 64].T).all(), form


@settings(max_examples=30, deadline=None)
@given(
    queries=st.integers(1, QUERIES),
    vectors=st.integers(0, 11),
    count=st.integers(0, 40),
    split=st.integers(0, 40),
    seed=st.integers(0, 1 << 30),
)
def test_sums_of_attention_are_taken_in_order_whatever_the_tile(queries, vectors, count, split, seed) -> None:
    random, run = np.random.default_rng(seed), compiled(accumulation, 10)
    values = random.standard_normal((count, vectors, 8)).astype(np.float32)
    scalars = random.standard_normal((queries, 48)).astype(np.float32)
    before = random.standard_normal((queries, vectors, 8)).astype(np.float32)
    together, apart = before.copy(), before.copy()

    def add(out: np.ndarray, number: int, query: int, vector: int, width: int, start: int, stop: int) -> None:
        run(
            number, width, stop - start, values.ctypes.data + 32 * (start * vectors + vector), 32 * vectors, 32,
            scalars.ctypes.data + 4 * (48 * query + start), 4 * 48,
            out.ctypes.data + 32 * (query * vectors + vector), 32 * vectors,
        )  # fmt: skip

    add(together, queries, 0, 0, vectors, 0, count)
    middle = min(split, count)  # a part of the slots after the other, as when only some are seen by all queries
    for query in range(queries):
        for vector in range(vectors):
            add(apart, 1, query, vector, 1, 0, middle)
            add(apart, 1, query, vector, 1, middle, count)
    assert together.tobytes() == apart.tobytes()
    expected = before + np.einsum("qk,kvi->qvi", scalars[:, :count].astype(float), values.astype(float))
    np.testing.assert_allclose(together, expected, rtol=1e-4, atol=1e-4)


def test_the_activation() -> None:
    random = np.random.default_rng(2)
    gate, up = (random.standard_normal(64).astype(np.float32) * 8 for _ in range(2))
    gate[:4] = (-200, -90, 90, 0)
    for tokens, token in ((1, 0), (5, 3), (14, 13)):
        out = np.zeros(tokens * 64, np.float32)
        compiled(activation, 8)(gate.ctypes.data, up.ctypes.data, 0, 64, token, tokens, 64, out.ctypes.data)
        rows = np.zeros((tokens, 64), np.float32)
        rows[token] = 1
        place = packed(rows).astype(bool)
        expected = gate.astype(float) / (1 + np.exp(-gate.astype(float))) * up
        np.testing.assert_allclose(out[place], expected, rtol=1e-5, atol=1e-30)
        assert not out[~place].any()


ARM, X86 = "aarch64-unknown-linux-gnu", "x86_64-unknown-linux-gnu"


@pytest.mark.parametrize(
    ("form", "triple"),
    [
        *((form, ARM) for form in (*PLAIN, *BLOCK_FORMS)),
        *(
            (form, X86) if form in ("float32", "Q6_K") else pytest.param(form, X86, marks=pytest.mark.slow)
            for form in (*PLAIN, *BLOCK_FORMS)
        ),
    ],
)
def test_it_compiles_for_other_processors(form: str, triple: str) -> None:
    """ARM with NEON, and any x86-64: what LLVM is given holds nothing that only this machine has."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module = ir.Module()
    module.triple = triple
    builder = ir.IRBuilder(ir.Function(module, ir.FunctionType(ir.VoidType(), []), "caller").append_basic_block())
    pointer, number = ir.Constant(POINTER, None), ir.Constant(ir.IntType(64), 1)
    kinds = [number if i in NUMBERS_OF_STRIP else pointer for i in range(14)]
    for rows, tokens in ((1, 12), (2, 6), (4, 1)):
        write = partial(_write_strip, FORMS[NUMBERS[form]], rows, tokens)
        call_own(builder, f"strip_{rows}x{tokens}", kinds, write)
    for queries in (1, 6):
        kinds = [pointer if i in (2, 5, 7) else number for i in range(9)]
        call_own(builder, f"sums_{queries}", kinds, partial(_write_sums, queries))
    builder.ret_void()
    machine = binding.Target.from_triple(triple).create_target_machine(opt=2)
    assembly = machine.emit_assembly(binding.parse_assembly(str(module)))
    assert ("fmla" in assembly) == triple.startswith("aarch64")
