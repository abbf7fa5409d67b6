"""Rows of a weight matrix times a few vectors, near memory bandwidth: what decoding spends its time on.

One program owns a block of the matrix's rows and walks along all columns. With one vector it multiplies and adds in
registers, with more it uses tensor cores; either way every weight is read once. Norms ride along: a norm of the
input is linear up to one factor per vector, so weights meet the input times the norm's weight, which the kernel before
has left ready, and the factor is applied to the result.

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
def inputs(x, m, M, norm, sums, start, K: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, SIZE: tl.constexpr,
           PARTS: tl.constexpr, EPS: tl.constexpr):  # fmt: skip
    """x[m, start : start + BK] (BM, BK), normed as far as that can be done here; and the sum of squares (BM,)."""
    at = start + tl.arange(0, BK)
    known = (m < M)[:, None] & (at < K)[None, :]
    found = tl.load(x + m[:, None] * K + at[None, :], mask=known, other=0.0)
    squares = tl.zeros([m.shape[0]], tl.float32)
    if NORM == "whole" or NORM == "groups":
        found = found.to(tl.float32)
        if NORM == "whole":
            squares = tl.sum(found * found, 1)
        found *= tl.load(norm + at, mask=at < K, other=0.0).to(tl.float32)[None, :]
    if NORM == "groups":
        part = (start // SIZE) * PARTS + tl.arange(0, PARTS)
        total = tl.load(sums + m[:, None] * (K // SIZE * PARTS) + part[None, :], mask=(m < M)[:, None], other=0.0)
        found *= tl.rsqrt(tl.sum(total, 1) / SIZE + EPS)[:, None]
    return found, squares


@triton.jit
def sum_of_squares(sums, m, M, PARTS: tl.constexpr, BP: tl.constexpr):
    """Of each vector m (BM,), from the ``PARTS`` sums that the kernel before left in ``sums`` (M, PARTS)."""
    at = tl.arange(0, BP)
    known = (m < M)[:, None] & (at < PARTS)[None, :]
    return tl.sum(tl.load(sums + m[:, None] * PARTS + at[None, :], mask=known, other=0.0), 1)


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
def product(tile, tile2, w, rows, valid, w2, rows2, x, m, M, norm, sums, K: tl.constexpr, BM: tl.constexpr,
            BN: tl.constexpr, BK: tl.constexpr, TWO: tl.constexpr, NORM: tl.constexpr, SIZE: tl.constexpr,
            PARTS: tl.constexpr, BP: tl.constexpr, EPS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """(BN, BM) products of ``rows`` of w, and with TWO of ``rows2`` of w2, with the vectors m of x.

    NORM says what x is: "none", taken as it is; "whole", RMSNorm is yet to be applied; "ready", the kernel before has
    weighted it by the norm and left sums of squares in ``sums`` (M, PARTS); "groups", RMSNorm over groups of SIZE, with
    PARTS sums of squares a group in ``sums``. ``tile`` and ``tile2`` come from ``ahead``.
    """
    EVEN: tl.constexpr = K % BK == 0
    squares = tl.zeros([BM], tl.float32)
    if NORM == "ready":
        squares = sum_of_squares(sums, m, M, PARTS, BP)
    if BM == 1:
        acc = tl.zeros([BN, BK], tl.float32)
        acc2 = tl.zeros([BN, BK], tl.float32)
        for start in tl.static_range(0, K, BK):
            now, now2 = tile, tile2
            if start + BK < K:
                tile = _weights(w, rows, valid, start + BK, K, BK, EVEN)
                if TWO:
                    tile2 = _weights(w2, rows2, valid, start + BK, K, BK, EVEN)
            found, part = inputs(x, m, M, norm, sums, start, K, BK, NORM, SIZE, PARTS, EPS)
            squares += part
            vector = found.to(tl.float32)
            acc += now.to(tl.float32) * vector
            if TWO:
                acc2 += now2.to(tl.float32) * vector
        out = tl.sum(acc, 1)[:, None]
        out2 = tl.sum(acc2, 1)[:, None]
    else:
        out = tl.zeros([BN, BM], tl.float32)
        out2 = tl.zeros([BN, BM], tl.float32)
        for start in tl.range(0, K, BK, num_stages=STAGES):
            block = _weights(w, rows, valid, start, K, BK, EVEN)
            found, part = inputs(x, m, M, norm, sums, start, K, BK, NORM, SIZE, PARTS, EPS)
            squares += part
            vectors = tl.trans(found.to(block.dtype))
            out = tl.dot(block, vectors, out, input_precision="ieee")
            if TWO:
                block2 = _weights(w2, rows2, valid, start, K, BK, EVEN)
                out2 = tl.dot(block2, vectors, out2, input_precision="ieee")
    if NORM == "whole" or NORM == "ready":
        factor = tl.rsqrt(squares / K + EPS)[None, :]
        out *= factor
        out2 *= factor
    return out, out2


@triton.jit
def linear_kernel(x, w, w2, bias, norm, sums, live, out, next_norm, next_x, next_sums, kept, M, N: tl.constexpr,
                  K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr,
                  SIZE: tl.constexpr, PARTS: tl.constexpr, BP: tl.constexpr, EPS: tl.constexpr, GATED: tl.constexpr,
                  BIAS: tl.constexpr, ADD: tl.constexpr, KEEP: tl.constexpr, STAGES: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """out (M, N) = norm(x) wᵀ; GATED: silu(norm(x) wᵀ) * norm(x) w2ᵀ.

    ADD: it is added to ``out`` where ``live`` (M,), and ``out`` made ready for the norm that comes next: weighted by
    ``next_norm`` (N,) in ``next_x`` (M, N), sums of squares, one a program, in ``next_sums`` (M, programs). KEEP:
    what ``out`` was before is left in ``kept`` (M, N).
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    valid = rows < N
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    row = tl.minimum(rows, N - 1)
    tile, tile2 = ahead(w, row, valid, w2, row, K, BM, BK, GATED)
    wait_for_inputs(PDL)
    where = out + m[None, :] * N + rows[:, None]
    known = valid[:, None] & (m < M)[None, :]
    if ADD:
        old = tl.load(where, mask=known, other=0.0).to(tl.float32)
        if KEEP:
            tl.store(kept + m[None, :] * N + rows[:, None], old.to(kept.dtype.element_ty), mask=known)
        added = tl.load(live + m, mask=m < M, other=0)
        weight = tl.load(next_norm + row, mask=valid, other=0.0).to(tl.float32)
    y, y2 = product(tile, tile2, w, row, valid, w2, row, x, m, M, norm, sums, K, BM, BN, BK, GATED, NORM, SIZE, PARTS,
                    BP, EPS, STAGES)  # fmt: skip
    if BIAS:
        y += tl.load(bias + row).to(tl.float32)[:, None]
    if GATED:
        y = y / (1.0 + tl.exp(-y)) * y2
    if ADD:
        y = tl.where((added != 0)[None, :], old + y, old).to(out.dtype.element_ty)
        tl.store(where, y, mask=known)
        y = tl.where(valid[:, None], y.to(tl.float32), 0.0)
        tl.store(next_x + m[None, :] * N + rows[:, None], (y * weight[:, None]).to(next_x.dtype.element_ty), mask=known)
        tl.store(next_sums + m * tl.num_programs(0) + tl.program_id(0), tl.sum(y * y, 0), mask=m < M)
    else:
        tl.store(where, y.to(out.dtype.element_ty), mask=known)


