"""Mamba-2 for decoded tokens: the projection into gate and state inputs, and the state-space cell.

What a layer's state sees of a token, x, B and C before the convolution and dt after it, goes into a **ring** of the
last R tokens, (layers, B, R, C + H): the convolution reads its window there, so nothing is shifted; and because the
ring still holds what a token that is taken back has fed, the state can be made again from an older one.

Rows of a pass are b * T + t; ``slot`` (M,) is a row's time, -1 for a row without a token; the ring place of time s is
s modulo R, a power of two. SSM states are (homes, layers, B, H, P, N); ``turn`` names the home to read and the home to
write.
"""

import triton
import triton.language as tl

from dynamax_llm.engines.cuda.kernels.product import ahead, product, wait_for_inputs


@triton.jit
def mamba_in_kernel(h, w, bias, norm, sums, table, slot, z, ring, first, M, T, B, INNER: tl.constexpr,
                    WIDTH: tl.constexpr, RING: tl.constexpr, SKIP: tl.constexpr, TABLE: tl.constexpr, K: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, PARTS: tl.constexpr,
                    BP: tl.constexpr, EPS: tl.constexpr, BIAS: tl.constexpr, STAGES: tl.constexpr,
                    PDL: tl.constexpr):  # fmt: skip
    """in_proj of h (M, K), normed (NORM and ``sums``: see ``product``): the gate to ``z`` (M, INNER), x, B, C and
    dt (WIDTH together) into the ring.

    SKIP: the gate is left out, as for a layer that only updates its state. TABLE: weights of layer ``first`` + grid
    axis 2 are taken from the addresses in ``table`` (layers, 3): in_proj, its bias, the norm; h is (layers, M, K),
    ready for each.
    """
    layer = first
    if TABLE:
        kind = z.dtype.element_ty
        layer = first + tl.program_id(2)
        line = table + layer * 3
        w = tl.multiple_of(tl.load(line).to(tl.pointer_type(kind)), 16)
        bias = tl.multiple_of(tl.load(line + 1).to(tl.pointer_type(kind)), 16)
        h += tl.program_id(2).to(tl.int64) * M * K
    lead: tl.constexpr = INNER if SKIP else 0
    last: tl.constexpr = INNER + WIDTH - 1
    rows = lead + tl.program_id(0) * BN + tl.arange(0, BN)
    valid = rows <= last
    row = tl.minimum(rows, last)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    tile, tile2 = ahead(w, row, valid, w, row, K, BM, BK, False)
    wait_for_inputs(PDL)
    slots = tl.load(slot + m, mask=m < M, other=-1)
    y, _ = product(tile, tile2, w, row, valid, w, row, h, m, M, norm, sums, K, BM, BN, BK, False, NORM, 1, PARTS, BP,
                   EPS, STAGES)  # fmt: skip
    if BIAS:
        y += tl.load(bias + row).to(tl.float32)[:, None]
    known = valid[:, None] & (m < M)[None, :]
    if not SKIP:
        tl.store(z + m[None, :] * INNER + rows[:, None], y.to(z.dtype.element_ty), mask=known & (rows < INNER)[:, None])
    line = ((layer * B + m // T) * RING + (slots & (RING - 1))).to(tl.int64) * WIDTH
    fed = known & (rows >= INNER)[:, None] & (slots >= 0)[None, :]
    tl.store(ring + line[None, :] + (rows - INNER)[:, None], y.to(ring.dtype.element_ty), mask=fed)


@triton.jit
def _history(ring, time, weight, bias, channel, valid, WIDTH: tl.constexpr, RING: tl.constexpr, TAPS: tl.constexpr):
    """The part of the causal convolution of some channels at ``time`` that earlier tokens contribute."""
    out = tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        place = (time - (TAPS - 1) + tap) & (RING - 1)
        seen = tl.load(ring + place * WIDTH + channel, mask=valid, other=0.0).to(tl.float32)
        out += seen * tl.load(weight + channel * TAPS + tap, mask=valid, other=0.0).to(tl.float32)
    return out


@triton.jit
def _convolved(history, ring, time, weight, channel, valid, WIDTH: tl.constexpr, RING: tl.constexpr,
               TAPS: tl.constexpr):  # fmt: skip
    """silu of the convolution: ``history`` and the token itself."""
    seen = tl.load(ring + (time & (RING - 1)) * WIDTH + channel, mask=valid, other=0.0).to(tl.float32)
    out = history + seen * tl.load(weight + channel * TAPS + TAPS - 1, mask=valid, other=0.0).to(tl.float32)
    return out / (1.0 + tl.exp(-out))


@triton.jit
def convolve_kernel(ring, conv, conv_bias, slot, out, layer, T, B, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
                    RING: tl.constexpr, TAPS: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out (M, CHANNELS): x, B and C of every row after the convolution; for passes of several tokens."""
    wait_for_inputs(PDL)
    m = tl.program_id(0)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    valid = channel < CHANNELS
    time = tl.load(slot + m)
    if time >= 0:
        ring += (layer * B + m // T).to(tl.int64) * RING * WIDTH
        conv += layer * CHANNELS * TAPS
        conv_bias += layer * CHANNELS
        found = _history(ring, time, conv, conv_bias, channel, valid, WIDTH, RING, TAPS)
        found = _convolved(found, ring, time, conv, channel, valid, WIDTH, RING, TAPS)
        tl.store(out + m * CHANNELS + channel, found, mask=valid)


@triton.jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _row(ready, ring, z, m, time, of_x, of_key, of_query, head, in_p, in_n, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
         RING: tl.constexpr, INNER: tl.constexpr, WRITE: tl.constexpr):  # fmt: skip
    """What a head reads of row m: x, B and C after the convolution, dt before its bias, and the gate."""
    line = ready + m * CHANNELS
    x = tl.load(line + of_x, mask=in_p, other=0.0).to(tl.float32)
    key = tl.load(line + of_key, mask=in_n, other=0.0).to(tl.float32)
    dt = tl.load(ring + (time & (RING - 1)) * WIDTH + CHANNELS + head).to(tl.float32)
    query, gate = key, x
    if WRITE:
        query = tl.load(line + of_query, mask=in_n, other=0.0).to(tl.float32)
        gate = tl.load(z + m * INNER + of_x, mask=in_p, other=0.0).to(tl.float32)
    return x, key, query, dt, gate


@triton.jit
def _histories(ring, time, conv, conv_bias, of_x, of_key, of_query, in_p, in_n, WIDTH: tl.constexpr, RING: tl.constexpr,
               TAPS: tl.constexpr, WRITE: tl.constexpr):  # fmt: skip
    """The convolution of x, B and C so far, over the tokens before ``time``."""
    x = _history(ring, time, conv, conv_bias, of_x, in_p, WIDTH, RING, TAPS)
    key = _history(ring, time, conv, conv_bias, of_key, in_n, WIDTH, RING, TAPS)
    query = key
    if WRITE:
        query = _history(ring, time, conv, conv_bias, of_query, in_n, WIDTH, RING, TAPS)
    return x, key, query


@triton.jit
def _newest(x, key, query, ring, z, time, m, conv, of_x, of_key, of_query, head, in_p, in_n, CHANNELS: tl.constexpr,
            WIDTH: tl.constexpr, RING: tl.constexpr, TAPS: tl.constexpr, INNER: tl.constexpr,
            WRITE: tl.constexpr):  # fmt: skip
    """x, B and C after the convolution, dt and the gate of the token at ``time``, row ``m``."""
    x = _convolved(x, ring, time, conv, of_x, in_p, WIDTH, RING, TAPS)
    key = _convolved(key, ring, time, conv, of_key, in_n, WIDTH, RING, TAPS)
    dt = tl.load(ring + (time & (RING - 1)) * WIDTH + CHANNELS + head).to(tl.float32)
    gate = x
    if WRITE:
        query = _convolved(query, ring, time, conv, of_query, in_n, WIDTH, RING, TAPS)
        gate = tl.load(z + m * INNER + of_x, mask=in_p, other=0.0).to(tl.float32)
    return x, key, query, dt, gate


@triton.jit
def _write(y, gate, out, target, squares, in_p):
    """The gated output, and its sum of squares."""
    y = (y * gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty)
    tl.store(target, y, mask=in_p)
    y = tl.where(in_p, y.to(tl.float32), 0.0)
    tl.store(squares, tl.sum(y * y))


@triton.jit
def mamba_cell_kernel(ring, z, conv, conv_bias, dt_bias, decay, skip, states, turn, slot, ready, out, squares, first, T,
                      B, sequences, HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr,
                      RING: tl.constexpr, TAPS: tl.constexpr, PB: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
                      WRITE: tl.constexpr, READY: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A sequence's next tokens, already in the ring, through convolution and state of layer ``first`` + grid axis 1.

    A program owns PB of a head's P channels. WRITE: ``out`` (M, HEADS * P) is the gated output before its norm,
    ``squares`` (M, HEADS * parts) the sums of squares that the norm needs. READY: ``ready`` (M, CHANNELS) holds x, B
    and C after the convolution. ``sequences``: all layers' times B. Small weights are stacked over layers, float32.
    """
    INNER: tl.constexpr = HEADS * P
    CHANNELS: tl.constexpr = INNER + 2 * GROUPS * N
    WIDTH: tl.constexpr = CHANNELS + HEADS
    PARTS: tl.constexpr = (P + PB - 1) // PB
    layer, b = first + tl.program_id(1), tl.program_id(0) // (HEADS * PARTS)
    head, part = tl.program_id(0) // PARTS % HEADS, tl.program_id(0) % PARTS
    p, n = part * PB + tl.arange(0, PB), tl.arange(0, BN)
    group = head // (HEADS // GROUPS)
    in_p, in_n = p < P, n < N
    conv, conv_bias = conv + layer * CHANNELS * TAPS, conv_bias + layer * CHANNELS
    ring += (layer * B + b).to(tl.int64) * RING * WIDTH
    own = layer * HEADS + head
    dt0, rate, direct = tl.load(dt_bias + own), tl.load(decay + own), tl.load(skip + own)
    # States, places and earlier tokens are older than the kernel before this one: only the newest rows are waited for.
    t = tl.arange(0, BT)
    slots = tl.load(slot + b * T + t, mask=t < T, other=-1)
    count, begin = tl.sum((slots >= 0).to(tl.int32)), tl.min(tl.where(slots >= 0, slots, 2147483647))
    where, inside = p[:, None] * N + n[None, :], in_p[:, None] & in_n[None, :]
    line = layer * B + b
    source = states + ((tl.load(turn) * sequences + line) * HEADS + head).to(tl.int64) * P * N
    target = states + ((tl.load(turn + 1) * sequences + line) * HEADS + head).to(tl.int64) * P * N
    state = tl.load(source + where, mask=inside, other=0.0).to(tl.float32)
    of_x, of_key, of_query = head * P + p, INNER + group * N + n, INNER + (GROUPS + group) * N + n
    if not READY:
        x, key, query = _histories(ring, begin, conv, conv_bias, of_x, of_key, of_query, in_p, in_n, WIDTH, RING, TAPS,
                                   WRITE)  # fmt: skip
        wait_for_inputs(PDL)
    else:
        wait_for_inputs(PDL)
        x, key, query, dt, gate = _row(ready, ring, z, b * T, begin, of_x, of_key, of_query, head, in_p, in_n, CHANNELS,
                                       WIDTH, RING, INNER, WRITE)  # fmt: skip
    for step in range(count):
        time, m = begin + step, b * T + step
        if not READY:
            if step > 0:
                x, key, query = _histories(ring, time, conv, conv_bias, of_x, of_key, of_query, in_p, in_n, WIDTH, RING,
                                           TAPS, WRITE)  # fmt: skip
            x, key, query, dt, gate = _newest(x, key, query, ring, z, time, m, conv, of_x, of_key, of_query, head, in_p,
                                              in_n, CHANNELS, WIDTH, RING, TAPS, INNER, WRITE)  # fmt: skip
        now_x, now_key, now_query, now_gate = x, key, query, gate
        now_dt = _softplus(dt + dt0)
        if READY:  # the next token's rows are on their way while this one's state is made
            ahead_of = tl.minimum(step + 1, count - 1)
            x, key, query, dt, gate = _row(ready, ring, z, b * T + ahead_of, begin + ahead_of, of_x, of_key, of_query,
                                           head, in_p, in_n, CHANNELS, WIDTH, RING, INNER, WRITE)  # fmt: skip
        state = state * tl.exp(now_dt * rate) + (now_dt * now_x)[:, None] * now_key[None, :]
        if WRITE:
            y = tl.sum(state * now_query[None, :], 1) + direct * now_x
            _write(y, now_gate, out, out + m * INNER + of_x, squares + (m * HEADS + head) * PARTS + part, in_p)
    tl.store(target + where, state.to(states.dtype.element_ty), mask=inside)
