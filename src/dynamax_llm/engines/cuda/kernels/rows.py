"""Small kernels about a pass's rows: tokens that enter, leave, are chosen, wait, and are taken up again.

What the host waits for is written straight into its memory, as one 64-bit word that carries the number of the token it
belongs to: no copy, no event, and no word can be mistaken for an older one.

    word = number of the step, modulo 2**22, * 2**40 + exit index * 2**32 + token (or rows that still run)
"""

import triton
import triton.language as tl

from dynamax_llm.engines.cuda.kernels.product import wait_for_inputs

#: Step numbers in words are cut off here.
NUMBERS: tl.constexpr = tl.constexpr(2**22 - 1)


@triton.jit
def enter_kernel(ids, embedding, idle, pad, length, ticket, h, slot, place, live, left, exit_index, FULL,
                 D: tl.constexpr, BD: tl.constexpr, RIDE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One token per sequence enters: h (B, D) its embedding, slot its place in the caches; ``length`` (B,) grows, and
    ``ticket``, the number of the step, by one.

    ``idle`` rows (B,) have left before they began: they are not live, so layers leave their h alone, unless they RIDE.
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
    if RIDE:
        tl.store(live + b, 1)
    else:
        tl.store(live + b, 1 - resting)
    tl.store(left + b, resting)
    tl.store(exit_index + b, FULL)
    if b == 0:
        tl.store(ticket, tl.load(ticket) + 1)


@triton.jit
def show_kernel(h, kept, count, left, shown, before, T, D: tl.constexpr, BD: tl.constexpr, FROZEN: tl.constexpr,
                BOTH: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """shown (B, D): h (B, T, D) of every sequence's newest token, the ``count``-th; FROZEN: not of rows that left.

    BOTH: the same of ``kept`` (B, T, D), in ``before`` (B, D).
    """
    wait_for_inputs(PDL)
    b = tl.program_id(0)
    d = tl.arange(0, BD)
    at = (b * T + tl.maximum(tl.load(count) - 1, 0)) * D + d
    wanted = d < D
    if FROZEN:
        wanted = wanted & (tl.load(left + b) == 0)
    tl.store(shown + b * D + d, tl.load(h + at, mask=d < D, other=0.0), mask=wanted)
    if BOTH:
        tl.store(before + b * D + d, tl.load(kept + at, mask=d < D, other=0.0), mask=wanted)


@triton.jit
def move_kernel(h, slot, place, count, to_h, to_slot, to_place, to_count, T, TO, D: tl.constexpr, BD: tl.constexpr,
                PDL: tl.constexpr):  # fmt: skip
    """The first ``count`` of each sequence's T rows join the ``to_count`` that wait among its TO rows."""
    wait_for_inputs(PDL)
    b = tl.program_id(0) // T
    t = tl.program_id(0) % T
    d = tl.arange(0, BD)
    at = tl.load(to_count) + t
    source, target = b * T + t, b * TO + at
    if (t < tl.load(count)) & (at < TO):
        tl.store(to_h + target * D + d, tl.load(h + source * D + d, mask=d < D, other=0.0), mask=d < D)
        tl.store(to_slot + target, tl.load(slot + source))
        tl.store(to_place + target, tl.load(place + source))


@triton.jit
def settle_kernel(slot, count, to_count, turn, rows, BR: tl.constexpr, KEEP: tl.constexpr, MOVED: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """After a move: count them where they went (MOVED), and unless KEEP forget them where they were.

    ``turn``: states that were written are from now on those to be read.
    """
    wait_for_inputs(PDL)
    if MOVED:
        tl.store(to_count, tl.load(to_count) + tl.load(count))
    if not KEEP:
        r = tl.arange(0, BR)
        tl.store(slot + r, tl.full([BR], -1, tl.int32), mask=r < rows)
        tl.store(count, 0)
    tl.store(turn, tl.load(turn + 1))


@triton.jit
def decide_kernel(confidence, thresholds, index, ticket, live, left, exit_index, word, B, BB: tl.constexpr,
                  RIDE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Rows whose ``confidence`` (B,) reaches the threshold of exit ``index`` leave; the host hears how many run on."""
    wait_for_inputs(PDL)
    b = tl.arange(0, BB)
    known = b < B
    gone = tl.load(left + b, mask=known, other=1) != 0
    limit = tl.load(thresholds + index * B + b, mask=known, other=float("inf"))
    sure = tl.load(confidence + b, mask=known, other=0.0) >= limit
    leaving = known & sure & (gone == 0)
    now = gone | leaving
    tl.store(exit_index + b, tl.full([BB], 0, tl.int32) + index, mask=leaving)
    tl.store(left + b, now.to(tl.int32), mask=known)
    if not RIDE:
        tl.store(live + b, 1 - now.to(tl.int32), mask=known)
    running = tl.sum((known & (now == 0)).to(tl.int64))
    tl.store(word, (tl.load(ticket) & NUMBERS).to(tl.int64) * (1 << 40) + running)


@triton.jit
def choose_kernel(logits, bias, ticket, exit_index, ids, words, found, counter, V, BV: tl.constexpr,
                  SPLITS: tl.constexpr, FEED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The likeliest token of every row of logits (M, V), the first of equals, to the host; FEED: it is the next step's,
    and the exit index is told too. ``bias`` (V,) is added to the logits.

    SPLITS programs share a row; the one that finishes last compares what they ``found`` (M, SPLITS, 2).
    """
    wait_for_inputs(PDL)
    b, split = tl.program_id(0), tl.program_id(1)
    v = split * BV + tl.arange(0, BV)
    row = tl.load(logits + b.to(tl.int64) * V + v, mask=v < V, other=float("-inf"))
    row += tl.load(bias + v, mask=v < V, other=0.0)
    top = tl.max(row, 0)
    first = tl.min(tl.where((row == top) & (v < V), v, V - 1), 0)
    tl.store(found + (b * SPLITS + split) * 2, top)
    tl.store(found + (b * SPLITS + split) * 2 + 1, first.to(tl.float32))
    tl.debug_barrier()
    if tl.atomic_add(counter + b, 1) == SPLITS - 1:
        each = tl.arange(0, SPLITS)
        tops = tl.load(found + (b * SPLITS + each) * 2, cache_modifier=".cg")
        firsts = tl.load(found + (b * SPLITS + each) * 2 + 1, cache_modifier=".cg")
        best = tl.max(tops, 0)
        token = tl.min(tl.where(tops == best, firsts, 2.0**24), 0).to(tl.int64)
        tl.store(counter + b, 0)
        word = (tl.load(ticket) & NUMBERS).to(tl.int64) * (1 << 40)
        if FEED:
            tl.store(ids + b, token)
            word += tl.load(exit_index + b).to(tl.int64) * (1 << 32)
        # Steps write in turns, so that one may begin before the host has read the one before.
        tl.store(words + (tl.load(ticket) & 1) * tl.num_programs(0) + b, word + token)
