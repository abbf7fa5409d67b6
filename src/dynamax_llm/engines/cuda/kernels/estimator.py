"""An exit head on h, its readout's statistics and the leading tokens, from h to who leaves, in one kernel.

A row's programs do two kinds of work. Pickers look at the readout: at the first exit at logits over the whole
vocabulary, of which they keep a shortlist; at later ones they multiply h with the LM head's rows of that shortlist.
Embedders multiply h with the head's first matrix. The last program to finish does the little that is left: statistics,
the contribution of the two leading tokens from a table, the head's later layers, and the decision.

Shapes: B rows, D width, V vocabulary, K candidates, w inner width of the head, F statistics in ``BF`` places.
"""

import triton
import triton.language as tl

from dynamax_llm.engines.cuda.kernels.product import wait_for_inputs
from dynamax_llm.engines.cuda.kernels.rows import NUMBERS

#: Below every logit, and finite, so that differences are numbers.
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)


@triton.jit
def _merge(first, at, second, at2, one, id1, two, id2):
    """The two largest, and whose, of (first, second) and (one, two), the later ids; of equals the earlier leads."""
    ahead = one > first
    # The lesser of the two leaders against the runner-up of the greater.
    lesser, lesser_at = tl.where(ahead, first, one), tl.where(ahead, at, id1)
    other, other_at = tl.where(ahead, two, second), tl.where(ahead, id2, at2)
    taken = tl.where(ahead, lesser >= other, lesser > other)
    second, at2 = tl.where(taken, lesser, other), tl.where(taken, lesser_at, other_at)
    return tl.maximum(first, one), tl.where(ahead, id1, at), second, at2


