"""The forms that weights are stored in, and the instructions that turn each into float32 in registers.

A form knows how many weights it turns at a time (`unit`), how many bytes these take, and how to emit their vectors. The
blocks of GGUF (Q4_0, Q4_1, Q8_0, Q4_K, Q6_K: https://github.com/ggml-org/ggml, ggml-quants.h) become the very numbers
that `gguf.quants.dequantize` gives: a scale has at most 11 significant bits and, multiplied by the small integers of a
block, at most 24, so these products are exact, and adding the minimum in the same instruction rounds once, as adding it
afterwards does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llvmlite import ir

from specsplit.engines.vectors import BYTES, I32, INTS, LANES, VECTOR, Emitter, Value

# What `vectors` gets: the emitter, the address of a unit, and a list of scratch addresses; it yields unit / 8 vectors.
Unpack = Callable[[Emitter, Value], Iterator[Value]]


@dataclass(frozen=True)
class Form:
    """How weights are stored. unit: weights that are turned to float32 at a time, bytes: that they take."""

    name: str
    unit: int
    bytes: int
    unpack: Unpack


def _float32(e: Emitter, unit: Value) -> Iterator[Value]:
    for i in range(2):
        yield e.load(e.at(unit, 32 * i))


def _bfloat16(e: Emitter, unit: Value) -> Iterator[Value]:
    for i in range(4):
        bits = e.load(e.at(unit, 16 * i), ir.VectorType(ir.IntType(16), LANES), 2)
        yield e.builder.bitcast(e.builder.shl(e.builder.zext(bits, INTS), e.ints(16)), VECTOR)


def _int8(e: Emitter, unit: Value) -> Iterator[Value]:
    for i in range(4):
        yield e.builder.sitofp(e.builder.sext(e.load(e.at(unit, 8 * i), BYTES), INTS), VECTOR)


def _nibbles(e: Emitter, at: Value, count: int) -> Iterator[Value]:
    """`count` bytes as twice as many int32: all their low halves, then all their high ones."""
    wide = [e.builder.zext(e.load(e.at(at, 8 * i), BYTES), INTS) for i in range(count // 8)]
    for each in wide:
        yield e.builder.and_(each, e.ints(15))
    for each in wide:
        yield e.builder.lshr(each, e.ints(4))


def _q4_0(e: Emitter, unit: Value) -> Iterator[Value]:
    """d, 16 bytes of nibbles: d * (q - 8)."""
    d = e.spread(e.half(unit))
    for q in _nibbles(e, e.at(unit, 2), 16):
        yield e.builder.fmul(d, e.builder.sitofp(e.builder.sub(q, e.ints(8)), VECTOR))


def _q4_1(e: Emitter, unit: Value) -> Iterator[Value]:
    """d, m, 16 bytes of nibbles: d * q + m."""
    d, m = e.spread(e.half(unit)), e.spread(e.half(e.at(unit, 2)))
    for q in _nibbles(e, e.at(unit, 4), 16):
        yield e.fma(d, e.builder.sitofp(q, VECTOR), m)


def _q8_0(e: Emitter, unit: Value) -> Iterator[Value]:
    """d, 32 int8: d * q."""
    d = e.spread(e.half(unit))
    for q in _int8(e, e.at(unit, 2)):
        yield e.builder.fmul(d, q)


def _q4_k(e: Emitter, unit: Value) -> Iterator[Value]:
    """d, dmin, 12 bytes with 8 scales and 8 minima of 6 bits, 128 bytes of nibbles: d * scale * q - dmin * minimum."""
    b = e.builder
    d, dmin = e.spread(e.half(unit)), e.spread(e.half(e.at(unit, 2)))
    word = [b.load(e.at(unit, 4 + 4 * i), typ=I32, align=1) for i in range(3)]

    def masked(value: Value, shift: int, mask: int) -> Value:
        return b.and_(b.lshr(value, I32(shift)), I32(mask))

    low = [masked(word[i], 0, 0x3F3F3F3F) for i in (0, 1)]
    high = [b.or_(masked(word[2], shift, 0x0F0F0F0F), masked(word[i], 2, 0x30303030)) for i, shift in ((0, 0), (1, 4))]
    # Four bytes each: the scales (or minima) of the first four parts of 32, then those of the last four.
    scales, minima = (b.uitofp(b.zext(b.bitcast(_pair(e, low[i], high[i]), BYTES), INTS), VECTOR) for i in (0, 1))
    scales, minima = b.fmul(d, scales), b.fneg(b.fmul(dmin, minima))
    for part in range(4):
        quants = list(_nibbles(e, e.at(unit, 16 + 32 * part), 32))
        for half in range(2):
            lane = [2 * part + half] * LANES
            scale, minimum = e.shuffled(scales, scales, lane), e.shuffled(minima, minima, lane)
            for q in quants[4 * half : 4 * half + 4]:
                yield e.fma(scale, b.sitofp(q, VECTOR), minimum)


def _pair(e: Emitter, first: Value, second: Value) -> Value:
    b = e.builder
    pair = b.insert_element(ir.Constant(ir.VectorType(I32, 2), ir.Undefined), first, I32(0))
    return b.insert_element(pair, second, I32(1))


def _q6_k(e: Emitter, unit: Value) -> Iterator[Value]:
    """128 bytes of low nibbles, 64 of two high bits, 16 scales of int8, d: d * scale * (q - 32)."""
    b = e.builder
    d = e.spread(e.half(e.at(unit, 208)))
    scales = [b.fmul(d, q) for q in _int8_pair(e, e.at(unit, 192))]
    for part in range(2):  # of 128 weights
        low = [b.zext(e.load(e.at(unit, 64 * part + 8 * i), BYTES), INTS) for i in range(8)]
        high = [b.zext(e.load(e.at(unit, 128 + 32 * part + 8 * i), BYTES), INTS) for i in range(4)]
        for i in range(16):
            nibble = b.lshr(low[i - 8], e.ints(4)) if i >= 8 else b.and_(low[i], e.ints(15))
            shift = 2 * (i // 4)  # of the two high bits, to where they belong: bits 4 and 5
            bits = high[i % 4]
            bits = b.shl(bits, e.ints(4 - shift)) if shift <= 4 else b.lshr(bits, e.ints(shift - 4))
            q = b.sub(b.or_(nibble, b.and_(bits, e.ints(48))), e.ints(32))
            at = 8 * part + i // 2
            scale = e.shuffled(scales[at // 8], scales[at // 8], [at % 8] * LANES)
            yield b.fmul(scale, b.sitofp(q, VECTOR))


def _int8_pair(e: Emitter, at: Value) -> Iterator[Value]:
    for i in range(2):
        yield e.builder.sitofp(e.builder.sext(e.load(e.at(at, 8 * i), BYTES), INTS), VECTOR)


FORMS = (
    Form("float32", 16, 64, _float32),
    Form("bfloat16", 32, 64, _bfloat16),
    Form("int8", 32, 32, _int8),
    Form("Q4_0", 32, 18, _q4_0),
    Form("Q4_1", 32, 20, _q4_1),
    Form("Q8_0", 32, 34, _q8_0),
    Form("Q4_K", 256, 144, _q4_k),
    Form("Q6_K", 256, 210, _q6_k),
)
NUMBERS = {form.name: number for number, form in enumerate(FORMS)}
BLOCK_FORMS = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K")  # as GGUF calls them
