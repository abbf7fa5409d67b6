"""Attention of a decoded token: projections that turn and write into the K/V cache, and the look back over it.

Rows of a pass are b * T + t: sequence b, its t-th token. ``slot`` (M,) is where in the cache a row's key goes, -1 for a
row without a token; ``place`` (M,) its rotary position; ``pad`` (B,) how many slots at the start of a sequence hold
none. Where the cache lies, and how long it is, is read from ``where`` on the device: it may grow without the programs
that read it being made again.

    where = (address of the K/V buffer (layers, 2, B, Hkv, capacity, D), capacity, address of cos, address of sin)

``cos`` and ``sin`` are (positions, D / 2), as the stock model makes them.
"""

import triton
import triton.language as tl

from dynamax_llm.engines.cuda.kernels.product import ahead, product, wait_for_inputs


@triton.jit
def _surroundings(slot, place, where, m, M, i, valid, half: tl.constexpr, like):
    """Where a pass's rows go and how they turn: slots (BM,), cos and sin (BN, BM), and the cache's own place."""
    kind = like.dtype.element_ty
    slots = tl.load(slot + m, mask=m < M, other=-1)
    places = tl.load(place + m, mask=m < M, other=0)
    cos = tl.load(where + 2).to(tl.pointer_type(kind))
    sin = tl.load(where + 3).to(tl.pointer_type(kind))
    at = places[None, :] * half + i[:, None]
    known = valid[:, None] & (m < M)[None, :]
    c = tl.load(cos + at, mask=known, other=0.0).to(tl.float32)
    s = tl.load(sin + at, mask=known, other=0.0).to(tl.float32)
    return slots, c, s, tl.load(where).to(tl.pointer_type(kind)), tl.load(where + 1)


