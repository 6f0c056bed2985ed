"""A whole pass of a Llama-type model on the CPU as one compiled function, run by every thread of a team at once.

At a handful of tokens a pass is as long as reading the weights takes, so each weight is read from memory once, in the
type that it is stored in (float32, bfloat16 as bits, int8), for all tokens of the pass; everything else stays in the
processor's caches, and threads meet at a barrier that spins instead of sleeping.

Batch-invariant: what is computed for a token is the same sequence of operations whatever else is in the pass (He et al.
2025, "Defeating Nondeterminism in LLM Inference"). A dot product is summed up in the same order for one token as for
many, and attention goes over the visible slots in the order of the text, wherever they lie. So the logits of a token
verified in a tree are, bit for bit, those of a pass over this token alone, in every type of weights.

Compiled by Numba for the processor at hand and cached on disk.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

BLOCK = 4
SPINS = 2000  # looks at the barrier before the thread offers its core to another
# Sums may be taken in vectors and products fused; infinities and NaN keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}


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


def _item(context: Any, builder: Any, array_type: Any, value: Any, index: Any) -> Any:
    array = context.make_array(array_type)(context, builder, value)
    return cgutils.get_item_pointer(context, builder, array_type, array, [index])


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
def _widen(typingctx: Any, weight: Any) -> Any:
    """A stored weight as float32: uint16 are the bits of a bfloat16, int8 whole numbers."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if weight == types.uint16:
            bits = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(bits, ir.FloatType())
        return builder.sitofp(args[0], ir.FloatType()) if weight == types.int8 else args[0]

    return types.float32(weight), generate


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


@njit(nogil=True, fastmath=FAST, cache=True, inline="always")
def _two_by_four(w0, w1, x, t):
    """Dot products of two rows of weights with tokens t to t + 3 of x, those of the first row first."""
    x0, x1, x2, x3 = x[t], x[t + 1], x[t + 2], x[t + 3]
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
    for k in range(x.shape[1]):
        a, b = _widen(w0[k]), _widen(w1[k])
        a0 += a * x0[k]
        a1 += a * x1[k]
        a2 += a * x2[k]
        a3 += a * x3[k]
        b0 += b * x0[k]
        b1 += b * x1[k]
        b2 += b * x2[k]
        b3 += b * x3[k]
    return a0, a1, a2, a3, b0, b1, b2, b3


@njit(nogil=True, fastmath=FAST, cache=True, inline="always")
def _eight_by_one(weight, i, j, x):
    """Dot products of rows i to i + 3 and j to j + 3 of weights with one token x.

    Eight sums at a time, as in `_two_by_four`: the compiler makes the same vectors of them and each sum is the same.
    """
    w0, w1, w2, w3 = weight[i], weight[i + 1], weight[i + 2], weight[i + 3]
    w4, w5, w6, w7 = weight[j], weight[j + 1], weight[j + 2], weight[j + 3]
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
    for k in range(x.shape[0]):
        v = x[k]
        a0 += _widen(w0[k]) * v
        a1 += _widen(w1[k]) * v
        a2 += _widen(w2[k]) * v
        a3 += _widen(w3[k]) * v
        b0 += _widen(w4[k]) * v
        b1 += _widen(w5[k]) * v
        b2 += _widen(w6[k]) * v
        b3 += _widen(w7[k]) * v
    return a0, a1, a2, a3, b0, b1, b2, b3


@njit(nogil=True, fastmath=FAST, cache=True, inline="always")
def _affine(value, i, scale, bias):
    if scale.shape[0] > 0:
        value *= scale[i]
    if bias.shape[0] > 0:
        value += bias[i]
    return value


@njit(nogil=True, fastmath=FAST, cache=True)
def _matmul(count, x, weight, scale, bias, y, low, high, add):
    """y[:, low:high] = x weight[low:high]^T (* scale) (+ bias), or += for the residual stream.

    x: [tokens, inputs], `count` of them and padding to a multiple of BLOCK; scale, bias: [outputs], or [0] for none.
    Written out, as what is done once for eight sums takes about as long as the sums.
    """
    i = low
    while count == 1 and i + 8 <= high:
        s0, s1, s2, s3, s4, s5, s6, s7 = _eight_by_one(weight, i, i + 4, x[0])
        y0 = y[0, i : i + 8]
        if scale.shape[0] > 0 or bias.shape[0] > 0:
            s0, s1 = _affine(s0, i, scale, bias), _affine(s1, i + 1, scale, bias)
            s2, s3 = _affine(s2, i + 2, scale, bias), _affine(s3, i + 3, scale, bias)
            s4, s5 = _affine(s4, i + 4, scale, bias), _affine(s5, i + 5, scale, bias)
            s6, s7 = _affine(s6, i + 6, scale, bias), _affine(s7, i + 7, scale, bias)
        if add:
            s0, s1, s2, s3 = s0 + y0[0], s1 + y0[1], s2 + y0[2], s3 + y0[3]
            s4, s5, s6, s7 = s4 + y0[4], s5 + y0[5], s6 + y0[6], s7 + y0[7]
        y0[0], y0[1], y0[2], y0[3], y0[4], y0[5], y0[6], y0[7] = s0, s1, s2, s3, s4, s5, s6, s7
        i += 8
    while i < high:
        j = min(i + 1, high - 1)  # of an odd number the last is done twice, with the same result
        w0, w1 = weight[i], weight[j]
        for t in range(0, x.shape[0], BLOCK):
            a0, a1, a2, a3, b0, b1, b2, b3 = _two_by_four(w0, w1, x, t)
            if scale.shape[0] > 0 or bias.shape[0] > 0:
                a0, a1 = _affine(a0, i, scale, bias), _affine(a1, i, scale, bias)
                a2, a3 = _affine(a2, i, scale, bias), _affine(a3, i, scale, bias)
                b0, b1 = _affine(b0, j, scale, bias), _affine(b1, j, scale, bias)
                b2, b3 = _affine(b2, j, scale, bias), _affine(b3, j, scale, bias)
            y0, y1, y2, y3 = y[t], y[t + 1], y[t + 2], y[t + 3]
            if add:
                a0, a1, a2, a3 = a0 + y0[i], a1 + y1[i], a2 + y2[i], a3 + y3[i]
                b0, b1, b2, b3 = b0 + y0[j], b1 + y1[j], b2 + y2[j], b3 + y3[j]
            y0[i], y1[i], y2[i], y3[i] = a0, a1, a2, a3
            y0[j], y1[j], y2[j], y3[j] = b0, b1, b2, b3
        i += 2


