"""Triton kernels of `attend` and `keep`. Importing this module needs Triton, which comes with torch for CUDA.

A layer's row of the table (see `table`) says where the run of tokens lies and where everything is kept, so that a
captured kernel serves every position, prompt and cache. Digests are those of `dinfer.kv.digests`, bit for bit. A
largest absolute value is found among bits without the sign: Inf has greater bits than any number, and NaN than Inf.
"""

import triton
import triton.language as tl

POSITION = tl.constexpr(0)
SLOT = tl.constexpr(1)
KV = tl.constexpr(2)
ROWS = tl.constexpr(3)
BLOCKS = tl.constexpr(4)
LARGEST = tl.constexpr(5)
VALID = tl.constexpr(6)

_STEP = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _mixed(words, places):
    mixed = words.to(tl.uint64, bitcast=True) + (places + 1).to(tl.uint64) * _STEP
    mixed = (mixed ^ (mixed >> 30)) * _FIRST
    mixed = (mixed ^ (mixed >> 27)) * _SECOND
    return (mixed ^ (mixed >> 31)).to(tl.int64, bitcast=True)


@triton.jit
def _largest_bits(words, BITS: tl.constexpr):
    """Of each 64-bit word, the largest of its numbers of so many bits, without their signs."""
    lanes = words.to(tl.uint64, bitcast=True)
    lowest: tl.constexpr = (1 << (BITS - 1)) - 1
    largest = lanes & lowest
    for lane in tl.static_range(1, 64 // BITS):
        largest = tl.maximum(largest, (lanes >> (lane * BITS)) & lowest)
    return largest.to(tl.int64, bitcast=True)


@triton.jit
def _as_float(bits, DTYPE: tl.constexpr):
    if tl.float32 == DTYPE:
        number = bits.to(tl.int32).to(tl.float32, bitcast=True)
    elif tl.bfloat16 == DTYPE:
        number = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        number = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return number


@triton.jit
def store(
    k, v, row, partial, k_head, k_token, v_head, v_token,
    HEADS: tl.constexpr, WORDS: tl.constexpr, HEADS_2: tl.constexpr, WORDS_2: tl.constexpr,
    BITS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program a token: copy its K and V to the cache; keep its rows' digests, and each side's largest value.
    Only the first VALID tokens are real.

    `k`, `v`: 64-bit words, with strides in words. `partial`, int64 [tokens, 2]: a token's part of the block's digests.
    """
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(row + VALID):
        return
    at = tl.load(row + POSITION) + token
    kv = tl.multiple_of(tl.load(row + KV).to(tl.pointer_type(tl.int64)), 16)
    rows, largest = tl.load(row + ROWS), tl.load(row + LARGEST)
    heads, words = tl.arange(0, HEADS_2), tl.arange(0, WORDS_2)
    there = (heads[:, None] < HEADS) & (words[None, :] < WORDS)
    for side in tl.static_range(2):
        if side == 0:
            source = k + heads[:, None] * k_head + token * k_token
        else:
            source = v + heads[:, None] * v_head + token * v_token
        data = tl.load(source + words[None, :], mask=there, other=0)
        place = (at * 2 + side) * HEADS + heads
        tl.store(kv + place[:, None] * WORDS + words[None, :], data, mask=there)
        if rows != 0:
            mixed = tl.where(there, _mixed(data, tl.broadcast_to(words[None, :], (HEADS_2, WORDS_2))), 0)
            digests = tl.sum(mixed, axis=1)
            tl.store(rows.to(tl.pointer_type(tl.int64)) + place, digests, mask=heads < HEADS)
            of_block = tl.where(heads < HEADS, _mixed(digests, token * HEADS + heads), 0)
            tl.store(partial + token * 2 + side, tl.sum(of_block, axis=0))
        if largest != 0:
            bits = tl.max(tl.max(_largest_bits(data, BITS), axis=1), axis=0)
            to = largest.to(tl.pointer_type(tl.float32)) + at * 3 + side
            tl.store(to, _as_float(bits, DTYPE))


@triton.jit
def attend(
    q, row, partial, out, parts, tops, sums, q_head, q_token, tokens, scale,
    WINDOW: tl.constexpr, CAP: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_2: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program for each tile of queries, KV head and split of the keys. Several queries share a KV head: a tile's
    rows are (token, query head of the group).

    Writes `out` [tokens, heads, DIM], or with several splits `parts` [SPLITS, tokens, heads, DIM] with the largest
    score `tops` (of base 2) and the sum of weights `sums`, each [SPLITS, tokens, heads]. `WINDOW`: how many of the last
    keys a query sees, 0 for all; `CAP`: of scores, 0 for none. Also adds up the block's digests (see `store`).
    """
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position, valid = tl.load(row + POSITION), tl.load(row + VALID)
    if (tile + kv_head + split == 0) and tl.load(row + ROWS) != 0:
        _sum_digests(row, partial, valid)
    # Tensors are aligned; without being told, Triton would read number by number.
    kv = tl.multiple_of(tl.load(row + KV).to(tl.pointer_type(DTYPE)), 16)
    rows = tile * QUERIES + tl.arange(0, QUERIES)
    token = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, DIM_2)
    here = token < tokens
    source = q + head[:, None] * q_head + token[:, None] * q_token + dims[None, :]
    queries = tl.load(source, mask=here[:, None] & (dims[None, :] < DIM), other=0.0)
    first = position + tile * QUERIES // GROUP
    stop = position + tl.minimum((tile * QUERIES + QUERIES - 1) // GROUP + 1, valid)
    start = first * 0
    if WINDOW > 0:
        start = tl.maximum(first - WINDOW + 1, 0) // KEYS * KEYS
    each = tl.cdiv(tl.cdiv(stop - start, KEYS), SPLITS) * KEYS
    low = start + split * each
    high = tl.minimum(low + each, stop)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    found = tl.zeros((QUERIES, DIM_2), tl.float32)
    of = position + token
    if WINDOW == 0 and DIM == DIM_2:  # what all queries of the tile see needs no masks, and is most
        seen_by_all = tl.maximum(low, low + (tl.minimum(high, first + 1) - low) // KEYS * KEYS)
        for at in range(low, seen_by_all, KEYS):
            at = tl.multiple_of(at, KEYS)
            here_k = kv + (at + tl.arange(0, KEYS)) * (2 * HEADS * DIM) + kv_head * DIM
            k = tl.load(here_k[None, :] + dims[:, None])
            scores = tl.dot(queries, k, input_precision="ieee") * scale
            if CAP > 0:
                scores = CAP * (2 / (1 + tl.exp(-2 * scores / CAP)) - 1)
            scores *= _LOG2_E
            new = tl.maximum(top, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new[:, None])
            before = tl.exp2(top - new)
            v = tl.load(here_k[:, None] + HEADS * DIM + dims[None, :])
            total = total * before + tl.sum(weights, axis=1)
            found = tl.dot(weights.to(DTYPE), v, found * before[:, None], input_precision="ieee")
            top = new
        low = seen_by_all
    for at in range(low, high, KEYS):
        keys = at + tl.arange(0, KEYS)
        last_k = kv + keys * (2 * HEADS * DIM) + kv_head * DIM
        known = keys < stop
        k = tl.load(last_k[None, :] + dims[:, None], mask=known[None, :] & (dims[:, None] < DIM), other=0.0)
        scores = tl.dot(queries, k, input_precision="ieee") * scale
        if CAP > 0:
            scores = CAP * (2 / (1 + tl.exp(-2 * scores / CAP)) - 1)
        seen = keys[None, :] <= of[:, None]
        if WINDOW > 0:
            seen = seen & (keys[None, :] > of[:, None] - WINDOW)
        scores = tl.where(seen & known[None, :], scores * _LOG2_E, float("-inf"))
        new = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - base[:, None])
        before = tl.exp2(top - base)
        v = tl.load(
            last_k[:, None] + HEADS * DIM + dims[None, :],
            mask=known[:, None] & (dims[None, :] < DIM), other=0.0,
        )  # fmt: skip
        total = total * before + tl.sum(weights, axis=1)
        found = tl.dot(weights.to(DTYPE), v, found * before[:, None], input_precision="ieee")
        top = new
    to = token * (HEADS * GROUP) + head
    if SPLITS == 1:
        result = (found / total[:, None]).to(DTYPE)
        tl.store(out + to[:, None] * DIM + dims[None, :], result, mask=here[:, None] & (dims[None, :] < DIM))
    else:
        to += split * tokens * (HEADS * GROUP)
        tl.store(parts + to[:, None] * DIM + dims[None, :], found, mask=here[:, None] & (dims[None, :] < DIM))
        tl.store(tops + to, top, mask=here)
        tl.store(sums + to, total, mask=here)


@triton.jit
def _sum_digests(row, partial, tokens):
    """The digests of the block, from the parts of its tokens."""
    k, v = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    for at in range(0, tokens, 128):
        token = at + tl.arange(0, 128)
        k += tl.sum(tl.load(partial + token * 2, mask=token < tokens, other=0), axis=0)
        v += tl.sum(tl.load(partial + token * 2 + 1, mask=token < tokens, other=0), axis=0)
    to = tl.load(row + BLOCKS).to(tl.pointer_type(tl.int64)) + tl.load(row + SLOT) * 2
    tl.store(to, k)
    tl.store(to + 1, v)


@triton.jit
def combine(
    parts, tops, sums, out, count,
    DIM: tl.constexpr, DIM_2: tl.constexpr, SPLITS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program a (token, head), of `count`: join the splits of `attend`, each weighted by its share."""
    at = tl.program_id(0).to(tl.int64)
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, DIM_2)
    top = tl.load(tops + splits * count + at)
    weights = tl.exp2(top - tl.max(top, axis=0))
    total = tl.sum(weights * tl.load(sums + splits * count + at), axis=0)
    found = tl.load(
        parts + (splits[:, None] * count + at) * DIM + dims[None, :], mask=dims[None, :] < DIM, other=0.0
    )
    result = tl.sum(weights[:, None] * found, axis=0) / total
    tl.store(out + at * DIM + dims, result.to(DTYPE), mask=dims < DIM)


@triton.jit
def keep(hidden, out, row, words, WORDS_2: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """One program a token: copy its hidden state, of so many 64-bit words, and keep its largest value."""
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(row + VALID):
        return
    largest = tl.load(row + LARGEST)
    bits = tl.full((), 0, tl.int64)
    for start in range(0, words, WORDS_2):
        at = start + tl.arange(0, WORDS_2)
        data = tl.load(hidden + token * words + at, mask=at < words, other=0)
        tl.store(out + token * words + at, data, mask=at < words)
        bits = tl.maximum(bits, tl.max(_largest_bits(data, BITS), axis=0))
    if largest != 0:
        to = largest.to(tl.pointer_type(tl.float32)) + (tl.load(row + POSITION) + token) * 3 + 2
        tl.store(to, _as_float(bits, DTYPE))


@triton.jit
def product(
    x, w, bias, out, count,
    WIDTH: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program for some rows of a matrix [count, WIDTH]: their products with a vector. Bound by reading the matrix,
    so all loads of a row are under way at once."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = rows < count
    total = tl.zeros((ROWS, STEP), tl.float32)
    for step in tl.static_range(STEPS):
        at = step * STEP + tl.arange(0, STEP)
        inside = at < WIDTH
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        source = w + rows[:, None] * WIDTH + at[None, :]
        data = tl.load(
            source, mask=there[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first"
        )
        total += data.to(tl.float32) * values[None, :]
    found = tl.sum(total, axis=1)
    if HAS_BIAS:
        found += tl.load(bias + rows, mask=there, other=0.0).to(tl.float32)
    tl.store(out + rows, found.to(DTYPE), mask=there)