@triton.jit
def _halves(tile, tile2, w, first, i, valid, h, m, M, norm, sums, half: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
            BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, PARTS: tl.constexpr, BP: tl.constexpr,
            EPS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Products (BN, BM) of the rows i, and i + half, of the head whose rows begin at ``first``."""
    if BM == 1:
        row = first + tl.minimum(i, half - 1)
        low, high = product(tile, tile2, w, row, valid, w, row + half, h, m, M, norm, sums, K, BM, BN, BK, True, NORM,
                            1, PARTS, BP, EPS, STAGES)  # fmt: skip
    else:
        # Tensor cores like one tall block better than two flat ones.
        r = tl.arange(0, 2 * BN)
        of_i = tl.min(i, 0) + r % BN
        row = first + tl.minimum(of_i, half - 1) + r // BN * half
        both, _ = product(tile, tile2, w, row, of_i < half, w, row, h, m, M, norm, sums, K, BM, 2 * BN, BK, False, NORM,
                          1, PARTS, BP, EPS, STAGES)  # fmt: skip
        low, high = tl.split(tl.permute(tl.reshape(both, [2, BN, BM]), [1, 2, 0]))
    return low, high


@triton.jit
def _into_cache(low, high, base, capacity, layer, value, head, slots, m, T, B, i, known, HKV: tl.constexpr,
                D: tl.constexpr):  # fmt: skip
    """Write the halves (BN, BM) of a head's rows into the cache."""
    kind = base.dtype.element_ty
    line = (((layer * 2 + value) * B + m // T) * HKV + head).to(tl.int64) * capacity + slots
    target = base + line[None, :] * D + i[:, None]
    fits = known & (slots >= 0)[None, :]
    tl.store(target, low.to(kind), mask=fits)
    tl.store(target + D // 2, high.to(kind), mask=fits)


@triton.jit
def qkv_kernel(h, wq, wk, wv, bq, bk, bv, norm, sums, slot, place, q, where, layer, M, T, B, HQ: tl.constexpr,
               HKV: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
               BK: tl.constexpr, NORM: tl.constexpr, PARTS: tl.constexpr, BP: tl.constexpr, EPS: tl.constexpr,
               BIAS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Queries (M, HQ, D) to ``q``, keys and values into layer ``layer`` of the cache, from h (M, K) normed (NORM and
    ``sums``: see ``product``) and turned.

    A program owns BN dimensions i of one head, and i + D / 2, which rotary positions turn together.
    """
    half: tl.constexpr = D // 2
    parts: tl.constexpr = (half + BN - 1) // BN
    head = tl.program_id(0) // parts
    i = (tl.program_id(0) % parts) * BN + tl.arange(0, BN)
    valid = i < half
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    w, bias, own = wq, bq, head
    to_cache = head >= HQ
    value = head >= HQ + HKV
    if to_cache:
        w, bias, own = wk, bk, head - HQ
    if value:
        w, bias, own = wv, bv, head - HQ - HKV
    row = own * D + tl.minimum(i, half - 1)
    tile, tile2 = ahead(w, row, valid, w, row + half, K, BM, BK, True)
    wait_for_inputs(PDL)
    slots, c, s, base, capacity = _surroundings(slot, place, where, m, M, i, valid, half, q)
    low, high = _halves(tile, tile2, w, own * D, i, valid, h, m, M, norm, sums, half, K, BM, BN, BK, NORM, PARTS, BP,
                        EPS, STAGES)  # fmt: skip
    if BIAS:
        low += tl.load(bias + row).to(tl.float32)[:, None]
        high += tl.load(bias + row + half).to(tl.float32)[:, None]
    known = valid[:, None] & (m < M)[None, :]
    if not value:
        low, high = low * c - high * s, high * c + low * s
    if to_cache:
        _into_cache(low, high, base, capacity, layer, value.to(tl.int32), own, slots, m, T, B, i, known, HKV, D)
    else:
        target = q + (m[None, :] * HQ + own) * D + i[:, None]
        tl.store(target, low.to(q.dtype.element_ty), mask=known)
        tl.store(target + half, high.to(q.dtype.element_ty), mask=known)


@triton.jit
def kv_kernel(x, sums, table, slot, place, where, first, M, T, B, HKV: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EPS: tl.constexpr, BIAS: tl.constexpr,
              STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Keys and values of many layers, all reading the same h: one pass over all their weights.

    x (layers, M, K) is h ready for each layer's norm, with ``sums`` (M, 1). ``table`` (layers, 5) holds the addresses
    of k_proj, v_proj, their biases and the norm; grid axis 2 counts layers from ``first``.
    """
    kind = x.dtype.element_ty
    x += tl.program_id(2).to(tl.int64) * M * K
    layer = first + tl.program_id(2)
    half: tl.constexpr = D // 2
    parts: tl.constexpr = (half + BN - 1) // BN
    head = tl.program_id(0) // parts
    value = head // HKV
    own = head % HKV
    i = (tl.program_id(0) % parts) * BN + tl.arange(0, BN)
    valid = i < half
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    line = table + layer * 5
    w = tl.multiple_of(tl.load(line + value).to(tl.pointer_type(kind)), 16)
    row = own * D + tl.minimum(i, half - 1)
    tile, tile2 = ahead(w, row, valid, w, row + half, K, BM, BK, True)
    wait_for_inputs(PDL)
    slots, c, s, base, capacity = _surroundings(slot, place, where, m, M, i, valid, half, x)
    low, high = _halves(tile, tile2, w, own * D, i, valid, x, m, M, sums, sums, half, K, BM, BN, BK, "ready", 1, 1, EPS,
                        STAGES)  # fmt: skip
    if BIAS:
        bias = tl.load(line + 2 + value).to(tl.pointer_type(kind))
        low += tl.load(bias + row).to(tl.float32)[:, None]
        high += tl.load(bias + row + half).to(tl.float32)[:, None]
    known = valid[:, None] & (m < M)[None, :]
    if value == 0:
        low, high = low * c - high * s, high * c + low * s
    _into_cache(low, high, base, capacity, layer, value, own, slots, m, T, B, i, known, HKV, D)


@triton.jit
def _merge(scratch, line, used, m, d, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """The ``used`` partial results of one head group, joined: (BM, BD)."""
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, BD], tl.float32)
    for split in range(used):
        at = scratch + (line + split) * BM * (D + 2) + m * (D + 2)
        best = tl.load(at + D, cache_modifier=".cg")
        weight = tl.load(at + D + 1, cache_modifier=".cg")
        part = tl.load(at[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0, cache_modifier=".cg")
        new = tl.maximum(top, best)
        safe = tl.where(new == float("-inf"), 0.0, new)
        old_scale = tl.exp(top - safe)
        scale = tl.exp(best - safe)
        out = out * old_scale[:, None] + part * scale[:, None]
        total = total * old_scale + weight * scale
        top = new
    return out / tl.maximum(total, 1e-30)[:, None]


@triton.jit
def _share(acc, top, total, out, target, real, scratch, counter, split, used, m, d, BM: tl.constexpr, D: tl.constexpr,
           BD: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """Leave this program's part in ``scratch``; the program that finishes last joins all and stores them."""
    group = tl.program_id(0)
    at = scratch + (group * SPLITS + split) * BM * (D + 2) + m * (D + 2)
    tl.store(at[:, None] + d[None, :], acc, mask=(d < D)[None, :])
    tl.store(at + D, top)
    tl.store(at + D + 1, total)
    tl.debug_barrier()
    if tl.atomic_add(counter + group, 1) == used - 1:
        merged = _merge(scratch, group * SPLITS, used, m, d, BM, D, BD)
        tl.store(target, merged.to(out.dtype.element_ty), mask=real)
        tl.store(counter + group, 0)


@triton.jit
def attend_kernel(q, where, slot, pad, out, scratch, counter, layer, T, B, SCALE, WINDOW, HQ: tl.constexpr,
                  HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
                  SPLITS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out (M, HQ, D): attention of q over the slots from ``pad`` to each row's own, the last WINDOW of them if > 0.

    Programs share a sequence's slots; the one that finishes last joins what they found. (Split attention for decoding
    is the idea of Flash-Decoding.) Work grows with the slots in use, not with the cache's capacity.
    """
    kind = q.dtype.element_ty
    G: tl.constexpr = HQ // HKV
    b, own, split = tl.program_id(0) // HKV, tl.program_id(0) % HKV, tl.program_id(1)
    m, d = tl.arange(0, BM), tl.arange(0, BD)  # m = t * G + g
    t = m // G
    # Slots were written before the projections began, so they need not be waited for.
    slots = tl.load(slot + b * T + t, mask=t < T, other=-1)
    least = tl.load(pad + b)
    base = tl.multiple_of(tl.load(where).to(tl.pointer_type(kind)), 16)
    capacity = tl.load(where + 1)
    end = tl.max(slots) + 1
    begin = least
    if WINDOW > 0:
        earliest = tl.min(tl.where(slots >= 0, slots, 2147483647))
        begin = tl.maximum(least, earliest - WINDOW + 1)
    begin = begin // BS * BS
    blocks = tl.maximum((end - begin + BS - 1) // BS, 1)
    each = (blocks + SPLITS - 1) // SPLITS
    used = (blocks + each - 1) // each
    wait_for_inputs(PDL)
    if split < used:
        head = own * G + m % G
        real = (t < T)[:, None] & (d < D)[None, :]
        query = tl.load(q + ((b * T + t) * HQ + head)[:, None] * D + d[None, :], mask=real, other=0.0)
        keys = base + (((layer * 2) * B + b) * HKV + own).to(tl.int64) * capacity * D
        values = base + (((layer * 2 + 1) * B + b) * HKV + own).to(tl.int64) * capacity * D
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BD], tl.float32)
        stop = tl.minimum(blocks, (split + 1) * each)
        for block in range(split * each, stop):
            s = begin + block * BS + tl.arange(0, BS)
            inside = (s < end)[:, None] & (d < D)[None, :]
            key = tl.load(keys + s[:, None] * D + d[None, :], mask=inside, other=0.0)
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * SCALE
            seen = (s >= least)[None, :] & (s[None, :] <= slots[:, None])
            if WINDOW > 0:
                seen = seen & (s[None, :] > slots[:, None] - WINDOW)
            score = tl.where(seen, score, float("-inf"))
            new = tl.maximum(top, tl.max(score, 1))
            safe = tl.where(new == float("-inf"), 0.0, new)
            weight = tl.exp(score - safe[:, None])
            fade = tl.exp(top - safe)
            value = tl.load(values + s[:, None] * D + d[None, :], mask=inside, other=0.0)
            acc = acc * fade[:, None] + tl.dot(weight.to(kind), value, input_precision="ieee")
            total = total * fade + tl.sum(weight, 1)
            top = new
        target = out + ((b * T + t) * HQ + head)[:, None] * D + d[None, :]
        if used == 1:
            tl.store(target, (acc / tl.maximum(total, 1e-30)[:, None]).to(kind), mask=real)
        else:
            _share(acc, top, total, out, target, real, scratch, counter, split, used, m, d, BM, D, BD, SPLITS)