@njit(nogil=True, fastmath=FAST, cache=True, inline="always")
def _glu(gate, up, i, width, scale):
    if scale.shape[0] > 0:
        gate *= scale[i]
        up *= scale[width + i]
    return gate / (np.float32(1) + math.exp(-gate)) * up


@njit(nogil=True, fastmath=FAST, cache=True)
def _gated(count, x, weight, scale, y, low, high):
    """y[:, low:high] = silu(x gate^T) * (x up^T). weight: [2 * width, inputs], the rows of gate, then those of up."""
    width = weight.shape[0] // 2
    i = low
    while count == 1 and i + 4 <= high:
        g0, g1, g2, g3, u0, u1, u2, u3 = _eight_by_one(weight, i, width + i, x[0])
        y0 = y[0, i : i + 4]
        y0[0], y0[1] = _glu(g0, u0, i, width, scale), _glu(g1, u1, i + 1, width, scale)
        y0[2], y0[3] = _glu(g2, u2, i + 2, width, scale), _glu(g3, u3, i + 3, width, scale)
        i += 4
    while i < high:
        w0, w1 = weight[i], weight[width + i]
        for t in range(0, x.shape[0], BLOCK):
            g0, g1, g2, g3, u0, u1, u2, u3 = _two_by_four(w0, w1, x, t)
            y0, y1, y2, y3 = y[t], y[t + 1], y[t + 2], y[t + 3]
            y0[i], y1[i] = _glu(g0, u0, i, width, scale), _glu(g1, u1, i, width, scale)
            y2[i], y3[i] = _glu(g2, u2, i, width, scale), _glu(g3, u3, i, width, scale)
        i += 1


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
        x = max((values[j] - largest) * np.float32(1.44269504), np.float32(-126))
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
        value = p * _float_of(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))
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
    count, positions, key_address, value_address, capacity, own_slot, slots, first, wanted,
    # room: x [tokens, hidden] holds the embeddings, and all but h and scores, which are each thread's own, is shared
    x, h, projected, attended, gated, scores, logits,
):  # fmt: skip
    """One pass over `count` tokens; logits[:len(wanted)] are those after the tokens `wanted`.

    Keys and values of a cache: float32 [layers, kv_heads, capacity, head_dim].
    """
    layers = qkv.shape[0]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    group = heads // kv_heads
    for layer in range(layers):
        for t in range(x.shape[0]):  # every thread for itself: cheaper than to meet
            _normalise(x[t], attention_norm[layer], eps, h[t])
        low, high = _share(qkv.shape[1], 8, thread, threads)
        _matmul(count, h, qkv[layer], qkv_scale[layer], qkv_bias[layer], projected, low, high, False)
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
        _matmul(count, attended, output[layer], output_scale[layer], nothing, x, low, high, True)
        _meet(sync, threads)
        for t in range(x.shape[0]):
            _normalise(x[t], mlp_norm[layer], eps, h[t])
        low, high = _share(gate_up.shape[1] // 2, 4, thread, threads)
        _gated(count, h, gate_up[layer], gate_up_scale[layer], gated, low, high)
        _meet(sync, threads)
        low, high = _share(down.shape[1], 8, thread, threads)
        _matmul(count, gated, down[layer], down_scale[layer], nothing, x, low, high, True)
        _meet(sync, threads)
    rows = (wanted.shape[0] + BLOCK - 1) // BLOCK * BLOCK
    for r in range(wanted.shape[0]):
        _normalise(x[wanted[r]], final_norm, eps, h[r])
    low, high = _share(head.shape[0], 8, thread, threads)
    _matmul(wanted.shape[0], h[:rows], head, head_scale, nothing, logits, low, high, False)
    _meet(sync, threads)
