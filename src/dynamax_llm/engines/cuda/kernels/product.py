"""Rows of a weight matrix times a few vectors, near memory bandwidth: what decoding spends its time on.

One program owns a block of the matrix's rows and walks along all columns. With one vector it multiplies and adds in
registers, with more it uses tensor cores; either way every weight is read once. Norms ride along for free: a norm of
the input is linear up to one factor per vector, so weights meet the unnormed input (times the norm's weight) and the
factor, summed up on the way, is applied to the result.

A program asks for its first weights before it waits for the kernel before it (programmatic dependent launch), so that
memory is never idle between kernels.

Shapes: M vectors of K inputs (rows of ``x``), N outputs.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda as gpu


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """What earlier kernels wrote may be read after this; the next kernel may start to load its weights."""
    if PDL:
        gpu.gdc_wait()
        gpu.gdc_launch_dependents()


@triton.jit
def _weights(w, rows, valid, start, K: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr):
    """w[rows, start : start + BK]; each is used once, so it need not stay in any cache."""
    at = start + tl.arange(0, BK)
    where = w + rows.to(tl.int64)[:, None] * K + at[None, :]
    if EVEN:
        return tl.load(where, eviction_policy="evict_first")
    return tl.load(where, mask=valid[:, None] & (at < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def group_factors(groups, m, M, K: tl.constexpr, BM: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr,
                  EPS: tl.constexpr):  # fmt: skip
    """Factors (BM, groups) of a norm over groups of SIZE inputs, from sums of squares (M, K / SIZE * PARTS)."""
    COUNT: tl.constexpr = K // SIZE
    at = tl.arange(0, COUNT)[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    found = tl.load(groups + m[:, None, None] * (COUNT * PARTS) + at[None], mask=(m < M)[:, None, None], other=0.0)
    return tl.rsqrt(tl.sum(found, 2) / SIZE + EPS)


@triton.jit
def inputs(x, m, M, norm, factors, start, K: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, SIZE: tl.constexpr):
    """x[m, start : start + BK] (BM, BK) in float32, weighted by the norm; and the sum of squares (BM,).

    NORM "whole": RMSNorm over all K; the sum is for the caller. NORM "groups": over groups of SIZE, whose ``factors``
    are applied here.
    """
    at = start + tl.arange(0, BK)
    known = (m < M)[:, None] & (at < K)[None, :]
    found = tl.load(x + m[:, None] * K + at[None, :], mask=known, other=0.0).to(tl.float32)
    squares = tl.sum(found * found, 1)
    if NORM != "none":
        found *= tl.load(norm + at, mask=at < K, other=0.0).to(tl.float32)[None, :]
    if NORM == "groups":
        mine = tl.arange(0, K // SIZE) == start // SIZE
        found *= tl.sum(tl.where(mine[None, :], factors, 0.0), 1)[:, None]
    return found, squares


@triton.jit
def ahead(w, rows, valid, w2, rows2, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TWO: tl.constexpr):
    """The first weights that ``product`` will want, asked for before the kernel before has ended."""
    tile = 0.0
    tile2 = 0.0
    if BM == 1:
        tile = _weights(w, rows, valid, 0, K, BK, K % BK == 0)
        tile2 = tile
        if TWO:
            tile2 = _weights(w2, rows2, valid, 0, K, BK, K % BK == 0)
    return tile, tile2


@triton.jit
def product(tile, tile2, w, rows, valid, w2, rows2, x, m, M, norm, factors, K: tl.constexpr, BM: tl.constexpr,
            BN: tl.constexpr, BK: tl.constexpr, TWO: tl.constexpr, NORM: tl.constexpr, SIZE: tl.constexpr,
            EPS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """(BN, BM) products of ``rows`` of w, and with TWO of ``rows2`` of w2, with the vectors m of x, normed.

    ``tile`` and ``tile2`` come from ``ahead``.
    """
    EVEN: tl.constexpr = K % BK == 0
    squares = tl.zeros([BM], tl.float32)
    if BM == 1:
        acc = tl.zeros([BN, BK], tl.float32)
        acc2 = tl.zeros([BN, BK], tl.float32)
        for start in tl.static_range(0, K, BK):
            now, now2 = tile, tile2
            if start + BK < K:
                tile = _weights(w, rows, valid, start + BK, K, BK, EVEN)
                if TWO:
                    tile2 = _weights(w2, rows2, valid, start + BK, K, BK, EVEN)
            found, part = inputs(x, m, M, norm, factors, start, K, BK, NORM, SIZE)
            squares += part
            acc += now.to(tl.float32) * found
            if TWO:
                acc2 += now2.to(tl.float32) * found
        out = tl.sum(acc, 1)[:, None]
        out2 = tl.sum(acc2, 1)[:, None]
    else:
        out = tl.zeros([BN, BM], tl.float32)
        out2 = tl.zeros([BN, BM], tl.float32)
        for start in tl.range(0, K, BK, num_stages=STAGES):
            block = _weights(w, rows, valid, start, K, BK, EVEN)
            found, part = inputs(x, m, M, norm, factors, start, K, BK, NORM, SIZE)
            squares += part
            vectors = tl.trans(found.to(block.dtype))
            out = tl.dot(block, vectors, out, input_precision="ieee")
            if TWO:
                block2 = _weights(w2, rows2, valid, start, K, BK, EVEN)
                out2 = tl.dot(block2, vectors, out2, input_precision="ieee")
    if NORM == "whole":
        factor = tl.rsqrt(squares / K + EPS)[None, :]
        out *= factor
        out2 *= factor
    return out, out2


@triton.jit
def linear_kernel(x, w, w2, bias, norm, groups, live, out, M, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr,
                  EPS: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, STAGES: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """out (M, N) = norm(x) wᵀ; GATED: silu(norm(x) wᵀ) * norm(x) w2ᵀ; ADD: added to ``out`` where ``live`` (M,)."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    valid = rows < N
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    row = tl.minimum(rows, N - 1)
    tile, tile2 = ahead(w, row, valid, w2, row, K, BM, BK, GATED)
    wait_for_inputs(PDL)
    factors = 0.0
    if NORM == "groups":
        factors = group_factors(groups, m, M, K, BM, SIZE, PARTS, EPS)
    y, y2 = product(tile, tile2, w, row, valid, w2, row, x, m, M, norm, factors, K, BM, BN, BK, GATED, NORM, SIZE, EPS,
                    STAGES)  # fmt: skip
    if BIAS:
        y += tl.load(bias + row).to(tl.float32)[:, None]
    if GATED:
        y = y / (1.0 + tl.exp(-y)) * y2
    where = out + m[None, :] * N + rows[:, None]
    known = valid[:, None] & (m < M)[None, :]
    if ADD:
        known = known & (tl.load(live + m, mask=m < M, other=0) != 0)[None, :]
        y += tl.load(where, mask=known, other=0.0).to(tl.float32)
    tl.store(where, y.to(out.dtype.element_ty), mask=known)
