"""A whole pass of a Llama-type model on the CPU as one compiled function, run by every thread of a team at once.

A pass over a handful of tokens takes about as long as reading the weights. So each weight is read from memory once, as
it is stored, for all tokens of the pass (vector_kernels); everything else stays in the processor's caches, and threads
meet at a barrier that spins shortly before it sleeps.

Batch-invariant: what is computed for a token is the same sequence of operations whatever else is in the pass (He et al.
2025, "Defeating Nondeterminism in LLM Inference"). A dot product is summed in one order for one token as for many, and
attention goes over the visible slots in the order of the text, wherever they lie and whichever tokens see them as well.
So the logits of a token verified in a tree are, bit for bit, those of a pass over this token alone, in every form of
weights.

Compiled by Numba for the processor at hand and cached on disk.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray

from specsplit.engines.kernel_cache import kernel
from specsplit.engines.numba_intrinsics import call, fetch_add, float_of, futex, load, pointer

# Columns of a table of linear layers: the address of the function of their form (vector_kernels.product), that of the
# weights and the bytes of a row of them, outputs, and addresses of scales and biases with the bytes between two.
FUNCTION, WEIGHT, ROW_BYTES, ROWS, SCALE, SCALE_STEP, BIAS, BIAS_STEP = range(8)
Q, K, V, OUTPUT, GATE, UP, DOWN = range(7)  # of a layer, in the order in which they are used
PAD = 32  # inputs of a product are padded with zeros to a multiple of this
LANES = 8  # of a vector
SLOTS = 128  # whose values stay in the cache while all queries of a tile go over them
SPINS = 20000  # looks at the barrier before the thread sleeps: some 20 microseconds
# Of the array `sync` of a team, int64: a cache line that threads write when they arrive, and one that they look at.
ARRIVED, SLEEPING, SECONDS, NANOSECONDS = 0, 1, 2, 3  # the longest sleep at a meeting is that long
MEETINGS, FAILED, STARTS, LEAVING = 8, 9, 10, 11
# What a pass is over, int64: these numbers; a row of PART_NUMBERS for each part, a session's tokens that are adjacent
# in the pass; the ids of all tokens; and for each part the parents of its tree's nodes, from its PARENTS on.
# TOGETHER: queries of a tile; KEPT: places of `kept` that are used; the pass itself fills in how many TILES there are,
# and how many OUTPUTS, rows of logits.
PARTS, TOKENS, TOGETHER, KEPT, TILES, OUTPUTS, HEADER = range(7)
# START, STOP: which of its pass's tokens a part has; CONTEXT of them are text, the rest are nodes from CACHED on. HELD:
# tokens in its cache before the pass. WANTED: the first whose logits are wanted; BEST: how many best tokens of these,
# among the first ALLOWED. KEYS, VALUES, CAPACITY: of its cache.
START, STOP, CONTEXT, CACHED, HELD, WANTED, BEST, ALLOWED, KEYS, VALUES, CAPACITY, PARENTS, PART_NUMBERS = range(13)
# Of every token: its position, where its cache is, its slot in it; its visible slots are slots[FIRST:next FIRST], of
# which the first RUN are adjacent.
POSITION, KEY, VALUE, ROOM, OWN, FIRST, RUN, TOKEN_NUMBERS = range(8)
ROW, MOST, AMONG = range(3)  # of every row of logits: whose they are, how many best tokens, among the first how many
FUTEX_WAIT, FUTEX_WAKE = 128, 129  # private to the process
# Sums may be taken in vectors and products fused; infinities and NaN keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}


# ---- steps of a pass


@kernel()
def _meet(sync: np.ndarray, threads: int) -> None:
    """Wait until all threads are here, or one of them failed: a short while at the core, as they come within
    microseconds, then asleep, so that whoever keeps them away gets the core."""
    if threads == 1:
        return
    meeting = load(sync, MEETINGS)
    place = sync.ctypes.data + 8 * MEETINGS  # the futex is the lower half of the number
    if fetch_add(sync, ARRIVED, 1) == threads - 1:
        sync[ARRIVED] = 0
        fetch_add(sync, MEETINGS, 1)
        if load(sync, SLEEPING) > 0:
            futex(place, FUTEX_WAKE, threads, 0)
        return
    spins = 0
    while load(sync, MEETINGS) == meeting and load(sync, FAILED) == 0:
        spins += 1
        if spins > SPINS:
            fetch_add(sync, SLEEPING, 1)
            # The kernel looks at the number again, so nobody sleeps through a meeting that began just now.
            futex(place, FUTEX_WAIT, meeting & 0xFFFFFFFF, sync.ctypes.data + 8 * SECONDS)
            fetch_add(sync, SLEEPING, -1)


@kernel()
def start_others(sync: np.ndarray, threads: int) -> None:
    """Have the threads that `follow_passes` go on."""
    fetch_add(sync, STARTS, 1)
    futex(sync.ctypes.data + 8 * STARTS, FUTEX_WAKE, threads, 0)


@kernel()
def await_start(sync: np.ndarray, starts: int) -> bool:
    """Wait for `start_others` after it was called so often; false when the thread is to leave instead."""
    spins = 0
    while load(sync, STARTS) == starts and load(sync, LEAVING) == 0:
        spins += 1
        if spins > SPINS:
            futex(sync.ctypes.data + 8 * STARTS, FUTEX_WAIT, starts & 0xFFFFFFFF, 0)
    return load(sync, LEAVING) == 0


@kernel()
def _share(count: int, multiple: int, thread: int, threads: int) -> tuple[int, int]:
    """Which of `count` rows a thread does: about as many as the others, from a multiple of `multiple` on."""
    each = (count + threads * multiple - 1) // (threads * multiple) * multiple
    return min(count, thread * each), min(count, (thread + 1) * each)


@kernel()
def _padded(inputs: int) -> int:
    """Inputs of a product as they are packed."""
    return (inputs + PAD - 1) // PAD * PAD


@kernel()
def _apply(linear, following, x, tokens, inputs, y, stride, add, thread, threads):
    """A thread's share of y = x weight^T, or += for the residual stream. x: packed tokens; y: of the results
    of the first token, stride: bytes to those of the next. linear: as `run_pass` has it, following: the one after."""
    low, high = _share(linear[ROWS], 8, thread, threads)
    next_low, _ = _share(following[ROWS], 8, thread, threads)
    if low == high:
        return
    term, term_row, term_token = linear[BIAS], linear[BIAS_STEP], 0
    if add:
        term, term_row, term_token = y, 4, stride
    call(
        linear[FUNCTION],
        (
            x.ctypes.data, tokens, inputs, linear[WEIGHT], linear[ROW_BYTES], low, high,
            following[WEIGHT] + next_low * following[ROW_BYTES],
            linear[SCALE], linear[SCALE_STEP], term, term_row, term_token, y, stride,
        ),
    )  # fmt: skip


@kernel(fastmath=FAST)
def normalise(x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray) -> None:
    """Root mean square norm of one token (Zhang, Sennrich 2019)."""
    total = np.float32(0)
    for k in range(x.shape[0]):
        total += x[k] * x[k]
    scale = np.float32(1) / np.sqrt(total / np.float32(x.shape[0]) + np.float32(eps))
    for k in range(x.shape[0]):
        out[k] = x[k] * scale * weight[k]


@kernel(fastmath=FAST)
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
        value = p * float_of(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))
        values[j] = value
        total += value
    return total


@kernel(fastmath=FAST)
def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> None:
    """Rotary position embedding of one head (Su et al. 2021), halves paired as in Llama's published weights."""
    half = cos.shape[0]
    for k in range(half):
        a, b = x[k], x[k + half]
        x[k] = a * cos[k] - b * sin[k]
        x[k + half] = b * cos[k] + a * sin[k]


