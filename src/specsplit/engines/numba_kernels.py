"""A whole pass of a Llama-type model on the CPU as one compiled function, run by every thread of a team at once.

A pass over a handful of tokens takes about as long as reading the weights. So each weight is read from memory once, in
the type that it is stored in (float32, bfloat16 as bits, int8), for all tokens of the pass; everything else stays in
the processor's caches, and threads meet at a barrier that spins instead of sleeping.

Batch-invariant: what is computed for a token is the same sequence of operations whatever else is in the pass (He et al.
2025, "Defeating Nondeterminism in LLM Inference"). A dot product is summed in an order that is written out below, not
left to the compiler, and is the same for one token as for many; attention goes over the visible slots in the order of
the text, wherever they lie. So the logits of a token verified in a tree are, bit for bit, those of a pass over this
token alone, in every type of weights.

Compiled by Numba for the processor at hand and cached on disk.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

SPINS = 2000  # looks at the barrier before the thread offers its core to another
# Sums may be taken in vectors and products fused; infinities and NaN keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}

FEATURES = config.CPU_FEATURES or get_host_cpu_features()
LANES = 16 if "+avx512f" in FEATURES else 8 if "+avx2" in FEATURES else 4  # floats in a vector
ROWS = 4  # of weights that are multiplied at a time
TOKENS = 4  # that they are multiplied with at a time
TILE_ROWS = 2 if "+sse2" in FEATURES and "+avx512f" not in FEATURES else ROWS  # sums in registers: 16 need more than 16
AHEAD = 8  # rows from the current one to the one that is fetched into the L2 cache


# ---- what Numba does not have


@intrinsic
def _float_of(typingctx: Any, bits: Any) -> Any:
    """float32 with these 32 bits."""
    return types.float32(types.uint32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    """Pointer to float32 at an address."""
    signature = types.CPointer(types.float32)(types.int64)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

    return signature, generate


def _item(context: Any, builder: Any, array_type: Any, value: Any, *index: Any) -> Any:
    """Pointer to value[index]."""
    array = context.make_array(array_type)(context, builder, value)
    return cgutils.get_item_pointer(context, builder, array_type, array, list(index))


@intrinsic
def _fetch_add(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] before `value` was added to it, as one step for all threads; int64."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _item(context, builder, sig.args[0], args[0], args[1]), args[2], "acq_rel")

    return types.int64(array, types.intp, types.int64), generate


@intrinsic
def _load(typingctx: Any, array: Any, index: Any) -> Any:
    """array[index] as other threads left it; int64."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_item(context, builder, sig.args[0], args[0], args[1]), "acquire", 8)

    return types.int64(array, types.intp), generate


@intrinsic
def _offer_core(typingctx: Any) -> Any:
    """sched_yield()"""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])

    return types.int32(), generate


@intrinsic
def _fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c of float32, fused where the processor can."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.f32"), args)

    return types.float32(types.float32, types.float32, types.float32), generate


