"""Small kernels about a pass's rows: tokens that enter, leave, are chosen, wait, and are taken up again.

What the host waits for is written straight into its memory, as one 64-bit word that carries the number of the token it
belongs to: no copy, no event, and no word can be mistaken for an older one.

    word = number of the token * 2**40 + exit index * 2**32 + token (or rows that still run)
"""

import triton
import triton.language as tl

from dynamax_llm.engines.cuda.kernels.product import wait_for_inputs



@triton.jit
def enter_kernel(ids, embedding, idle, pad, length, h, slot, place, live, left, exit_index, EXITS, D: tl.constexpr,
                 BD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One token per sequence enters: h (B, D) its embedding, slot its place in the caches; ``length`` (B,) grows.

    ``idle`` rows (B,) have left before they began: they are not live, so layers leave their h alone.
    """
    wait_for_inputs(PDL)
    b = tl.program_id(0)
    d = tl.arange(0, BD)
    token = tl.load(ids + b)
    found = tl.load(embedding + token * D + d, mask=d < D, other=0.0)
    tl.store(h + b * D + d, found.to(h.dtype.element_ty), mask=d < D)
    at = tl.load(length + b)
    resting = tl.load(idle + b)
    tl.store(length + b, at + 1)
    tl.store(slot + b, at)
    tl.store(place + b, tl.maximum(at - tl.load(pad + b), 0))
    tl.store(live + b, 1 - resting)
    tl.store(left + b, resting)
    tl.store(exit_index + b, EXITS)


@triton.jit
def decide_kernel(confidence, thresholds, index, length, live, left, exit_index, word, B, BB: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """Rows whose ``confidence`` (B,) reaches the threshold of exit ``index`` leave; the host hears how many run on."""
    wait_for_inputs(PDL)
    b = tl.arange(0, BB)
    known = b < B
    gone = tl.load(left + b, mask=known, other=1) != 0
    sure = tl.load(confidence + b, mask=known, other=0.0) >= tl.load(thresholds + index)
    leaving = known & sure & (gone == 0)
    now = gone | leaving
    tl.store(exit_index + b, tl.full([BB], 0, tl.int32) + index, mask=leaving)
    tl.store(left + b, now.to(tl.int32), mask=known)
    tl.store(live + b, 1 - now.to(tl.int32), mask=known)
    running = tl.sum((known & (now == 0)).to(tl.int64))
    tl.store(word, tl.load(length).to(tl.int64) * (1 << 40) + running)


@triton.jit
def choose_kernel(logits, bias, length, exit_index, ids, words, V, BV: tl.constexpr, PDL: tl.constexpr):
    """The likeliest token of every row, the first of equals: to ``ids`` (B,), the next step's, and to the host.

    ``bias`` (V,) is added to the logits (B, V).
    """
    wait_for_inputs(PDL)
    b = tl.program_id(0)
    v = tl.arange(0, BV)
    best = tl.full([BV], float("-inf"), tl.float32)
    at = tl.zeros([BV], tl.int32)
    for start in range(0, V, BV):
        here = start + v
        found = tl.load(logits + b.to(tl.int64) * V + here, mask=here < V, other=float("-inf"))
        found += tl.load(bias + here, mask=here < V, other=0.0)
        at = tl.where(found > best, here, at)
        best = tl.maximum(best, found)
    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, at, 2147483647), 0)
    tl.store(ids + b, token.to(tl.int64))
    word = tl.load(length + b).to(tl.int64) * (1 << 40) + tl.load(exit_index + b).to(tl.int64) * (1 << 32)
    tl.store(words + b, word + token)