@kernel(fastmath=FAST)
def _attend(accumulate, count, dim, key, value, begins, runs, ends, slots, queries, scores, out):
    """Attention of `count` queries over one head of keys and values, at these addresses.

    Query i sees slots[begins[i]:ends[i]], in the order of the text; the first runs[i] of them are adjacent. queries:
    [.., dim], out: [.., dim rounded up to vectors], scores: [.., at least as many as slots]. What is computed for a
    query is one sequence of operations, whatever the other queries: a score is summed over `dim` in order, the result
    over the slots in order.
    """
    width, value_bytes = scores.shape[1], 4 * out.shape[1]
    low, high = slots[begins[0]], slots[ends[0] - 1] + 1
    shared, shared_end = low, low + runs[0]  # adjacent slots that all queries see
    for i in range(1, count):
        start = slots[begins[i]]
        low, high = min(low, start), max(high, slots[ends[i] - 1] + 1)
        shared, shared_end = max(shared, start), min(shared_end, start + runs[i])
    low = low // LANES * LANES
    blocks = (high - low + LANES - 1) // LANES
    scores[:count, : blocks * LANES] = 0
    out[:count] = 0
    call(
        accumulate,
        (count, blocks, dim, key + 4 * dim * low, 4 * LANES, 4 * LANES * dim,
         queries.ctypes.data, 4 * dim, scores.ctypes.data, 4 * width),
    )  # fmt: skip
    for i in range(count):
        at, seen = slots[begins[i]] - low, ends[i] - begins[i]
        for j in range(runs[i], seen):  # those apart move up to the others
            scores[i, at + j] = scores[i, slots[begins[i] + j] - low]
        own = scores[i, at : at + seen]
        largest = np.float32(-math.inf)
        for j in range(seen):
            largest = max(largest, own[j])
        queries[i, 0] = np.float32(1) / _exp(own, seen, largest)  # the query is not needed any more
    vectors = out.shape[1] // LANES
    for i in range(count):
        start, stop = slots[begins[i]], slots[begins[i]] + runs[i]
        stop = min(stop, shared) if shared < shared_end else stop
        call(
            accumulate,
            (1, vectors, stop - start, value + value_bytes * start, value_bytes, 4 * LANES,
             scores.ctypes.data + 4 * (i * width + start - low), 0, out.ctypes.data + i * value_bytes, 0),
        )  # fmt: skip
    for start in range(shared, shared_end, SLOTS):
        call(
            accumulate,
            (count, vectors, min(SLOTS, shared_end - start), value + value_bytes * start, value_bytes, 4 * LANES,
             scores.ctypes.data + 4 * (start - low), 4 * width, out.ctypes.data, value_bytes),
        )  # fmt: skip
    for i in range(count):
        start, stop = slots[begins[i]], slots[begins[i]] + runs[i]
        if shared < shared_end:
            call(
                accumulate,
                (1, vectors, stop - shared_end, value + value_bytes * shared_end, value_bytes, 4 * LANES,
                 scores.ctypes.data + 4 * (i * width + shared_end - low), 0, out.ctypes.data + i * value_bytes, 0),
            )  # fmt: skip
        for j in range(runs[i], ends[i] - begins[i]):
            call(
                accumulate,
                (1, vectors, 1, value + value_bytes * slots[begins[i] + j], 0, 4 * LANES,
                 scores.ctypes.data + 4 * (i * width + start - low + j), 0, out.ctypes.data + i * value_bytes, 0),
            )  # fmt: skip
        for k in range(out.shape[1]):
            out[i, k] *= queries[i, 0]