def _tile(rows: int, tokens: int) -> Any:
    """A function dot(weight, i, x, t, sums, fetch): dot products of `rows` rows of weights with `tokens` tokens.

    sums[j * rows + r] = weight[i + r] . x[t + j]. Sum number l of LANES adds up the products l, l + LANES, ... in turn
    (fused where the processor can); then halves of the lanes are added until one number is left, and after that comes
    the sum of the products that fill no vector. Every shape of a tile does the same for each of its numbers.
    fetch: the first of `rows` rows whose memory is asked for meanwhile. weight: float32, the bits of bfloat16, or int8.
    """

    @intrinsic
    def dot(typingctx: Any, weight: Any, i: Any, x: Any, t: Any, sums: Any, fetch: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            _, i, x, t, sums, fetch = args
            stored = sig.args[0].dtype
            number, word, index = ir.FloatType(), ir.IntType(32), i.type
            vector = ir.VectorType(number, LANES)

            def function(name: str, result: Any, arguments: Any) -> Any:
                return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)

            fma = {
                vector: function(f"llvm.fmuladd.v{LANES}f32", vector, [vector] * 3),
                number: function("llvm.fmuladd.f32", number, [number] * 3),
            }
            prefetch = function("llvm.prefetch.p0", ir.VoidType(), [ir.IntType(8).as_pointer(), word, word, word])

            def row(number: int, base: Any, offset: int) -> Any:
                place = builder.add(base, index(offset)), index(0)
                return _item(context, builder, sig.args[number], args[number], *place)

            def load(pointer: Any, k: Any, kind: Any, bytes_each: int) -> Any:
                value = builder.load(builder.bitcast(builder.gep(pointer, [k]), kind.as_pointer()))
                value.align = bytes_each
                return value

            def load_weight(pointer: Any, k: Any, kind: Any) -> Any:
                """As float32."""
                element = context.get_value_type(stored)
                wide = word
                if kind is vector:
                    element, wide = ir.VectorType(element, LANES), ir.VectorType(word, LANES)
                value = load(pointer, k, element, stored.bitwidth // 8)
                if stored == types.uint16:
                    shift = ir.Constant(wide, [16] * LANES if kind is vector else 16)
                    return builder.bitcast(builder.shl(builder.zext(value, wide), shift), kind)
                return builder.sitofp(value, kind) if stored == types.int8 else value

            weights = [row(0, i, r) for r in range(rows)]
            fetched = [row(0, fetch, r) for r in range(rows)]
            inputs = [row(2, t, j) for j in range(tokens)]

            def add_up(kind: Any, zero: Any, begin: Any, end: Any, step: int) -> list[Any]:
                """The sums over k = begin, begin + step, ... below end."""
                totals = [cgutils.alloca_once_value(builder, zero) for _ in range(rows * tokens)]
                with cgutils.for_range_slice(builder, begin, end, index(step), index) as (k, _):
                    values = [load(pointer, k, kind, 4) for pointer in inputs]
                    for r in range(rows):
                        if kind is vector:
                            place = builder.bitcast(builder.gep(fetched[r], [k]), ir.IntType(8).as_pointer())
                            builder.call(prefetch, [place, word(0), word(2), word(1)])  # to read, into L2, data
                        factor = load_weight(weights[r], k, kind)
                        for j, value in enumerate(values):
                            total = totals[j * rows + r]
                            builder.store(builder.call(fma[kind], [factor, value, builder.load(total)]), total)
                return [builder.load(total) for total in totals]

            size = cgutils.unpack_tuple(builder, context.make_array(sig.args[2])(context, builder, x).shape, 2)[1]
            whole = builder.mul(builder.sdiv(size, index(LANES)), index(LANES))
            parts = add_up(vector, ir.Constant(vector, [0.0] * LANES), index(0), whole, LANES)
            rest = add_up(number, number(0.0), whole, size, 1)
            for n, total in enumerate(_add_lanes(builder, parts)):
                place = _item(context, builder, sig.args[4], sums, index(n))
                builder.store(builder.fadd(total, rest[n]), place)
            return context.get_dummy_value()

        return types.void(weight, types.intp, x, types.intp, sums, types.intp), generate

    return dot


def _add_lanes(builder: Any, vectors: list[Any]) -> list[Any]:
    """The sum of the lanes of each vector, halves first; two vectors at a time, which changes nothing in their sums."""
    mask_type = ir.VectorType(ir.IntType(32), LANES)
    groups = [(vector, [n]) for n, vector in enumerate(vectors)]  # vector n has one group of lanes, which are summands
    width = LANES
    while width > 1:
        half, merged = width // 2, []
        for a in range(0, len(groups), 2):
            (first, members), (second, others) = groups[a], groups[min(a + 1, len(groups) - 1)]
            starts = range(0, 2 * LANES, width)
            halves = [
                builder.shuffle_vector(
                    first, second, ir.Constant(mask_type, [start + lane for start in starts for lane in lanes])
                )
                for lanes in (range(half), range(half, width))
            ]
            merged.append((builder.fadd(*halves), members + others))
        groups, width = merged, half
    found = {}
    for vector, members in groups:
        for lane, n in enumerate(members):
            found[n] = builder.extract_element(vector, ir.Constant(ir.IntType(32), lane))
    return [found[n] for n in range(len(vectors))]


_one_token, _two_tokens, _four_tokens = _tile(ROWS, 1), _tile(ROWS, 2), _tile(TILE_ROWS, TOKENS)


# ---- steps of a pass


@njit(nogil=True, cache=True)
def _meet(sync: np.ndarray, threads: int) -> None:
    """Wait until all threads are here. sync: int64, [0] counts arrivals, [8] meetings: a cache line apart."""
    if threads == 1:
        return
    meeting = _load(sync, 8)
    if _fetch_add(sync, 0, 1) == threads - 1:
        sync[0] = 0
        _fetch_add(sync, 8, 1)
        return
    spins = 0
    while _load(sync, 8) == meeting:
        spins += 1
        if spins > SPINS:
            _offer_core()


@njit(nogil=True, cache=True)
def _share(count: int, multiple: int, thread: int, threads: int) -> tuple[int, int]:
    """Which of `count` rows a thread does: about as many as the others, from a multiple of `multiple` on."""
    each = (count + threads * multiple - 1) // (threads * multiple) * multiple
    return min(count, thread * each), min(count, (thread + 1) * each)


@njit(nogil=True, cache=True)
def _finish(sums, rows, tokens, y, t, i, begin, end, scale, bias, add):
    """Write the sums of a tile whose first row is i and whose first token is t; of its rows those in [begin, end)."""
    for j in range(tokens):
        for r in range(begin, end):
            factor = scale[i + r] if scale.shape[0] > 0 else np.float32(1)
            before = y[t + j, i + r] if add else bias[i + r] if bias.shape[0] > 0 else np.float32(0)
            # One operation that is always fused: left to the compiler, some tiles would be and others not.
            y[t + j, i + r] = _fma(sums[j * rows + r], factor, before)


@njit(nogil=True, cache=True)
def _matmul(x, weight, scale, bias, y, low, high, add):
    """y[:, low:high] = x weight[low:high]^T (* scale) (+ bias), or += for the residual stream.

    x: [tokens, inputs]; weight: [outputs, inputs], at least ROWS outputs; scale, bias: [outputs], or [0] for none.
    With `add` there is no bias.
    """
    tokens = x.shape[0]
    sums = np.empty(ROWS * TOKENS, np.float32)
    for row in range(low, high, ROWS):
        i = max(min(row, high - ROWS), 0)  # the last rows may be computed with some before them
        begin, end = row - i, min(ROWS, high - i)
        t = 0
        while t + TOKENS <= tokens:
            for r in range(0, ROWS, TILE_ROWS):
                _four_tokens(weight, i + r, x, t, sums, i + r + AHEAD)
                if begin == 0 and end == ROWS:
                    _finish(sums, TILE_ROWS, TOKENS, y, t, i + r, 0, TILE_ROWS, scale, bias, add)
                else:
                    part = max(begin - r, 0), min(end - r, TILE_ROWS)
                    _finish(sums, TILE_ROWS, TOKENS, y, t, i + r, part[0], part[1], scale, bias, add)
            t += TOKENS
        if t + 2 <= tokens:
            _two_tokens(weight, i, x, t, sums, i + AHEAD)
            _finish(sums, ROWS, 2, y, t, i, begin, end, scale, bias, add)
            t += 2
        if t < tokens:
            _one_token(weight, i, x, t, sums, i + AHEAD)
            _finish(sums, ROWS, 1, y, t, i, begin, end, scale, bias, add)


@njit(nogil=True, cache=True, inline="always")
def _exp_of(x):
    """exp(x) for -87 <= x <= 88, and the nearest of those beyond; good to 2 ulp. Loops over it become vectors."""
    x *= np.float32(1.44269504)
    x = x if x > np.float32(-126) else np.float32(-126)
    x = x if x < np.float32(127) else np.float32(127)
    whole = np.floor(x + np.float32(0.5))
    f = (x - whole) * np.float32(0.69314718)
    p = np.float32(1.0 / 5040)
    p = p * f + np.float32(1.0 / 720)
    p = p * f + np.float32(1.0 / 120)
    p = p * f + np.float32(1.0 / 24)
    p = p * f + np.float32(1.0 / 6)
    p = p * f + np.float32(0.5)
    p = p * f + np.float32(1)
    p = p * f + np.float32(1)
    return p * _float_of(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))


