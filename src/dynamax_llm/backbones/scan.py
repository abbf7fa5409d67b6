"""The two operations over time of a Mamba-2 mixer, for several tokens at once on a CPU, without gradients.

The scan is the state-space dual of arXiv 2405.21060 with weights that factor, so that no matrix is built per head.

Shapes: B batch, T tokens, C convolved channels, K kernel, H heads, P channels of a head, G groups of heads that share
B and C, N state size, M chunks of Q tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: Tokens of a chunk, measured on one thread (recipes/cpu/README.md), and of a chunk of heads that decay faster.
CHUNK = 64
STEEP_CHUNK = 16
#: The greatest log decay between the first and the last token of a chunk: factors lie between exp(-50) and exp(50).
MOST_DECAY = 100.0
#: What is kept is nothing below exp of this: denormal numbers would make products many times slower. The middle of a
#: chunk is so low only if the chunk's first token keeps less than exp(-20) of the state before it.
NOTHING = -70.0


def causal_convolution(rows: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None) -> Tensor:
    """Depthwise causal convolution of rows (B, T, C) with ``weight`` (C, 1, K) and ``bias`` (C,); a new (B, T, C).

    ``window`` (B, K - 1, C) are the rows before, None for zeros. One two-dimensional convolution of height 1, because
    that runs on rows as they lie in memory, channels last, where a one-dimensional one transposes them.
    """
    short = 0 if window is not None else weight.shape[2] - 1
    if window is not None:
        rows = torch.cat((window, rows), dim=1)
    count = rows.shape[1] - weight.shape[2] + 1 + short
    image = rows.transpose(1, 2).unsqueeze(2)  # (B, C, 1, T)
    mixed = F.conv2d(image, weight.unsqueeze(2), bias, padding=(0, short), groups=len(weight))
    return mixed[:, :, 0, :count].transpose(1, 2)


def chunked_scan(
    x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Selective state-space scan from ``state`` (zeros if None); new tensors y (B, T, H, P) and state (B, H, P, N).

    Per head, with a_t = exp(dt_t decay):    state_t = a_t state_{t-1} + dt_t x_t B_t^T        y_t = state_t C_t

    ``x`` (B, T, H, P), ``dt`` (B, T, H) >= 0, ``decay`` (H,) < 0, ``b``, ``c`` (B, T, G, N), H a multiple of G, all
    float32. Heads that decay too fast for ``_scan_calm`` are scanned by ``_scan_steep``.
    """
    steps = dt * decay
    # Summed in float64: log decays may be large, and only their differences count.
    total = _in_chunks(steps.double(), min(x.shape[1], CHUNK)).cumsum(2)  # (B, M, Q, H)
    spread = total[:, :, 0] - total[:, :, -1]
    if float(spread.max()) <= MOST_DECAY:
        return _scan_calm(x, dt, total, b, c, state)
    steep = spread.amax((0, 1)) > MOST_DECAY  # (H,)
    some = steep.nonzero().squeeze(1)
    group = some // (x.shape[2] // b.shape[2])
    start = None if state is None else state[:, some]
    fast = _scan_steep(x[:, :, some], dt[:, :, some], steps[:, :, some], b[:, :, group], c[:, :, group], start)
    if len(some) == len(steep):
        return fast
    y, last = _scan_calm(x, dt, total.masked_fill(steep, 0.0), b, c, state)
    y[:, :, some], last[:, some] = fast
    return y, last


def _in_chunks(part: Tensor, size: int) -> Tensor:
    """(B, T, ...) as (B, M, Q, ...) with Q = ``size``, filled up with zeros."""
    short = -part.shape[1] % size
    if short:
        part = F.pad(part, (0, 0) * (part.dim() - 2) + (0, short))
    return part.unflatten(1, (-1, size))


def _kept(total: Tensor) -> Tensor:
    """exp of log decays, zero where that is nothing."""
    return F.threshold(total, NOTHING, float("-inf")).exp_()