@kernel()
def _lay_out(request, group, token, tiles, slots, rows):
    """Fill in `token`, `slots`, `tiles` and `rows` of `run_pass`. group: queries that share a head of keys."""
    at, tile_count, row_count, slot = 0, 0, 0, 0
    for number in range(request[PARTS]):
        part = request[HEADER + number * PART_NUMBERS :]
        context = part[HELD] - part[CACHED] + part[CONTEXT]  # tokens before the nodes
        queries = (part[STOP] - part[START]) * group
        for start in range(0, queries, request[TOGETHER]):
            tiles[tile_count, 0], tiles[tile_count, 1] = at, start
            tiles[tile_count, 2] = min(request[TOGETHER], queries - start)
            tile_count += 1
        for i in range(part[START], part[STOP]):
            token[KEY, at], token[VALUE, at], token[ROOM, at] = part[KEYS], part[VALUES], part[CAPACITY]
            token[OWN, at], token[FIRST, at] = part[HELD] + i, slot
            adjacent, node = part[HELD] + i + 1, -1
            if i >= part[CONTEXT]:
                adjacent, node = context, i - part[CONTEXT] + part[CACHED]
            for j in range(adjacent):
                slots[slot + j] = j
            slot += adjacent
            token[RUN, at] = adjacent
            depth, above = 0, node
            while above >= 0:
                depth, above = depth + 1, request[part[PARENTS] + above]
            for j in range(depth - 1, -1, -1):  # the path to the node, root first
                slots[slot + j], node = context + node, request[part[PARENTS] + node]
            slot += depth
            token[POSITION, at] = adjacent + depth - 1
            if i >= part[WANTED]:
                rows[ROW, row_count], rows[MOST, row_count], rows[AMONG, row_count] = at, part[BEST], part[ALLOWED]
                row_count += 1
            at += 1
    token[FIRST, at] = slot
    request[TILES], request[OUTPUTS] = tile_count, row_count