@njit(nogil=True, cache=True)
def _gate(x: np.ndarray, low: int, high: int, out: np.ndarray) -> None:
    """out[:, low:high] = silu(gate) * up (Shazeer 2020). x: [tokens, 2 * width], gate first; out: [tokens, width]."""
    width = out.shape[1]
    for t in range(out.shape[0]):
        gate, up, y = x[t, :width], x[t, width:], out[t]
        for i in range(low, high):
            y[i] = gate[i] / (np.float32(1) + _exp_of(-gate[i])) * up[i]


@njit(nogil=True, fastmath=FAST, cache=True)
def _normalise(x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray) -> None:
    """Root mean square norm of one token (Zhang, Sennrich 2019)."""
    total = np.float32(0)
    for k in range(x.shape[0]):
        total += x[k] * x[k]
    scale = np.float32(1) / np.sqrt(total / np.float32(x.shape[0]) + np.float32(eps))
    for k in range(x.shape[0]):
        out[k] = x[k] * scale * weight[k]


@njit(nogil=True, fastmath=FAST, cache=True)
def _exp(values: np.ndarray, count: int, largest: float) -> Any:
    """values[:count] become exp(value - largest), value <= largest; returns their sum. In vectors, good to 2 ulp."""
    total = np.float32(0)
    for j in range(count):
        value = _exp_of(values[j] - largest)
        values[j] = value
        total += value
    return total


