"""Chunked state-space dual (SSD) scan: Mamba-2's recurrence as matrix products, differentiable and fast.

Written from the equations of the Mamba-2 paper (arXiv 2405.21060, sections 5 and 6). Per head, with scalar
decay a_t = exp(dt_t A), state H_t (n, p), input x_t (p), B_t and C_t (n):

    H_t = a_t H_{t-1} + dt_t B_t x_t^T        y_t = C_t^T H_t + D x_t

The sequence is cut into chunks of Q steps. Inside a chunk y is a masked, decayed attention (C B^T) x; between
chunks only the state at each chunk's end is carried. Every product has Q, n or h p as inner size, so nothing of
size (t, h, p, n) or (t, Q, h, n) is ever made: the largest intermediate is the (h, Q, Q) matrix per chunk.
One B/C group only (n_groups = 1), which is what lets C B^T and the states be shared by all heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, chunk: int) -> Tensor:
    """y (B, T, h, p) of the recurrence above, from a zero state.

    x (B, T, h, p), dt (B, T, h) float32 and already positive, a (h) negative, b and c (B, T, n), d (h).
    Products run in x.dtype; decays and their sums in float32.
    """
    batch, length, heads, width = x.shape
    pad = -length % chunk
    if pad:  # dt = 0 neither decays nor feeds the state, so padded steps are inert
        x, dt = F.pad(x, (0, 0, 0, 0, 0, pad)), F.pad(dt, (0, 0, 0, pad))
        b, c = F.pad(b, (0, 0, 0, pad)), F.pad(c, (0, 0, 0, pad))
    count = (length + pad) // chunk
    dtype = x.dtype
    b = b.reshape(batch, count, chunk, -1)  # (B, k, Q, n)
    c = c.reshape(batch, count, chunk, -1)  # (B, k, Q, n)
    dt = dt.reshape(batch, count, chunk, heads)
    fed = x.reshape(batch, count, chunk, heads, width) * dt[..., None]  # dt_t x_t, float32
    decay = torch.cumsum((dt * a).transpose(2, 3).contiguous(), -1)  # (B, k, h, Q): log of the product up to t
    total = decay[..., -1]  # (B, k, h)

    # inside the chunk: (C B^T) * exp(decay_i - decay_j) for j <= i, times the fed input
    scores = c @ b.transpose(2, 3)  # (B, k, Q, Q)
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    gap = (decay[..., :, None] - decay[..., None, :]).masked_fill(~causal, float("-inf"))  # (B, k, h, Q, Q)
    mixing = (scores[:, :, None].float() * torch.exp(gap)).to(dtype)
    inside = mixing @ fed.permute(0, 1, 3, 2, 4).to(dtype)  # (B, k, h, Q, p)

    # state each chunk leaves behind, then the state each chunk starts from
    left = torch.exp(total[..., None] - decay).transpose(2, 3)  # (B, k, Q, h)
    feed = (fed * left[..., None]).to(dtype).reshape(batch, count, chunk, heads * width)
    states = b.transpose(2, 3) @ feed  # (B, k, n, h p)
    carried = carry(states, total, heads)
    across = (c @ carried).reshape(batch, count, chunk, heads, width)  # (B, k, Q, h, p)

    y = inside.permute(0, 1, 3, 2, 4).float() + across.float() * torch.exp(decay).transpose(2, 3)[..., None]
    y = y.reshape(batch, count * chunk, heads, width)[:, :length]
    return (y + x[:, :length].float() * d[:, None]).to(dtype)


def carry(states: Tensor, total: Tensor, heads: int) -> Tensor:
    """State at the start of each chunk, (B, k, n, h p), from the states each chunk adds, in one product.

    total (B, k, h) is each chunk's summed log decay. Start of chunk i = sum over j < i of
    exp(total_{j+1} + ... + total_{i-1}) states_j: a strictly lower-triangular (k, k) matrix per head.
    """
    batch, count, size, _ = states.shape
    ends = torch.cumsum(total.transpose(1, 2).contiguous(), -1)  # (B, h, k), inclusive
    starts = ends - total.transpose(1, 2)  # (B, h, k), exclusive
    earlier = torch.ones(count, count, dtype=torch.bool, device=states.device).tril(-1)
    gap = (starts[..., :, None] - ends[..., None, :]).masked_fill(~earlier, float("-inf"))
    mix = torch.exp(gap).to(states.dtype)  # (B, h, k, k)
    per_head = states.reshape(batch, count, size, heads, -1).permute(0, 3, 1, 2, 4)  # (B, h, k, n, p)
    width = per_head.shape[-1]
    carried = mix @ per_head.reshape(batch, heads, count, size * width)
    return carried.reshape(batch, heads, count, size, width).permute(0, 2, 3, 1, 4).reshape(states.shape)