@triton.jit
def norm_groups_kernel(x, norm, sums, K: tl.constexpr, SIZE: tl.constexpr, BS: tl.constexpr, PARTS: tl.constexpr,
                       EPS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """RMSNorm of x (M, K) in place, over groups of SIZE; ``sums`` (M, K / SIZE * PARTS) are of their squares."""
    wait_for_inputs(PDL)
    m, group = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, BS)
    total = tl.sum(tl.load(sums + (m * (K // SIZE) + group) * PARTS + tl.arange(0, PARTS)))
    place = group * SIZE + at
    found = tl.load(x + m * K + place, mask=at < SIZE, other=0.0).to(tl.float32)
    found *= tl.load(norm + place, mask=at < SIZE, other=0.0).to(tl.float32) * tl.rsqrt(total / SIZE + EPS)
    tl.store(x + m * K + place, found.to(x.dtype.element_ty), mask=at < SIZE)


@triton.jit
def ready_kernel(h, table, out, sums, first, M, COLUMNS: tl.constexpr, COLUMN: tl.constexpr, K: tl.constexpr,
                 BK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """h (M, K) made ready for the norms of many layers: out (layers, M, K), and its sums of squares, sums (M, 1).

    A norm's address is in the column COLUMN of ``table`` (all layers, COLUMNS); grid axis 1 counts from ``first``.
    """
    wait_for_inputs(PDL)
    m, layer = tl.program_id(0), tl.program_id(1)
    kind = out.dtype.element_ty
    norm = tl.load(table + (first + layer) * COLUMNS + COLUMN).to(tl.pointer_type(kind))
    at = tl.arange(0, BK)
    found = tl.load(h + m * K + at, mask=at < K, other=0.0).to(tl.float32)
    weighted = found * tl.load(norm + at, mask=at < K, other=0.0).to(tl.float32)
    tl.store(out + (layer * M + m).to(tl.int64) * K + at, weighted.to(kind), mask=at < K)
    if layer == 0:
        tl.store(sums + m, tl.sum(found * found))
