"""Products of a few tokens with a matrix of weights, one function for every form that weights are stored in.

A matrix is read once for all tokens: of a tile, some rows times some tokens, every weight is turned to float32 in
registers and multiplied for each token, while rows further on are prefetched. Every dot product is one sum in eight
lanes over the inputs, in order, and then over the lanes, whatever the tile (He et al. 2025, "Defeating
Nondeterminism in LLM Inference"). So its bits depend on the token and the row alone, and are those of the same weights
in float32.

Functions are compiled one by one, when a model first needs them, and cached on disk. `run_pass` calls them by address,
so that it does not depend on the forms of the weights.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, types
from numba.core import config
from numba.core.codegen import get_host_cpu_features
from numba.core.errors import TypingError
from numba.extending import intrinsic

from specsplit.engines import vectors, weight_forms
from specsplit.engines.kernel_cache import callback
from specsplit.engines.vectors import FLOAT, LANES, LINE, POINTER, Emitter, Value, call_own
from specsplit.engines.weight_forms import BLOCK_FORMS, FORMS, Form

FEATURES = config.CPU_FEATURES or get_host_cpu_features()
NEEDED = ("+avx2", "+fma", "+f16c")  # of x86: without them LLVM would call functions for single numbers, or for none
WIDE = "+avx512vl" in FEATURES  # 32 registers of eight float32, else 16, or as many pairs of NEON
TILE = 12 if WIDE else 6  # most tokens of a tile
# Rows of a tile of so many tokens, else 1; measured: about as many as have their sums in registers.
ROWS = {
    True: {1: 4, 2: 4, 3: 4, 4: 4, 5: 4, 6: 4, 7: 3, 8: 3, 9: 2, 10: 2, 11: 2, 12: 2},
    False: {1: 4, 2: 4, 3: 4, 4: 4, 5: 2, 6: 2},
}[WIDE]
# Of blocks, which need registers to be unpacked.
BLOCK_ROWS = {
    True: {1: 4, 2: 4, 3: 4, 4: 3, 5: 3, 6: 2, 7: 2, 8: 2, 9: 2, 10: 2, 11: 2, 12: 2},
    False: {1: 2, 2: 4, 3: 4, 4: 4, 5: 2, 6: 2},
}[WIDE]
QUERIES = 6  # most that attend together
SUMS = {1: 8, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2}  # vectors that so many queries are summed up in at a time
BLOCK_BYTES = 1 << 17  # of weights that stay in the cache while the tiles of many tokens go over them
UNPACKED_BYTES = 96 << 10  # of weights in blocks that are unpacked for the tiles of many tokens
FIRST_BLOCK_FORM = min(weight_forms.NUMBERS[name] for name in BLOCK_FORMS)
AHEAD_BYTES = 1 << 14  # how far ahead weights are prefetched
ARGUMENTS = 15
SIGNATURE = types.void(*[types.int64] * ARGUMENTS)


@njit(nogil=True, inline="always")
def tiles(tokens):
    """Into how many tiles tokens are divided."""
    return (tokens + TILE - 1) // TILE


@njit(nogil=True, inline="always")
def tile_start(tokens, tile):
    """The first token of a tile; tiles are of equal size, or one token larger."""
    count = tiles(tokens)
    return tile * (tokens // count) + min(tile, tokens % count)


def processor_lacks(machine: str, features: str) -> str | None:
    """What a processor lacks for these kernels to be worth while, or to work at all. ARM has it all.

    machine: as platform.machine() calls it. features: as LLVM does, such as +avx2,+fma.
    """
    if machine.lower() not in ("x86_64", "amd64", "i386", "i686"):
        return None
    missing = [name[1:] for name in NEEDED if name not in features.split(",")]
    return f"this processor has no {' and no '.join(missing)}" if missing else None


@functools.cache
def product(form: str) -> Any:
    """The compiled function for weights of a form; `.address` is what run_pass calls.

    Arguments, all int64, addresses and steps in bytes: x (tokens in tiles, see numba_kernels.pack), tokens, inputs
    (a multiple of the form's unit), weight, row_bytes, low, high (rows to do), following (what will be read next, for
    it to be prefetched), scale, scale_step, term, term_row, term_token, y, y_token:

        y[token, row] = scale[row] * (x weight^T)[token, row] + term[row, token]
    """
    number = weight_forms.NUMBERS[form]
    function = _multiply(number, FORMS[number].unit, _stamp())
    # Numba finds compiled functions by name in its cache and in memory.
    function.__name__ = function.__qualname__ = f"multiply_{form}"
    return callback(SIGNATURE, function)


@functools.cache
def unpacking(form: str) -> Any:
    """The compiled function that turns one row of weights to float32.

    Arguments, int64: the address of the row, how many units of the form it has, the address of the results.
    """
    function = _unpack_row(weight_forms.NUMBERS[form], _stamp())
    function.__name__ = function.__qualname__ = f"unpack_{form}"
    return callback(types.void(*[types.int64] * 3), function)


@functools.cache
def packing() -> Any:
    """The compiled function that puts one token's values where a product reads them: tile by tile the tokens, eight
    inputs of each in turn, and zeros beyond its values.

    Arguments, int64: the address of the values, how many, number of the token, tokens, inputs (at least as many as
    values, a multiple of eight), address of all tokens' packed values.
    """
    function = _pack(_stamp())
    return callback(types.void(*[types.int64] * 6), function)


@functools.cache
def activation() -> Any:
    """The compiled function silu(gate) * up for one token, with packed results.

    Arguments, int64: addresses of gate and up, low, high (which values, multiples of eight), number of the token,
    tokens, inputs (values of a token), address of the packed results.
    """
    function = _activate(_stamp())
    return callback(types.void(*[types.int64] * 8), function)


@functools.cache
def accumulation() -> Any:
    """The compiled function of attention: out[query, vector] += the sum over k, in order, of scalar[query, k] * that
    vector of k.

    Arguments, all int64, addresses and steps in bytes: queries (1 to QUERIES), vectors, k (each may be 0), address of
    the vectors, steps from k to k and from vector to vector; address of the scalars (those of a query are adjacent),
    step from query to query; address of out (vectors are adjacent), step from query to query.
    """
    function = _accumulate(_stamp())
    return callback(types.void(*[types.int64] * 10), function)


def _stamp() -> int:
    """Of the sources that functions are made from: Numba compiles anew when a function's own file changed, no other."""
    sources = [Path(str(module.__file__)).read_bytes() for module in (vectors, weight_forms)]
    return int.from_bytes(hashlib.sha256(b"".join(sources)).digest()[:6], "big")