@njit(nogil=True, fastmath=FAST, cache=True)
def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> None:
    """Rotary position embedding of one head (Su et al. 2021), halves paired as in Llama's published weights."""
    half = cos.shape[0]
    for k in range(half):
        a, b = x[k], x[k + half]
        x[k] = a * cos[k] - b * sin[k]
        x[k + half] = b * cos[k] + a * sin[k]


@njit(nogil=True, fastmath=FAST, cache=True)
def _attend(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, slots: np.ndarray, scores: np.ndarray, out: np.ndarray
) -> None:
    """Attention of one head of one token. q, out: [head_dim]; keys, values: [capacity, head_dim]; slots: which are
    visible, in the order of the text; scores: room for them."""
    dim, count = q.shape[0], slots.shape[0]
    scale = np.float32(1) / np.sqrt(np.float32(dim))
    largest = np.float32(-math.inf)
    for j in range(count):
        key = keys[slots[j]]
        total = np.float32(0)
        for k in range(dim):
            total += q[k] * key[k]
        scores[j] = total * scale
        largest = max(largest, scores[j])
    norm = np.float32(1) / _exp(scores, count, largest)
    for k in range(dim):
        out[k] = np.float32(0)
    for j in range(count):
        p, value = scores[j], values[slots[j]]
        for k in range(dim):
            out[k] += p * value[k]
    for k in range(dim):
        out[k] *= norm


# ---- the pass


