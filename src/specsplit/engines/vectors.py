"""Vectors of eight float32 for the kernels of the CPU engine, written as LLVM instructions that Numba compiles.

Eight lanes for every processor: LLVM makes one AVX register of them, or two of NEON or SSE, and the numbers are the
same. What is emitted here has no fast-math flags, so every sum is taken in the order in which it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 8
LINE = 64  # bytes of a cache line

FLOAT, I8, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
VECTOR, BYTES, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(I8, LANES), ir.VectorType(I32, LANES)
POINTER = ir.PointerType()
_TYPE_NAMES = {FLOAT: "f32", VECTOR: "v8f32"}

Value = Any  # of llvmlite, which has no types
Body = Callable[..., None]


class Emitter:
    """Writes instructions of one function. Addresses are of bytes."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def number(self, value: int) -> Value:
        return ir.Constant(I64, value)

    def ints(self, value: int) -> Value:
        return ir.Constant(INTS, [value] * LANES)

    def floats(self, value: float) -> Value:
        return ir.Constant(VECTOR, [value] * LANES)

    def at(self, pointer: Value, *offsets: Value | int) -> Value:
        """The address so many bytes after `pointer`."""
        for offset in offsets:
            index = self.number(offset) if isinstance(offset, int) else offset
            pointer = self.builder.gep(pointer, [index], source_etype=I8)
        return pointer

    def load(self, pointer: Value, kind: Any = VECTOR, align: int | None = None) -> Value:
        if align is None:
            align = 1 if kind in (BYTES, I8) else 4
        return self.builder.load(pointer, typ=kind, align=align)

    def store(self, value: Value, pointer: Value) -> None:
        self.builder.store(value, pointer, align=4)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once."""
        return self.call(f"llvm.fma.{_TYPE_NAMES[c.type]}", c.type, [a, b, c])

    def call(self, name: str, result: Any, arguments: Sequence[Value]) -> Value:
        kind = ir.FunctionType(result, [a.type for a in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def prefetch(self, pointer: Value, nearness: int) -> None:
        """Have the cache line at this address fetched; any address will do. nearness: 3 = to L1, 2 = to L2, 0 = to L1
        alone."""
        constants = [ir.Constant(I32, value) for value in (0, nearness, 1)]  # to read, data
        self.call("llvm.prefetch.p0", ir.VoidType(), [pointer, *constants])

    def spread(self, scalar: Value) -> Value:
        """All lanes as this number."""
        one = self.builder.insert_element(ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined), scalar, I32(0))
        return self.builder.shuffle_vector(one, one, ir.Constant(INTS, [0] * LANES))

    def half(self, pointer: Value) -> Value:
        """The float16 at an address as float32."""
        return self.builder.fpext(self.builder.load(pointer, typ=ir.HalfType(), align=1), FLOAT)

    def shuffled(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))

    def sums(self, vectors: Sequence[Value]) -> list[Value]:
        """The sum over the lanes of each vector, as scalars: lane i + lane i + 4, then + 2, then + 1, for all alike.

        Two vectors are added up in the instructions of one, eight in those of four.
        """
        steps = (
            ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
            ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]),
            ([0, 8, 2, 10, 4, 12, 6, 14], [1, 9, 3, 11, 5, 13, 7, 15]),
        )
        found: list[Value] = []
        for start in range(0, len(vectors), LANES):
            group = list(vectors[start : start + LANES])
            # Where the sum of each vector lies in the one that is left, by how the lanes above are halved.
            lanes = [0, 4, 2, 6, 1, 5, 3, 7]
            level = [*group, *[group[-1]] * (LANES - len(group))]
            for low, high in steps:
                level = [
                    self.builder.fadd(self.shuffled(a, b, low), self.shuffled(a, b, high))
                    for a, b in zip(level[::2], level[1::2], strict=True)
                ]
            found += [self.builder.extract_element(level[0], I32(lane)) for lane in lanes[: len(group)]]
        return found

    def loop(
        self,
        count: Value,
        carried: Sequence[Value],
        body: Callable[[Value, list[Value]], list[Value]],
        may_be_none: bool = False,
    ) -> list[Value]:
        """body(index, values) -> values, `count` times and at least once, starting with `carried`; the last values."""
        builder = self.builder
        before, inside = builder.block, builder.append_basic_block()
        after = builder.append_basic_block()
        if may_be_none:  # then nothing can be carried out of it
            assert not carried
            builder.cbranch(builder.icmp_signed(">", count, self.number(0)), inside, after)
        else:
            builder.branch(inside)
        builder.position_at_end(inside)
        index = builder.phi(I64)
        index.add_incoming(self.number(0), before)
        values = [builder.phi(value.type) for value in carried]
        for phi, value in zip(values, carried, strict=True):
            phi.add_incoming(value, before)
        results = body(index, values)
        following = builder.add(index, self.number(1))
        index.add_incoming(following, builder.block)
        for phi, value in zip(values, results, strict=True):
            phi.add_incoming(value, builder.block)
        builder.cbranch(builder.icmp_unsigned("<", following, count), inside, after)
        builder.position_at_end(after)
        return results

    def exp(self, x: Value) -> Value:
        """exp of each lane, good to 2 ulp; 0 below -87."""
        x = self.clamped(self.builder.fmul(x, self.floats(1.44269504)), -127.0, 127.0)
        whole = self.call("llvm.floor.v8f32", VECTOR, [self.builder.fadd(x, self.floats(0.5))])
        f = self.builder.fmul(self.builder.fsub(x, whole), self.floats(0.69314718))
        p = self.floats(1 / 5040)
        for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
            p = self.fma(p, f, self.floats(coefficient))
        power = self.builder.shl(self.builder.add(self.builder.fptosi(whole, INTS), self.ints(127)), self.ints(23))
        return self.builder.fmul(p, self.builder.bitcast(power, VECTOR))

    def clamped(self, x: Value, low: float, high: float) -> Value:
        """Each lane, at least `low` and at most `high`; NaN becomes `low`."""
        builder = self.builder
        x = builder.select(builder.fcmp_ordered(">", x, self.floats(low)), x, self.floats(low))
        return builder.select(builder.fcmp_ordered("<", x, self.floats(high)), x, self.floats(high))


def call_own(builder: ir.IRBuilder, name: str, arguments: Sequence[Value], body: Callable[..., None]) -> None:
    """Call a function of this module, which body(emitter, *arguments) writes where it is called first.

    Functions of their own, not inlined, keep each loop's registers to itself and compile faster.
    """
    module = builder.module
    function = module.globals.get(name)
    if function is None:
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [a.type for a in arguments]), name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        inner = ir.IRBuilder(function.append_basic_block())
        body(Emitter(inner), *function.args)
        inner.ret_void()
    builder.call(function, arguments)