def _multiply(form: int, unit: int, stamp: int) -> Any:
    """Numba's cache tells functions of the same text apart by what they close over."""

    def multiply(
        x, tokens, inputs, weight, row_bytes, low, high, following, scale, scale_step, term, term_row, term_token,
        y, y_token,
    ):  # fmt: skip
        _ = stamp
        block = high - low
        if tokens > TILE:
            if form >= FIRST_BLOCK_FORM:
                _multiply_unpacked(
                    form, unit, x, tokens, inputs, weight, row_bytes, low, high, scale, scale_step, term, term_row,
                    term_token, y, y_token,
                )  # fmt: skip
                return
            block = max(12, BLOCK_BYTES // row_bytes // 12 * 12)
        for start in range(low, high, block):
            stop = min(high, start + block)
            for tile in range(tiles(tokens)):
                first = tile_start(tokens, tile)
                count = tile_start(tokens, tile + 1) - first
                _strip(
                    form, count, x + 4 * first * inputs, inputs // unit, weight, row_bytes, start, stop,
                    weight + stop * row_bytes if stop < high else following, scale, scale_step,
                    term + first * term_token, term_row, term_token, y + first * y_token, y_token,
                )  # fmt: skip

    return multiply


@njit(nogil=True, inline="always")
def _multiply_unpacked(
    form,
    unit,
    x,
    tokens,
    inputs,
    weight,
    row_bytes,
    low,
    high,
    scale,
    scale_step,
    term,
    term_row,
    term_token,
    y,
    y_token,
):
    """Rows low to high for several tiles of tokens: some rows at a time are unpacked for all of them."""
    block = max(4, UNPACKED_BYTES // (4 * inputs) // 4 * 4)
    room = np.empty(min(block, high - low) * inputs, np.float32)
    rows = room.ctypes.data
    for start in range(low, high, block):
        count = min(high - start, block)
        _unpack(form, weight + start * row_bytes, row_bytes, count, inputs // unit, rows, 4 * inputs)
        for tile in range(tiles(tokens)):
            first = tile_start(tokens, tile)
            _strip(
                0, tile_start(tokens, tile + 1) - first, x + 4 * first * inputs, inputs // 16, rows, 4 * inputs, 0,
                count, rows, scale + start * scale_step, scale_step, term + start * term_row + first * term_token,
                term_row, term_token, y + 4 * start + first * y_token, y_token,
            )  # fmt: skip
    room[0] = 0  # Numba frees an array after its last use by name, and `rows` is none.


def _unpack_row(form: int, stamp: int) -> Any:
    def unpack_row(row, units, out):
        _ = stamp
        _unpack(form, row, 0, 1, units, out, 0)

    return unpack_row


def _pack(stamp: int) -> Any:
    def pack(values, size, token, tokens, inputs, packed):
        _ = stamp
        place, step = packed_place(token, tokens, inputs)
        _copy(values, size // LANES, packed + place, step)
        if size < inputs:
            _fill(values, size, inputs, packed + place, step)

    return pack


def _activate(stamp: int) -> Any:
    def activate(gate, up, low, high, token, tokens, inputs, packed):
        _ = stamp
        place, step = packed_place(token, tokens, inputs)
        if low < high:
            _silu(gate + 4 * low, up + 4 * low, (high - low) // LANES, packed + place + low // LANES * step, step)

    return activate


def _accumulate(stamp: int) -> Any:
    def accumulate(queries, vectors, count, vector, k_step, vector_step, scalar, scalar_step, out, out_step):
        _ = stamp
        if count > 0:
            _tiles_of_sums(queries, vectors, count, vector, k_step, vector_step, scalar, scalar_step, out, out_step)

    return accumulate


@njit(nogil=True, inline="always")
def packed_place(token, tokens, inputs):
    """Where the packed values of a token begin, and the bytes from eight of them to the next eight."""
    tile = 0
    while tile_start(tokens, tile + 1) <= token:
        tile += 1
    first = tile_start(tokens, tile)
    count = tile_start(tokens, tile + 1) - first
    return 4 * (first * inputs + (token - first) * LANES), 4 * LANES * count


@intrinsic
def _copy(typingctx: Any, values: Any, count: Any, out: Any, out_step: Any) -> Any:
    """Vectors of eight, `out_step` bytes apart from now on."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        e, (values, out) = Emitter(builder), (builder.inttoptr(args[i], POINTER) for i in (0, 2))

        def one_vector(index: Value, carried: list[Value]) -> list[Value]:
            vector = e.load(e.at(values, builder.mul(index, e.number(LANES * 4))))
            e.store(vector, e.at(out, builder.mul(index, args[3])))
            return []

        e.loop(args[1], [], one_vector, may_be_none=True)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@njit(nogil=True, inline="always")
def _fill(values, size, inputs, out, out_step):
    """The values after the last whole vector, then zeros."""
    for k in range(size // LANES * LANES, inputs):
        at = out + k // LANES * out_step + 4 * (k % LANES)
        _put(at, _get(values + 4 * k) if k < size else np.float32(0))


@intrinsic
def _get(typingctx: Any, address: Any) -> Any:
    """The float32 at an address."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return Emitter(builder).load(builder.inttoptr(args[0], POINTER), FLOAT)

    return types.float32(types.int64), generate


@intrinsic
def _put(typingctx: Any, address: Any, value: Any) -> Any:
    """Write a float32 to an address."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        Emitter(builder).store(args[1], builder.inttoptr(args[0], POINTER))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@intrinsic
def _tiles_of_sums(
    typingctx: Any, queries: Any, vectors: Any, count: Any, vector: Any, k_step: Any, vector_step: Any, scalar: Any,
    scalar_step: Any, out: Any, out_step: Any,
) -> Any:  # fmt: skip
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        end = builder.append_basic_block()
        arguments = list(args[1:])
        for at in (2, 5, 7):
            arguments[at] = builder.inttoptr(arguments[at], POINTER)
        switch = builder.switch(args[0], end)
        for number in range(1, QUERIES + 1):
            block = builder.append_basic_block()
            switch.add_case(number, block)
            builder.position_at_end(block)
            call_own(builder, f"sums_{number}", arguments, functools.partial(_write_sums, number))
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10), generate


def _write_sums(
    queries: int, e: Emitter, vectors: Value, count: Value, vector: Value, k_step: Value, vector_step: Value,
    scalar: Value, scalar_step: Value, out: Value, out_step: Value,
) -> None:  # fmt: skip
    """Tiles of as many vectors as registers allow, then of one vector each."""
    b = e.builder

    def tile(first: Value, width: int) -> None:
        places = [
            e.at(out, b.mul(e.number(q), out_step), b.mul(b.add(first, e.number(v)), e.number(4 * LANES)))
            for q in range(queries)
            for v in range(width)
        ]
        begin = e.at(vector, b.mul(first, vector_step))
        starts = [e.at(begin, b.mul(e.number(v), vector_step)) for v in range(width)]
        scalars = [e.at(scalar, b.mul(e.number(q), scalar_step)) for q in range(queries)]

        def one(k: Value, sums: list[Value]) -> list[Value]:
            offset, place = b.mul(k, k_step), b.mul(k, e.number(4))
            values = [e.load(e.at(start, offset)) for start in starts]
            found = []
            for q in range(queries):
                factor = e.spread(e.load(e.at(scalars[q], place), FLOAT))
                found += [e.fma(factor, values[v], sums[q * width + v]) for v in range(width)]
            return found

        for value, place in zip(e.loop(count, [e.load(place) for place in places], one), places, strict=True):
            e.store(value, place)

    width = SUMS[queries]
    whole = b.udiv(vectors, e.number(width))

    def wide(index: Value, carried: list[Value]) -> list[Value]:
        tile(b.mul(index, e.number(width)), width)
        return []

    def narrow(index: Value, carried: list[Value]) -> list[Value]:
        tile(b.add(b.mul(whole, e.number(width)), index), 1)
        return []

    e.loop(whole, [], wide, may_be_none=True)
    e.loop(b.sub(vectors, b.mul(whole, e.number(width))), [], narrow, may_be_none=True)


@intrinsic
def _silu(typingctx: Any, gate: Any, up: Any, count: Any, out: Any, out_step: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        e, (gate, up, out) = Emitter(builder), (builder.inttoptr(args[i], POINTER) for i in (0, 1, 3))

        def one_vector(index: Value, carried: list[Value]) -> list[Value]:
            offset = builder.mul(index, e.number(LANES * 4))
            x = e.load(e.at(gate, offset))
            sigmoid = builder.fadd(e.floats(1.0), e.exp(builder.fneg(x)))
            result = builder.fmul(builder.fdiv(x, sigmoid), e.load(e.at(up, offset)))
            e.store(result, e.at(out, builder.mul(index, args[4])))
            return []

        e.loop(args[2], [], one_vector)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic(prefer_literal=True)
def _unpack(
    typingctx: Any, form: Any, weight: Any, row_bytes: Any, rows: Any, units: Any, out: Any, out_row: Any
) -> Any:
    """Rows of weights as float32."""
    if not isinstance(form, types.IntegerLiteral):
        raise TypingError("form must be a literal")
    chosen = FORMS[form.literal_value]

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        arguments = [builder.inttoptr(args[1], POINTER), *args[2:5], builder.inttoptr(args[5], POINTER), args[6]]
        call_own(builder, f"unpack_{chosen.name}", arguments, functools.partial(_write_unpack, chosen))
        return context.get_dummy_value()

    return types.void(form, *[types.int64] * 6), generate


def _write_unpack(
    form: Form, e: Emitter, weight: Value, row_bytes: Value, rows: Value, units: Value, out: Value, out_row: Value
) -> None:
    b = e.builder

    def one_row(row: Value, carried: list[Value]) -> list[Value]:
        start, place = e.at(weight, b.mul(row, row_bytes)), e.at(out, b.mul(row, out_row))
        ahead = e.at(start, b.mul(row_bytes, e.number(8)))  # a few rows on

        def one_unit(index: Value, carried: list[Value]) -> list[Value]:
            offset, target = b.mul(index, e.number(form.bytes)), e.at(place, b.mul(index, e.number(4 * form.unit)))
            e.prefetch(e.at(ahead, offset), 3)
            for k, vector in enumerate(form.unpack(e, e.at(start, offset))):
                e.store(vector, e.at(target, 4 * LANES * k))
            return []

        e.loop(units, [], one_unit)
        return []

    e.loop(rows, [], one_row)


@intrinsic(prefer_literal=True)
def _strip(
    typingctx: Any, form: Any, tokens: Any, x: Any, units: Any, weight: Any, row_bytes: Any, low: Any, high: Any,
    following: Any, scale: Any, scale_step: Any, term: Any, term_row: Any, term_token: Any, y: Any, y_token: Any,
) -> Any:  # fmt: skip
    """Rows low to high for one tile of 1 to TILE tokens."""
    if not isinstance(form, types.IntegerLiteral):
        raise TypingError("form must be a literal")
    chosen = FORMS[form.literal_value]

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        end = builder.append_basic_block()
        arguments = list(args[2:])
        for at in (0, 2, 6, 7, 9, 12):
            arguments[at] = builder.inttoptr(arguments[at], POINTER)
        switch = builder.switch(args[1], end)
        for count in range(1, TILE + 1):
            rows = _rows(chosen, count)
            block = builder.append_basic_block()
            switch.add_case(count, block)
            builder.position_at_end(block)
            name = f"strip_{chosen.name}_{rows}x{count}"
            call_own(builder, name, arguments, functools.partial(_write_strip, chosen, rows, count))
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(form, *[types.int64] * ARGUMENTS), generate


def _rows(form: Form, tokens: int) -> int:
    """Rows of a tile."""
    table = BLOCK_ROWS if form.name in BLOCK_FORMS else ROWS
    return table.get(tokens, 1)


def _write_strip(
    form: Form, rows: int, tokens: int, e: Emitter, x: Value, units: Value, weight: Value, row_bytes: Value, low: Value,
    high: Value, following: Value, scale: Value, scale_step: Value, term: Value, term_row: Value, term_token: Value,
    y: Value, y_token: Value,
) -> None:  # fmt: skip
    """The loop over tiles of rows x tokens, written as the body of a function."""
    b = e.builder
    # More lines can be on their way to L2 than to L1. Blocks are bound by their unpacking, and want them near; those
    # that are used once pass L2 by, where the context's caches and the program's data stay.
    nearness, ahead_bytes = 2, AHEAD_BYTES
    if form.name in BLOCK_FORMS:
        nearness, ahead_bytes = (0, AHEAD_BYTES // 2) if tokens == 1 else (3, AHEAD_BYTES)
    far = b.add(b.udiv(e.number(ahead_bytes), row_bytes), e.number(rows))
    step = rows * form.bytes
    lines = -(-step // LINE)

    def one_tile(index: Value, carried: list[Value]) -> list[Value]:
        row = b.add(low, b.mul(index, e.number(rows)))
        left = b.sub(high, row)
        starts = []
        for i in range(rows):  # a row that is not there is the last one once more
            there = b.icmp_signed("<", e.number(i), left)
            starts.append(
                e.at(weight, b.mul(b.select(there, b.add(row, e.number(i)), b.sub(high, e.number(1))), row_bytes))
            )
        target = b.add(row, far)
        beyond = b.sub(target, high)
        ahead = b.select(
            b.icmp_signed("<", beyond, e.number(0)),
            e.at(weight, b.mul(target, row_bytes)),
            e.at(following, b.mul(beyond, row_bytes)),
        )

        def one_unit(index: Value, sums: list[Value]) -> list[Value]:
            sums = list(sums)
            offset, fetched = b.mul(index, e.number(form.bytes)), b.mul(index, e.number(step))
            inputs = e.at(x, b.mul(index, e.number(form.unit * tokens * 4)))
            for line in range(lines):
                e.prefetch(e.at(ahead, fetched, line * step // lines), nearness)
            unpacked = [form.unpack(e, e.at(start, offset)) for start in starts]
            for k in range(form.unit // LANES):
                weights = [next(each) for each in unpacked]
                for token in range(tokens):
                    value = e.load(e.at(inputs, (k * tokens + token) * LANES * 4))
                    for i in range(rows):
                        at = i * tokens + token
                        sums[at] = e.fma(weights[i], value, sums[at])
            return sums

        sums = e.sums(e.loop(units, [e.floats(0.0)] * (rows * tokens), one_unit))
        done = b.append_basic_block()
        for i in range(rows):
            if i:
                here = b.append_basic_block()
                b.cbranch(b.icmp_signed("<", e.number(i), left), here, done)
                b.position_at_end(here)
            this = b.add(row, e.number(i))
            factor = e.load(e.at(scale, b.mul(this, scale_step)), FLOAT)
            terms, results = e.at(term, b.mul(this, term_row)), e.at(y, b.mul(this, e.number(4)))
            for token in range(tokens):
                added = e.load(e.at(terms, b.mul(e.number(token), term_token)), FLOAT)
                result = e.fma(sums[i * tokens + token], factor, added)
                e.store(result, e.at(results, b.mul(e.number(token), y_token)))
        b.branch(done)
        b.position_at_end(done)
        return []

    groups = b.udiv(b.add(b.sub(high, low), e.number(rows - 1)), e.number(rows))
    e.loop(groups, [], one_tile)
