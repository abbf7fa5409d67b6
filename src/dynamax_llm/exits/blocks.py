"""The two recurrent blocks of the exit heads, as plain functions: a Mamba-2 scan and windowed attention.

Both take a whole sequence at once, in parallel, or one token, in a few operations, and both continue from a cached
state, so a sequence cut anywhere gives the same result. Left pads leave their states as if they were not there.

Shapes: S exits run side by side (heads of one bank, each with its own weights), B batch, T tokens, H heads,
P channels of a head, N state size, C = H P + 2 N convolved channels, K convolution kernel, W attention window.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: Tokens handled by one quadratic block, in both functions.
CHUNK = 64
#: Added to a score that must not count. Finite, so that a pad, which may see nothing, still gets a number.
MASKED = -1e9


def causal_convolution(rows: Tensor, weight: Tensor, bias: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution with SiLU of rows (S, B, T, C), and the next window.

    ``weight`` (S, K, C), ``bias`` (S, 1, 1, C), ``window`` (S, B, K - 1, C): the rows before, zeros at a start.
    """
    kernel, count = weight.shape[1], rows.shape[2]
    joined = torch.cat((window, rows), dim=2)  # (S, B, K - 1 + T, C)
    taps = weight[:, None, :, None]  # (S, 1, K, 1, C)
    if count == 1:
        mixed = (joined * taps[:, :, :, 0]).sum(2, keepdim=True)
    else:
        mixed = joined[:, :, :count] * taps[:, :, 0]
        for tap in range(1, kernel):
            mixed = mixed + joined[:, :, tap : tap + count] * taps[:, :, tap]
    return F.silu(mixed + bias), joined[:, :, count:]


def advance_cell(x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """The state after one token (T = 1), as the recurrence of ``scan`` is written."""
    keep = torch.exp(dt * decay).squeeze(2)[..., None, None]  # (S, B, H, 1, 1)
    fed = (x * dt.unsqueeze(-1)).squeeze(2).unsqueeze(-1)  # (S, B, H, P, 1)
    return torch.addcmul(state * keep, fed, b.unsqueeze(3))  # b (S, B, 1, 1, N)


def scan(x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Selective state-space scan in state-space-dual form, from ``state``; returns y (S, B, T, H, P) and the state.

    Per head, with scalar decay a_t = exp(dt_t decay), written from the equations of arXiv 2405.21060:

        state_t = a_t state_{t-1} + dt_t x_t B_t^T        y_t = state_t C_t

    ``x`` (S, B, T, H, P), ``dt`` (S, B, T, H) >= 0, ``decay`` (S, 1, 1, H) < 0, ``b``, ``c`` (S, B, T, N), ``state``
    (S, B, H, P, N), all float32. In a chunk y is a decayed causal attention (C B^T) x; a loop over chunks, not
    tokens, carries the state. A token with dt = 0 neither decays nor feeds it.
    """
    if x.shape[2] == 1:
        state = advance_cell(x, dt, decay, b, state)
        return (state @ c.unsqueeze(2).transpose(-1, -2)).squeeze(-1).unsqueeze(2), state  # (S, B, 1, H, P)
    outputs = []
    for start in range(0, x.shape[2], CHUNK):
        run = slice(start, start + CHUNK)
        fed = (x[:, :, run] * dt[:, :, run, :, None]).transpose(2, 3)  # (S, B, H, Q, P)
        bs, cs = b[:, :, run], c[:, :, run]  # (S, B, Q, N)
        log_keep = (dt[:, :, run] * decay).cumsum(2).transpose(2, 3)  # (S, B, H, Q): log decay since the chunk began
        gap = log_keep.unsqueeze(-1) - log_keep.unsqueeze(-2)  # (S, B, H, Q, Q)
        causal = torch.ones(gap.shape[-2:], dtype=torch.bool, device=gap.device).tril()
        weights = gap.masked_fill(~causal, float("-inf")).exp() * (cs @ bs.transpose(-1, -2)).unsqueeze(2)
        inherited = cs.unsqueeze(2) @ state.transpose(-1, -2)  # (S, B, H, Q, P)
        outputs.append((weights @ fed + inherited * log_keep.exp().unsqueeze(-1)).transpose(2, 3))
        to_end = (log_keep[..., -1:] - log_keep).exp().unsqueeze(-1)  # (S, B, H, Q, 1)
        arrived = (fed * to_end).transpose(-1, -2) @ bs.unsqueeze(2)  # (S, B, H, P, N)
        state = state * log_keep[..., -1].exp()[..., None, None] + arrived
    return torch.cat(outputs, dim=2), state


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, bias: Tensor, state: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Causal attention over the last W tokens, each distance with its own learned bias; returns y and the state.

    ``q``, ``k``, ``v`` (S, B, T, H, P); ``valid`` (S, B, T) 0 at pads; ``bias`` (S, H, W), distance 0 first. The
    state is the last W - 1 keys, values (S, B, W - 1, H, P) and their validity (S, B, W - 1), zeros at a start.
    Queries go in blocks of at most CHUNK, so cost is linear in T. Positions are not read: only distances are.
    """
    window, count = bias.shape[-1], q.shape[2]
    keys, values, seen = (torch.cat(pair, dim=2) for pair in zip(state, (k, v, valid), strict=True))
    after = (keys[:, :, count:], values[:, :, count:], seen[:, :, count:])
    block = min(count, CHUNK)
    short = -count % block
    if short:
        q, keys, values = (F.pad(part, (0, 0, 0, 0, 0, short)) for part in (q, keys, values))
        seen = F.pad(seen, (0, short))
    span = window - 1 + block
    q = q.unflatten(2, (-1, block)).transpose(3, 4)  # (S, B, blocks, H, block, P)
    keys, values = (part.unfold(2, span, block) for part in (keys, values))  # (S, B, blocks, H, P, span)
    distance = torch.arange(block, device=q.device)[:, None] + window - 1 - torch.arange(span, device=q.device)
    inside = (distance >= 0) & (distance < window)
    shift = bias[..., distance.clamp(0, window - 1)].masked_fill(~inside, MASKED)  # (S, H, block, span)
    scores = torch.matmul(q, keys) * q.shape[-1] ** -0.5 + shift[:, None, None]
    hidden = (1.0 - seen.unfold(2, span, block))[:, :, :, None, None] * MASKED
    y = torch.softmax(scores + hidden, dim=-1) @ values.transpose(-1, -2)  # (S, B, blocks, H, block, P)
    return y.transpose(3, 4).flatten(2, 3)[:, :, :count], after