@kernel()
def choose(row, most, tokens, values):
    """The `most` best tokens of a row of logits, best first, of equals the lowest first.

    values: their log-probabilities, of one token alone its logit; -inf where fewer are possible. The first is NaN when
    a logit is NaN or +inf. The row is used up.
    """
    tokens[:most], values[:most] = 0, -math.inf
    least = values[most - 1]
    for j in range(row.shape[0]):
        if row[j] <= least:
            continue
        if not row[j] < math.inf:
            values[0] = math.nan
            return
        place = most - 1
        while place > 0 and values[place - 1] < row[j]:
            tokens[place], values[place] = tokens[place - 1], values[place - 1]
            place -= 1
        tokens[place], values[place] = j, row[j]
        least = values[most - 1]
    if most > 1 and values[0] > -math.inf:
        largest = values[0]
        total = np.log(_exp(row, row.shape[0], largest))
        for i in range(most):
            values[i] = min(values[i] - largest - total, np.float32(0))


@kernel()
def _keep(places, norm, x, eps, thread, threads):
    """Copy a thread's share of the rows of x to these addresses, 0 = none; after this norm, unless it is empty."""
    low, high = _share(places.shape[0], 1, thread, threads)
    for t in range(low, high):
        if places[t] == 0:
            continue
        kept = carray(pointer(places[t]), (x.shape[1],), np.float32)
        if norm.shape[0] > 0:
            normalise(x[t], norm, eps, kept)
            continue
        for k in range(x.shape[1]):
            kept[k] = x[t, k]


@kernel()
def _embed(embedding, token, room, out):
    """The row of a token in the input embedding. room: for it and its padding."""
    function, rows, row_bytes, units = embedding
    call(function, (rows + token * row_bytes, units, room.ctypes.data))
    for k in range(out.shape[0]):
        out[k] = room[k]


@kernel()
def run_product(thread, threads, sync, linear, pack, x, packed, y):
    """y = x weight^T of one linear layer, a row for each of x, as `run_pass` computes it. packed: of each thread."""
    inputs = _padded(x.shape[1])
    for t in range(x.shape[0]):
        call(pack, (x[t].ctypes.data, x.shape[1], t, x.shape[0], inputs, packed.ctypes.data))
    stride = 4 * y.shape[1]
    _apply(linear, linear, packed, x.shape[0], inputs, y.ctypes.data, stride, False, thread, threads)
    _meet(sync, threads)


# ---- the pass