@triton.jit
def _shortlist(logits, few, candidates, spread, b, part, V: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
               BG: tl.constexpr, BR: tl.constexpr, PAIRS: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """The two largest logits, and whose, of each of BG of the G groups, to ``few`` and ``candidates`` (B, K).

    Token v belongs to group v modulo G; without PAIRS every token is its own group. ``spread`` (B, PARTS, 4) hears of
    the logits looked at here: the largest, m, the sum of exp(logit - m), and that of (logit - m) exp(logit - m).
    """
    g = part * BG + tl.arange(0, BG)
    rows = tl.arange(0, BR)
    first = tl.full([BG], LOWEST, tl.float32)
    second = tl.full([BG], LOWEST, tl.float32)
    at = tl.zeros([BG], tl.int32)
    at2 = tl.zeros([BG], tl.int32)
    total = tl.zeros([BG], tl.float32)
    weighted = tl.zeros([BG], tl.float32)
    for start in range(0, (V + G - 1) // G, BR):
        v = (start + rows)[:, None] * G + g[None, :]
        known = (g < G)[None, :] & (v < V)
        x = tl.load(logits + b.to(tl.int64) * V + v, mask=known, other=LOWEST)
        one, place = tl.max(x, 0, return_indices=True)
        rest = tl.where(rows[:, None] == place[None, :], LOWEST, x)
        two, place2 = tl.max(rest, 0, return_indices=True)
        top = tl.maximum(first, one)
        over = x - top[None, :]
        share = tl.where(known, tl.exp(over), 0.0)
        fade = tl.exp(first - top)
        weighted = (weighted + (first - top) * total) * fade + tl.sum(over * share, 0)
        total = total * fade + tl.sum(share, 0)
        first, at, second, at2 = _merge(first, at, second, at2, one, (start + place) * G + g, two,
                                        (start + place2) * G + g)  # fmt: skip
    tl.store(few + b * K + g, first, mask=g < G)
    tl.store(candidates + b * K + g, at.to(tl.int64), mask=g < G)
    if PAIRS:
        tl.store(few + b * K + G + g, second, mask=g < G)
        tl.store(candidates + b * K + G + g, at2.to(tl.int64), mask=g < G)
    m, s, t = _together(first, total, weighted)
    line = spread + (b * PARTS + part) * 4
    tl.store(line, m)
    tl.store(line + 1, s)
    tl.store(line + 2, t)


@triton.jit
def _together(tops, totals, weights):
    """m, the sum of exp(x - m), and of (x - m) exp(x - m), of all x, from those of its parts."""
    m = tl.max(tops, 0)
    fade = tl.exp(tops - m)
    return m, tl.sum(totals * fade, 0), tl.sum((weights + (tops - m) * totals) * fade, 0)


@triton.jit
def _few_logits(h, head, norm, left, candidates, few, b, part, D: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr,
                BC: tl.constexpr, BR: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """``few`` (B, K): logits of BR of the candidates, from h through the final norm. None of a row that has left.

    Who they are was written by the first exit, and who has left before this segment: neither has to be waited for.
    """
    r = part * BR + tl.arange(0, BR)
    c = tl.arange(0, BC)
    known = (r < K) & (tl.load(left + b) == 0)
    lines = head + tl.load(candidates + b * K + r, mask=known, other=0)[:, None] * D
    tile = tl.load(lines + c[None, :], mask=known[:, None] & (c < D)[None, :], other=0.0)
    weight = tl.load(norm + c, mask=c < D, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    found = tl.zeros([BR], tl.float32)
    squares = 0.0
    for start in tl.static_range(0, D, BC):
        now, by = tile, weight
        if start + BC < D:
            at = start + BC + c
            tile = tl.load(lines + at[None, :], mask=known[:, None] & (at < D)[None, :], other=0.0)
            weight = tl.load(norm + at, mask=at < D, other=0.0).to(tl.float32)
        x = tl.load(h + b * D + start + c, mask=start + c < D, other=0.0).to(tl.float32)
        squares += tl.sum(x * x, 0)
        found += tl.sum(now.to(tl.float32) * (x * by)[None, :], 1)
    tl.store(few + b * K + r, found * tl.rsqrt(squares / D + EPS), mask=known)


@triton.jit
def _embed(h, before, scale, embed, parts, b, part, D: tl.constexpr, W: tl.constexpr, BW: tl.constexpr,
           BK: tl.constexpr, LINE: tl.constexpr, PARTS: tl.constexpr, LOOKS: tl.constexpr,
           PDL: tl.constexpr):  # fmt: skip
    """A share of h times ``scale`` (D,) times ``embed`` (D, w), and of the sums that unit root mean square and the
    cosine with ``before`` are made of: w + 3 numbers in a LINE of ``parts`` (B, PARTS, LINE)."""
    k = part * BK + tl.arange(0, BK)
    j = tl.arange(0, BW)
    weights = tl.load(embed + k[:, None] * W + j[None, :], mask=(k < D)[:, None] & (j < W)[None, :], other=0.0)
    scales = tl.load(scale + k, mask=k < D, other=0.0)
    wait_for_inputs(PDL)
    x = tl.load(h + b * D + k, mask=k < D, other=0.0).to(tl.float32)
    line = parts + (b * PARTS + part) * LINE
    tl.store(line + W, tl.sum(x * x, 0))
    if LOOKS:
        y = tl.load(before + b * D + k, mask=k < D, other=0.0).to(tl.float32)
        tl.store(line + W + 1, tl.sum(y * y, 0))
        tl.store(line + W + 2, tl.sum(x * y, 0))
    tl.store(line + j, tl.sum((x * scales)[:, None] * weights, 0), mask=j < W)


@triton.jit
def _statistics(few, candidates, spread, token, similarity, b, V: tl.constexpr, K: tl.constexpr, BC: tl.constexpr,
                READ: tl.constexpr, PARTS: tl.constexpr, BP: tl.constexpr, BF: tl.constexpr, TOP: tl.constexpr,
                FLOOR: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """The columns of ``features.STATISTICS`` (BF,), the leading token and its rival; see ``exit_features``."""
    c = tl.arange(0, BC)
    f = tl.arange(0, BF)
    logit = tl.load(few + b * K + c, mask=c < K, other=LOWEST, cache_modifier=".cg")
    named = tl.load(candidates + b * K + c, mask=c < K, other=-1, cache_modifier=".cg")
    previous = tl.load(token + b)
    if READ == "all":
        p = tl.arange(0, BP)
        line = spread + (b * PARTS + p) * 4
        tops = tl.load(line, mask=p < PARTS, other=LOWEST, cache_modifier=".cg")
        totals = tl.load(line + 1, mask=p < PARTS, other=0.0, cache_modifier=".cg")
        weights = tl.load(line + 2, mask=p < PARTS, other=0.0, cache_modifier=".cg")
        m, s, t = _together(tops, totals, weights)
        choices = 1.0 * V
    else:
        m = tl.max(logit, 0)
        share = tl.exp(logit - m)
        s = tl.sum(share, 0)
        t = tl.sum((logit - m) * share, 0)
        choices = 1.0 * K
    scale = tl.log(s)
    rest = logit - m - scale  # log-probabilities, LOWEST where there is no candidate
    probability = tl.exp(rest)
    columns = tl.zeros([BF], tl.float32)
    lead = tl.zeros([BC], tl.int1)
    next_ = tl.zeros([BC], tl.int1)
    margin = 0.0
    for rank in tl.static_range(TOP):
        best, place = tl.max(rest, 0, return_indices=True)
        columns = tl.where(f == rank, tl.maximum(best, FLOOR) / SCALE, columns)
        here = c == place
        if rank == 0:
            lead = here
            margin = tl.exp(best)
        if rank == 1:
            next_ = here
            margin -= tl.exp(best)
        rest = tl.where(here, LOWEST, rest)
    leading = tl.sum(tl.where(lead, named, 0), 0)
    rival = tl.sum(tl.where(next_, named, 0), 0)
    columns = tl.where(f == TOP, margin, columns)
    columns = tl.where(f == TOP + 1, (scale - t / s) / tl.log(choices), columns)
    if READ == "few":
        columns = tl.where(f == TOP + 2, (leading == previous).to(tl.float32), columns)
        there = tl.sum(tl.where(named == previous, probability, 0.0), 0)
        columns = tl.where(f == TOP + 3, there, columns)
    columns = tl.where(f == TOP + 4, similarity, columns)
    return columns, leading, rival


@triton.jit
def _logit(embedded, ahead, up, up_bias, out, W: tl.constexpr, BW: tl.constexpr, BU: tl.constexpr,
           LINEAR: tl.constexpr):  # fmt: skip
    """What the head makes of embedded (BW,): ``up`` (w, 2 w), GELU, ``out`` (2 w,). ``ahead``: the first of ``up``."""
    if LINEAR:
        logit = tl.sum(embedded, 0)
    else:
        logit = 0.0
        for start in tl.static_range(0, 2 * W, BU):
            u = start + tl.arange(0, BU)
            inner = ahead
            if start > 0:
                inner = _up(up, start, W, BW, BU)
            found = tl.sum(embedded[:, None] * inner, 0) + tl.load(up_bias + u, mask=u < 2 * W, other=0.0)
            found = 0.5 * found * (1.0 + tl.erf(found * 0.7071067811865476))
            logit += tl.sum(found * tl.load(out + u, mask=u < 2 * W, other=0.0), 0)
    return logit


@triton.jit
def _up(up, start, W: tl.constexpr, BW: tl.constexpr, BU: tl.constexpr):
    """Columns ``start`` to ``start + BU - 1`` of ``up`` (w, 2 w)."""
    j = tl.arange(0, BW)
    u = start + tl.arange(0, BU)
    return tl.load(up + j[:, None] * (2 * W) + u[None, :], mask=(j < W)[:, None] & (u < 2 * W)[None, :], other=0.0)


@triton.jit
def _decide(sure, b, thresholds, index, ticket, live, left, exit_index, word, counter, B, BB: tl.constexpr,
            RIDE: tl.constexpr):  # fmt: skip
    """Row b leaves if it is sure enough; the last row to come tells the host how many run on."""
    if (tl.load(left + b) == 0) & (sure >= tl.load(thresholds + index * B + b)):
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
        tl.store(word + index, (tl.load(ticket) & NUMBERS).to(tl.int64) * (1 << 40) + tl.sum(still.to(tl.int64), 0))


@triton.jit(do_not_specialize=["index", "B"])
def check_kernel(h, before, scale, embed, constant, moments, observed, rows, up, up_bias, out, offset, head, norm,
                 logits, candidates, few, spread, token, thresholds, index, ticket, live, left, exit_index, word, parts,
                 counter, values, confidence, B, D: tl.constexpr, V: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
                 W: tl.constexpr, READ: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr, LINEAR: tl.constexpr,
                 PICKERS: tl.constexpr, EMBEDDERS: tl.constexpr, BP: tl.constexpr, BG: tl.constexpr, BR: tl.constexpr,
                 BC: tl.constexpr, BK: tl.constexpr, BW: tl.constexpr, BU: tl.constexpr, BE: tl.constexpr,
                 BN: tl.constexpr, BF: tl.constexpr, BB: tl.constexpr, TOP: tl.constexpr, FLOOR: tl.constexpr,
                 SCALE: tl.constexpr, EPS: tl.constexpr, RIDE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Rows of h (B, D) whose head is sure enough leave by exit ``index``; the host hears how many run on.

    READ "all": ``logits`` (B, V) make the shortlist; "few": the LM head's rows of ``candidates`` (B, K) are read;
    "none": the head sees h alone. The head's first matrix comes in parts: ``embed`` (D, w) with ``scale`` (D,) for h,
    ``observed`` (BF, w) with ``moments`` (2, BF), scale and shift, for the statistics, ``rows`` (2, V, w) for the
    leading token and its rival, everything else in ``constant`` (w,). A grid of (B, PICKERS + EMBEDDERS).
    """
    b, part = tl.program_id(0), tl.program_id(1)
    LINE: tl.constexpr = (W + 6) // 4 * 4
    if part < PICKERS:
        if READ == "all":
            wait_for_inputs(PDL)
            _shortlist(logits, few, candidates, spread, b, part, V, K, G, BG, BR, PAIRS, PICKERS)
        if READ == "few":
            _few_logits(h, head, norm, left, candidates, few, b, part, D, K, EPS, BC, BR, PDL)
    else:
        _embed(h, before, scale, embed, parts, b, part - PICKERS, D, W, BW, BK, LINE, EMBEDDERS, READ != "none", PDL)
    tl.debug_barrier()
    if tl.atomic_add(counter + b, 1) == PICKERS + EMBEDDERS - 1:
        j, p, f = tl.arange(0, BW), tl.arange(0, BE), tl.arange(0, BF)
        ahead = 0.0
        if not LINEAR:
            ahead = _up(up, 0, W, BW, BU)
        lines = parts + (b * EMBEDDERS + p) * LINE
        real = (p < EMBEDDERS)[:, None] & (j < W)[None, :]
        every = tl.load(lines[:, None] + j[None, :], mask=real, other=0.0, cache_modifier=".cg")
        squares = tl.sum(tl.load(lines + W, mask=p < EMBEDDERS, other=0.0, cache_modifier=".cg"), 0)
        embedded = tl.sum(every, 0) * tl.rsqrt(tl.maximum(squares / D, 1e-24))
        embedded += tl.load(constant + j, mask=j < W, other=0.0)
        running = tl.load(left + b) == 0
        if READ != "none":
            others = tl.sum(tl.load(lines + W + 1, mask=p < EMBEDDERS, other=0.0, cache_modifier=".cg"), 0)
            both = tl.sum(tl.load(lines + W + 2, mask=p < EMBEDDERS, other=0.0, cache_modifier=".cg"), 0)
            similarity = both / (tl.maximum(tl.sqrt(squares), 1e-8) * tl.maximum(tl.sqrt(others), 1e-8))
            columns, leading, rival = _statistics(few, candidates, spread, token, similarity, b, V, K, BN, READ,
                                                  PICKERS, BP, BF, TOP, FLOOR, SCALE)  # fmt: skip
            if TOKENS:
                embedded += tl.load(rows + leading * W + j, mask=j < W, other=0.0)
                embedded += tl.load(rows + (V + rival) * W + j, mask=j < W, other=0.0)
            standard = columns * tl.load(moments + f) + tl.load(moments + BF + f)
            weights = tl.load(observed + f[:, None] * W + j[None, :], mask=(j < W)[None, :], other=0.0)
            embedded += tl.sum(standard[:, None] * weights, 0)
            if running:  # a row that has left keeps what it left with
                tl.store(token + b, leading)
                tl.store(values + (index * B + b) * BF + f, columns)
        logit = _logit(embedded, ahead, up, up_bias, out, W, BW, BU, LINEAR) + tl.load(offset + index)
        sure = 1.0 / (1.0 + tl.exp(-logit))
        if running:
            tl.store(confidence + index * B + b, sure)
        _decide(sure, b, thresholds, index, ticket, live, left, exit_index, word, counter, B, BB, RIDE)
