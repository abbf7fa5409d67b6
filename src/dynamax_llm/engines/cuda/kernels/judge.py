"""An exit head on the hidden state, from h to who leaves, in one kernel."""

import triton
import triton.language as tl

from dynamax_llm.engines.cuda.kernels.product import wait_for_inputs
from dynamax_llm.engines.cuda.kernels.rows import NUMBERS


@triton.jit
def mlp_head_kernel(h, scale, embed, constant, up, up_bias, out, offset, thresholds, index, ticket, live, left,
                    exit_index, word, parts, counter, confidence, B, D: tl.constexpr, W: tl.constexpr,
                    BW: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr, BP: tl.constexpr,
                    BB: tl.constexpr, RIDE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Rows of h (B, D) whose MLP head is sure enough leave by exit ``index``; the host hears how many run on.

    The head reads h at unit root mean square times ``scale`` (D,), plus a shift that ``constant`` (W,), the shifted
    and biased embedding of nothing, already holds: embed (D, W), GELU layer up (W, 2 W), logit out (2 W,) + offset.
    PROGRAMS share the D inputs of a row; the last to finish a row decides it, the last row tells the host.
    ``parts`` (B, PROGRAMS, W + 1), ``counter`` (B + 1,).
    """
    b, part = tl.program_id(0), tl.program_id(1)
    k = part * BK + tl.arange(0, BK)
    j = tl.arange(0, BW)
    weights = tl.load(embed + k[:, None] * W + j[None, :], mask=(k < D)[:, None] & (j < W)[None, :], other=0.0)
    scales = tl.load(scale + k, mask=k < D, other=0.0)
    wait_for_inputs(PDL)
    x = tl.load(h + b * D + k, mask=k < D, other=0.0).to(tl.float32)
    own = tl.sum((x * scales)[:, None] * weights, 0)
    line = parts + (b * PROGRAMS + part) * (W + 1)
    tl.store(line + j, own, mask=j < W)
    tl.store(line + W, tl.sum(x * x))
    tl.debug_barrier()
    if tl.atomic_add(counter + b, 1) == PROGRAMS - 1:
        p = tl.arange(0, BP)
        lines = parts + (b * PROGRAMS + p) * (W + 1)
        every = tl.load(lines[:, None] + j[None, :], mask=(p < PROGRAMS)[:, None] & (j < W)[None, :], other=0.0,
                        cache_modifier=".cg")  # fmt: skip
        squares = tl.sum(tl.load(lines + W, mask=p < PROGRAMS, other=0.0, cache_modifier=".cg"))
        embedded = tl.sum(every, 0) * tl.rsqrt(tl.maximum(squares / D, 1e-24))
        embedded += tl.load(constant + j, mask=j < W, other=0.0)
        u = tl.arange(0, BU)
        inner = tl.load(up + j[:, None] * (2 * W) + u[None, :], mask=(j < W)[:, None] & (u < 2 * W)[None, :], other=0.0)
        found = tl.sum(embedded[:, None] * inner, 0) + tl.load(up_bias + u, mask=u < 2 * W, other=0.0)
        found = 0.5 * found * (1.0 + tl.erf(found * 0.7071067811865476))
        logit = tl.sum(found * tl.load(out + u, mask=u < 2 * W, other=0.0)) + tl.load(offset)
        sure = 1.0 / (1.0 + tl.exp(-logit))
        tl.store(confidence + b, sure)
        gone = tl.load(left + b)
        if (gone == 0) & (sure >= tl.load(thresholds + index)):
            tl.store(exit_index + b, index)
            tl.store(left + b, 1)
            if not RIDE:
                tl.store(live + b, 0)
        tl.store(counter + b, 0)
        tl.debug_barrier()
        if tl.atomic_add(counter + B, 1) == B - 1:
            rows = tl.arange(0, BB)
            still = tl.load(left + rows, mask=rows < B, other=1, cache_modifier=".cg") == 0
            tl.store(counter + B, 0)
            tl.store(word, (tl.load(ticket) & NUMBERS).to(tl.int64) * (1 << 40) + tl.sum(still.to(tl.int64)))