@kernel(fastmath=FAST)
def run_pass(
    thread, threads, sync,
    # the model: linear layers as tables [layers, 7, 8] and [8]; norms are float32, [.., 0] when there are none
    linears, head, attention_norm, mlp_norm, final_norm, q_norm, k_norm, cos, sin, windows, eps, kv_heads, head_dim,
    # of a head that reads hidden states, else empty: the norm of the states, and that of the output where it is part of
    # the next state; whether the residual stream begins after the norm of the states
    state_norm, output_norm, norm_before_residual,
    # the input embedding: address of the function of its form (vector_kernels.unpacking), of its rows, bytes of a row
    # and units in it; addresses of what else is compiled apart
    embedding, pack, activate, accumulate,
    # what the pass is over: see HEADER. kept [.., layers + 1, tokens]: addresses to which the input of a layer, or the
    # output of the last one, is copied; 0: none
    request, kept,
    # work space: `token` [TOKEN_NUMBERS, ..], `slots` and `rows` [3, ..] are laid out here, tiles [.., 3] as well:
    # queries that attend together: first token of the part, first of its queries of a head of keys (all of a token,
    # then those of the next), how many. The first index of all_packed, .. is that of the thread whose own it is.
    # joined [tokens, 2 * hidden], of a head: its first half gets the embeddings, and x holds the states; else empty
    token, slots, tiles, rows, x, joined, all_packed, all_row, projected, attended, gate, up, gated, all_queries,
    all_scores, all_out,
    # results: logits after the tokens that are wanted; their best tokens and values, as `choose` has them, of which
    # logits do not remain
    logits, best_tokens, best_values,
):  # fmt: skip
    """One pass.

    Keys of a cache: float32 [layers, kv_heads, capacity / 8, head_dim, 8]; values: [layers, kv_heads, capacity,
    head_dim rounded up to a multiple of 8].
    """
    if thread == 0:
        start_others(sync, threads)
    count = request[TOKENS]
    packed, queries, scores, out = all_packed[thread], all_queries[thread], all_scores[thread], all_out[thread]
    row = all_row[thread, : x.shape[1]]
    scale = np.float32(1) / np.sqrt(np.float32(head_dim))
    value_dim = out.shape[1]
    # Of the queries of a tile.
    begins = np.empty(queries.shape[0], np.int64)
    runs, ends = np.empty_like(begins), np.empty_like(begins)
    layers, hidden = linears.shape[0], x.shape[1]
    heads = attended.shape[1] // head_dim
    group = heads // kv_heads
    hidden_inputs, attended_inputs, gated_inputs = _padded(hidden), _padded(attended.shape[1]), gate.shape[1]
    is_head = joined.shape[1] > 0
    if thread == 0:
        _lay_out(request, group, token, tiles, slots, rows)
        ids = request[HEADER + request[PARTS] * PART_NUMBERS :]
        for t in range(count):
            _embed(embedding, ids[t], all_row[0], joined[t, :hidden] if is_head else x[t])
    _meet(sync, threads)
    tile_count, outputs, first, run = request[TILES], request[OUTPUTS], token[FIRST], token[RUN]
    # Of a token whose logits nobody wants, as most of a prompt, the last layer computes keys and values alone.
    narrows = outputs < count and request[KEPT] == 0
    if is_head:
        low, high = _share(count, 1, thread, threads)
        for t in range(low, high):
            normalise(joined[t, :hidden], attention_norm[0], eps, joined[t, :hidden])
            normalise(x[t], state_norm, eps, joined[t, hidden:])
            if norm_before_residual:
                for k in range(hidden):
                    x[t, k] = joined[t, hidden + k]
        _meet(sync, threads)
    for layer in range(layers):
        these = linears[layer]
        joins = is_head and layer == 0
        inputs = _padded(2 * hidden) if joins else hidden_inputs
        for places in range(request[KEPT]):
            _keep(kept[places, layer, :count], final_norm[:0], x, eps, thread, threads)
        for t in range(count):  # every thread for itself: cheaper than to meet
            if joins:
                call(pack, (joined[t].ctypes.data, 2 * hidden, t, count, inputs, packed.ctypes.data))
            else:
                normalise(x[t], attention_norm[layer], eps, row)
                call(pack, (row.ctypes.data, hidden, t, count, inputs, packed.ctypes.data))
        y, stride = projected.ctypes.data, 4 * projected.shape[1]
        for part in (Q, K, V):
            _apply(these[part], these[part + 1], packed, count, inputs, y, stride, False, thread, threads)
            y += 4 * these[part, ROWS]
        _meet(sync, threads)
        # Queries in place, keys and values into the caches.
        low, high = _share(count * (heads + 2 * kv_heads), 1, thread, threads)
        for item in range(low, high):
            t, part = item // (heads + 2 * kv_heads), item % (heads + 2 * kv_heads)
            vector = projected[t, part * head_dim : (part + 1) * head_dim]
            if part < heads + kv_heads:
                norm = q_norm[layer] if part < heads else k_norm[layer]
                if norm.shape[0] > 0:
                    normalise(vector, norm, eps, vector)
                _rotate(vector, cos[token[POSITION, t]], sin[token[POSITION, t]])
            if part >= heads:
                is_key = part < heads + kv_heads
                place = layer * kv_heads + part - heads - (0 if is_key else kv_heads)
                if is_key:
                    block, lane = token[OWN, t] // LANES, token[OWN, t] % LANES
                    address = token[KEY, t] + 4 * head_dim * (place * token[ROOM, t] + block * LANES)
                    block_of_keys = carray(pointer(address), (head_dim, LANES), np.float32)
                    for k in range(head_dim):
                        block_of_keys[k, lane] = vector[k]
                else:
                    address = token[VALUE, t] + 4 * value_dim * (place * token[ROOM, t] + token[OWN, t])
                    cached = carray(pointer(address), (head_dim,), np.float32)
                    for k in range(head_dim):
                        cached[k] = vector[k]
        _meet(sync, threads)
        if narrows and layer == layers - 1 and outputs == 0:
            break
        for item in range(thread, kv_heads * tile_count, threads):
            kv_head, tile = item // tile_count, tiles[item % tile_count]
            place = layer * kv_heads + kv_head
            for i in range(tile[2]):
                t, q_head = tile[0] + (tile[1] + i) // group, kv_head * group + (tile[1] + i) % group
                for k in range(head_dim):
                    queries[i, k] = projected[t, q_head * head_dim + k] * scale
                begin = first[t]
                if windows[layer] > 0:
                    begin = max(begin, first[t + 1] - windows[layer])
                begins[i], runs[i], ends[i] = begin, max(first[t] + run[t] - begin, 1), first[t + 1]
            t = tile[0]
            key = token[KEY, t] + 4 * head_dim * place * token[ROOM, t]
            value = token[VALUE, t] + 4 * value_dim * place * token[ROOM, t]
            _attend(accumulate, tile[2], head_dim, key, value, begins, runs, ends, slots, queries, scores, out)
            for i in range(tile[2]):
                t, q_head = tile[0] + (tile[1] + i) // group, kv_head * group + (tile[1] + i) % group
                for k in range(head_dim):
                    attended[t, q_head * head_dim + k] = out[i, k]
        _meet(sync, threads)
        if narrows and layer == layers - 1:
            if thread == 0:
                for r in range(outputs):  # rows ascend, so none is overwritten before it has moved
                    x[r] = x[rows[ROW, r]]
                    attended[r] = attended[rows[ROW, r]]
            count = outputs
            _meet(sync, threads)
        for t in range(count):
            call(pack, (attended[t].ctypes.data, attended.shape[1], t, count, attended_inputs, packed.ctypes.data))
        stride = 4 * hidden
        _apply(these[OUTPUT], these[GATE], packed, count, attended_inputs, x.ctypes.data, stride, True, thread, threads)
        _meet(sync, threads)
        for t in range(count):
            normalise(x[t], mlp_norm[layer], eps, row)
            call(pack, (row.ctypes.data, hidden, t, count, hidden_inputs, packed.ctypes.data))
        stride = 4 * gate.shape[1]
        _apply(these[GATE], these[UP], packed, count, hidden_inputs, gate.ctypes.data, stride, False, thread, threads)
        _apply(these[UP], these[DOWN], packed, count, hidden_inputs, up.ctypes.data, stride, False, thread, threads)
        low, high = _share(these[GATE, ROWS], 8, thread, threads)
        if low < high:
            if high == these[GATE, ROWS]:
                high = gated_inputs  # with the padding, which is zero
            for t in range(count):
                arguments = (gate[t].ctypes.data, up[t].ctypes.data, low, high, t, count, gated_inputs)
                call(activate, (*arguments, gated.ctypes.data))
        _meet(sync, threads)
        after = linears[layer + 1, Q] if layer + 1 < layers else head
        stride = 4 * hidden
        _apply(these[DOWN], after, gated, count, gated_inputs, x.ctypes.data, stride, True, thread, threads)
        _meet(sync, threads)
    for places in range(request[KEPT]):
        _keep(kept[places, layers, :count], output_norm, x, eps, thread, threads)
    for r in range(outputs):
        normalise(x[r if narrows else rows[ROW, r]], final_norm, eps, row)
        call(pack, (row.ctypes.data, hidden, r, outputs, hidden_inputs, packed.ctypes.data))
    if outputs > 0:
        y, stride, following = logits.ctypes.data, 4 * logits.shape[1], linears[0, Q]
        _apply(head, following, packed, outputs, hidden_inputs, y, stride, False, thread, threads)
    _meet(sync, threads)
    for r in range(thread, outputs, threads):
        if rows[MOST, r] > 0:
            choose(logits[r, : rows[AMONG, r]], rows[MOST, r], best_tokens[r], best_values[r])
    _meet(sync, threads)


@kernel()
def follow_passes(thread, threads, sync, *arguments):
    """Run, as one of the other threads, every pass that thread 0 begins with these arguments, until it is to leave."""
    starts = 0
    while await_start(sync, starts):
        run_pass(thread, threads, sync, *arguments)
        starts += 1