def _scan_steep(
    x: Tensor, dt: Tensor, steps: Tensor, b: Tensor, c: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``chunked_scan`` for any decay, with B and C for each head (G = H) and log decays ``steps`` (B, T, H).

    Weights exp(l_i - l_j), l the log decay since the chunk's begin, are made per head and pair of tokens of a short
    chunk. l is summed in float64: it may be hundreds, and only differences count.
    """
    batch, count, heads, _ = x.shape
    total = _in_chunks(steps.double(), min(count, STEEP_CHUNK)).permute(0, 3, 1, 2).flatten(0, 1)  # (B H, M, Q)
    total = total.cumsum(2)
    gap = (total.unsqueeze(3) - total.unsqueeze(2)).float()
    future = torch.ones(gap.shape[2:], dtype=torch.bool).triu(1)
    chunk = total.shape[2]
    fed, bs, cs = (
        _in_chunks(part, chunk).movedim(3, 1).flatten(0, 1) for part in (x * dt.unsqueeze(-1), b, c)
    )  # (B H, M, Q, P or N)
    bs = bs.transpose(2, 3)
    y = ((cs @ bs) * _kept(gap.masked_fill_(future, float("-inf")))) @ fed
    since, left = (_kept(part).float().unsqueeze(3) for part in (total, total[:, :, -1:] - total))
    cs, keep = cs * since, since[:, :, -1:]  # keep (B H, M, 1, 1)
    arrived = bs @ (fed * left)  # (B H, M, N, P)
    carried = torch.zeros_like(arrived[:, 0])
    if state is not None:
        carried.copy_(state.flatten(0, 1).transpose(1, 2))
    for reading, out, kept, new in zip(*(part.unbind(1) for part in (cs, y, keep, arrived)), strict=True):
        out.baddbmm_(reading, carried)
        carried.mul_(kept).add_(new)
    y = y.flatten(1, 2)[:, :count].unflatten(0, (batch, heads)).transpose(1, 2)
    return y, carried.transpose(1, 2).unflatten(0, (batch, heads))


def _scan_calm(
    x: Tensor, dt: Tensor, total: Tensor, b: Tensor, c: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``chunked_scan`` with log decays ``total`` (B, M, Q, H) since each chunk's begin, none above ``MOST_DECAY``.

    y in a chunk is a causal attention (C B^T) x weighted by exp(l_i - l_j) = exp(l_i - m) exp(m - l_j), l the log
    decays: rows and columns are weighted apart, so that one lower triangle serves all heads of a group. m is the middle
    of the chunk's range of l, so that no factor overflows.
    """
    batch, count, heads, dim = x.shape
    groups, size = b.shape[2:]
    each, chunk = heads // groups, total.shape[2]  # heads of a group, tokens of a chunk
    middle = (total[:, :, :1] + total[:, :, -1:]) / 2
    above = torch.exp(total - middle).float()  # (B, M, Q, H): exp(l_i - m)
    enter, leave = _kept(middle[:, :, 0]).float(), above[:, :, -1]  # (B, M, H): from before to m, and from m to the end
    enter, leave = (part.view(batch, -1, groups, 1, each, 1) for part in (enter, leave))
    above = above.flatten(1, 2)[:, :count]
    below = (dt / above).view(batch, count, groups, each, 1)  # exp(m - l_j), and dt
    length = total.shape[1] * chunk
    fed = x.new_empty(batch, groups, length, each, dim)
    if length > count:
        fed[:, :, count:] = 0.0
    torch.mul(x.unflatten(2, (groups, each)), below, out=fed[:, :, :count].transpose(1, 2))
    fed = fed.view(batch * groups, -1, chunk, each * dim)
    bs, cs = (_in_chunks(part, chunk).movedim(3, 1).flatten(0, 1) for part in (b, c))  # (B G, M, Q, N)
    bs = bs.transpose(2, 3)
    y = (cs @ bs).tril_() @ fed  # (B G, M, Q, P H / G)
    carried = x.new_zeros(batch * groups, size, each * dim)  # the state, transposed, in the middle of a chunk
    cells = carried.view(batch, groups, size, each, dim)
    if state is not None:
        cells.copy_(state.unflatten(1, (groups, each)).permute(0, 1, 4, 2, 3))
    parts = (part.unbind(1) for part in (cs, bs, fed, y, enter, leave))
    for index, (reading, entering, values, out, before, after) in enumerate(zip(*parts, strict=True)):
        if index or state is not None:
            cells.mul_(before)  # not one factor with the last ``after``: that could be a denormal number
            out.baddbmm_(reading, carried)
        carried.baddbmm_(entering, values)
        cells.mul_(after)
    y = y.view(batch, groups, length, each, dim)[:, :, :count].transpose(1, 2)
    y = y.mul_(above.view(batch, count, groups, each, 1)).reshape(x.shape)
    return y, cells.permute(0, 1, 3, 4, 2).reshape(batch, heads, dim, size)