@njit(nogil=True, fastmath=FAST, cache=True)
def run_pass(
    thread, threads, sync,
    # the model: stacked over layers; norms, scales and biases are float32, [.., 0] when there are none
    qkv, qkv_scale, qkv_bias, output, output_scale, gate_up, gate_up_scale, down, down_scale, head, head_scale,
    attention_norm, mlp_norm, final_norm, q_norm, k_norm, cos, sin, windows, nothing, eps, kv_heads, head_dim,
    # the tokens: positions, where each one's cache is, its own slot in it, its visible slots slots[first[t]:first[t+1]]
    positions, key_address, value_address, capacity, own_slot, slots, first, wanted,
    # work space: x [tokens, hidden] holds the embeddings; h and scores are each thread's own, the rest is shared
    x, h, projected, attended, gate_and_up, gated, scores, logits,
):  # fmt: skip
    """One pass over the tokens x; logits [len(wanted), vocabulary] are those after the tokens `wanted`.

    Keys and values of a cache: float32 [layers, kv_heads, capacity, head_dim].
    """
    count, layers, width = x.shape[0], qkv.shape[0], gated.shape[1]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    group = heads // kv_heads
    for layer in range(layers):
        for t in range(count):  # every thread for itself: cheaper than to meet
            _normalise(x[t], attention_norm[layer], eps, h[t])
        low, high = _share(qkv.shape[1], 8, thread, threads)
        _matmul(h, qkv[layer], qkv_scale[layer], qkv_bias[layer], projected, low, high, False)
        _meet(sync, threads)
        # Queries in place, keys and values into the caches.
        low, high = _share(count * (heads + 2 * kv_heads), 1, thread, threads)
        for item in range(low, high):
            t, part = item // (heads + 2 * kv_heads), item % (heads + 2 * kv_heads)
            vector = projected[t, part * head_dim : (part + 1) * head_dim]
            if part < heads + kv_heads:
                norm = q_norm[layer] if part < heads else k_norm[layer]
                if norm.shape[0] > 0:
                    _normalise(vector, norm, eps, vector)
                _rotate(vector, cos[positions[t]], sin[positions[t]])
            if part >= heads:
                is_key = part < heads + kv_heads
                place = layer * kv_heads + part - heads - (0 if is_key else kv_heads)
                address = (key_address[t] if is_key else value_address[t]) + 4 * head_dim * (
                    place * capacity[t] + own_slot[t]
                )
                cached = carray(_pointer(address), (head_dim,), np.float32)
                for k in range(head_dim):
                    cached[k] = vector[k]
        _meet(sync, threads)
        low, high = _share(count * heads, 1, thread, threads)
        for item in range(low, high):
            t, q_head = item // heads, item % heads
            offset = 4 * head_dim * (layer * kv_heads + q_head // group) * capacity[t]
            shape = (capacity[t], head_dim)
            keys = carray(_pointer(key_address[t] + offset), shape, np.float32)
            values = carray(_pointer(value_address[t] + offset), shape, np.float32)
            begin = first[t]
            if windows[layer] > 0:
                begin = max(begin, first[t + 1] - windows[layer])
            dims = slice(q_head * head_dim, (q_head + 1) * head_dim)
            _attend(projected[t, dims], keys, values, slots[begin : first[t + 1]], scores, attended[t, dims])
        _meet(sync, threads)
        low, high = _share(output.shape[1], 8, thread, threads)
        _matmul(attended, output[layer], output_scale[layer], nothing, x, low, high, True)
        _meet(sync, threads)
        for t in range(count):
            _normalise(x[t], mlp_norm[layer], eps, h[t])
        low, high = _share(width, 4, thread, threads)
        for first_row in (0, width):  # of the gate, then of what it is multiplied with
            rows = first_row + low, first_row + high
            _matmul(h, gate_up[layer], gate_up_scale[layer], nothing, gate_and_up, rows[0], rows[1], False)
        _gate(gate_and_up, low, high, gated)
        _meet(sync, threads)
        low, high = _share(down.shape[1], 8, thread, threads)
        _matmul(gated, down[layer], down_scale[layer], nothing, x, low, high, True)
        _meet(sync, threads)
    for r in range(wanted.shape[0]):
        _normalise(x[wanted[r]], final_norm, eps, h[r])
    low, high = _share(head.shape[0], 8, thread, threads)
    _matmul(h[: wanted.shape[0]], head, head_scale, nothing, logits, low, high, False)
    _meet(sync, threads)
