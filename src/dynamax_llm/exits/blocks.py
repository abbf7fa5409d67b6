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
    (S, B, H, P, N), all float32. In a chunk y is a decayed causal attention (C B^T) x; between chunks the same form
    once more carries the states, so the number of operations does not grow with T: on a GPU a loop over chunks is
    nothing but launches. A token with dt = 0 neither decays nor feeds the state.
    """
    count = x.shape[2]
    if count == 1:
        state = advance_cell(x, dt, decay, b, state)
        return (state @ c.unsqueeze(2).transpose(-1, -2)).squeeze(-1).unsqueeze(2), state  # (S, B, 1, H, P)
    y, states = scan_chunks(x, dt, decay, b, c, state)
    return y, states[:, :, -1]


def scan_chunks(
    x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """``scan`` in M chunks of ``chunk`` tokens (by default CHUNK): y (S, B, T, H, P), and the states (S, B, M + 1, H,
    P, N) before the first chunk and after each."""
    count = x.shape[2]
    chunk = min(count, CHUNK) if chunk is None else chunk
    short = -count % chunk
    if short:
        x, dt = F.pad(x, (0, 0, 0, 0, 0, short)), F.pad(dt, (0, 0, 0, short))
        b, c = (F.pad(part, (0, 0, 0, short)) for part in (b, c))
    fed = (x * dt.unsqueeze(-1)).unflatten(2, (-1, chunk)).transpose(3, 4)  # (S, B, M, H, Q, P): M chunks of Q tokens
    bs, cs = b.unflatten(2, (-1, chunk)).unsqueeze(3), c.unflatten(2, (-1, chunk)).unsqueeze(3)  # (S, B, M, 1, Q, N)
    log_keep = (dt * decay).unflatten(2, (-1, chunk)).cumsum(3).transpose(3, 4)  # (S, B, M, H, Q): from its begin
    y = (_decays(log_keep) * (cs @ bs.transpose(-1, -2))) @ fed
    to_end = (log_keep[..., -1:] - log_keep).exp().unsqueeze(-1)
    arrived = (fed * to_end).transpose(-1, -2) @ bs  # (S, B, M, H, P, N): what each chunk adds by its end
    whole = F.pad(log_keep[..., -1].cumsum(2).transpose(2, 3), (1, 0))  # (S, B, H, M + 1): log decay since the start
    parts = torch.cat((state.unsqueeze(2), arrived), dim=2).transpose(2, 3).flatten(-2)  # (S, B, H, M + 1, P N)
    states = (_decays(whole) @ parts).unflatten(-1, state.shape[-2:]).transpose(2, 3)  # before each, and after all
    y = y + (cs @ states[:, :, :-1].transpose(-1, -2)) * log_keep.exp().unsqueeze(-1)
    return y.transpose(3, 4).flatten(2, 3)[:, :, :count], states


def _decays(log_keep: Tensor) -> Tensor:
    """(..., n, n) from log decays (..., n) since a start: how much of what came at j is left at i; 0 where i < j."""
    gap = log_keep.unsqueeze(-1) - log_keep.unsqueeze(-2)
    future = torch.ones(gap.shape[-2:], dtype=torch.bool, device=gap.device).triu(1)
    return gap.masked_fill(future, float("-inf")).exp()


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
