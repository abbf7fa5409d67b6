"""The Mamba block: a Mamba-2 mixer (arXiv 2405.21060), then a feed-forward part; as many weights as its transformer.

Shapes: B batch, T tokens, F forks, d width, E = 2 d channels in H heads of P, N state size, C = E + 2 N convolved
channels, K convolution kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamax_llm.exits.block_kinds.base import Block, BlockShape, FeedForward, Fork, linear, matrix, rms_norm
from dynamax_llm.exits.blocks import scan_chunks
from dynamax_llm.exits.state import State

#: Tokens of a chunk when forks are taken: they lie at the ends of chunks.
FORK_CHUNK = 16


class MambaBlock(Block):
    """State: the last K - 1 convolved rows (B, K - 1, C) and the cell (B, H, P, N), float32."""

    KERNEL = 4
    STATE = 64
    LEAST_INNER = 16

    def __init__(self, shape: BlockShape) -> None:
        super().__init__(shape)
        self.inner = 2 * shape.width
        self.channels = math.gcd(self.inner, 64)
        self.heads = self.inner // self.channels
        self.convolved = self.inner + 2 * self.STATE
        self.norm = nn.Parameter(torch.ones(shape.width))
        self.in_proj = matrix(self.inner + self.convolved + self.heads, shape.width)  # z | x, B, C | dt
        self.conv = nn.Parameter(torch.randn(self.KERNEL, self.convolved) * self.KERNEL**-0.5)
        self.conv_bias = nn.Parameter(torch.zeros(self.convolved))
        # As in Mamba-2: time steps between 1/1000 and 1/10 of a unit, decay rates between 1 and 16 per unit.
        step = torch.exp(torch.empty(self.heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.log_decay = nn.Parameter(torch.empty(self.heads).uniform_(1.0, 16.0).log())
        self.skip = nn.Parameter(torch.ones(self.heads, 1))
        self.gate_norm = nn.Parameter(torch.ones(self.inner))
        self.out = matrix(shape.width, self.inner, scale=0.1)
        mixer = self.in_proj.numel() + self.out.numel()
        self.feed_forward = FeedForward(shape.width, max((shape.size - mixer) // (3 * shape.width), self.LEAST_INNER))

    def initial_state(self, batch: int, device: torch.device | str) -> State:
        window = torch.zeros(batch, self.KERNEL - 1, self.convolved, device=device)
        return window, torch.zeros(batch, self.heads, self.channels, self.STATE, device=device)

    def forward(self, x: Tensor, state: State, padding: Tensor | None = None) -> tuple[Tensor, State]:
        z, rows, dt = self._project(x, padding)
        joined = torch.cat((state[0], rows), dim=1)
        y, cells = self._scan(joined, dt, state[1])
        return self._finish(x, y, z), (joined[:, x.shape[1] :], cells[:, -1])

    def update(self, x: Tensor, state: State, padding: Tensor | None = None, counts: Tensor | None = None) -> State:
        _, rows, dt = self._project(x, padding)
        joined = torch.cat((state[0], rows), dim=1)
        if counts is None:
            window = joined[:, x.shape[1] :]
        else:
            steps = torch.arange(x.shape[1], device=x.device)
            dt = dt * (steps < counts.unsqueeze(1)).unsqueeze(-1)
            slots = counts.unsqueeze(1) + torch.arange(self.KERNEL - 1, device=x.device)
            window = joined[torch.arange(len(x), device=x.device).unsqueeze(1), slots]
        return window, self._scan(joined, dt, state[1])[1][:, -1]

    def _project(self, x: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gate z (B, T, E), rows to convolve (B, T, C) and dt (B, T, H), the last two float32 and zero at pads."""
        z, rows, dt = linear(rms_norm(x, self.norm), self.in_proj).split(
            (self.inner, self.convolved, self.heads), dim=-1
        )
        rows, dt = rows.float(), F.softplus(dt.float() + self.dt_bias.float())
        if padding is not None:
            real = padding.unsqueeze(-1).to(rows.dtype)
            rows, dt = rows * real, dt * real
        return z, rows, dt

    def _convolve(self, joined: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., T, H, P), B and C (..., T, N) from rows joined to the K - 1 before them, (..., K - 1 + T, C)."""
        count = joined.shape[-2] - self.KERNEL + 1
        taps = self.conv.float()
        mixed = joined[..., :count, :] * taps[0]
        for tap in range(1, self.KERNEL):
            mixed = mixed + joined[..., tap : tap + count, :] * taps[tap]
        x, b, c = F.silu(mixed + self.conv_bias.float()).split((self.inner, self.STATE, self.STATE), dim=-1)
        return x.unflatten(-1, (self.heads, -1)), b, c

    def _scan(self, joined: Tensor, dt: Tensor, cell: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """y (B, T, H, P) with the skip added, and the cells after every chunk (B, M, H, P, N)."""
        x, b, c = self._convolve(joined)
        decay = self._decay().view(1, 1, 1, -1)
        y, cells = scan_chunks(x[None], dt[None], decay, b[None], c[None], cell[None], chunk)
        return y[0] + x * self.skip.float(), cells[0, :, 1:]

    def _decay(self) -> Tensor:
        return -self.log_decay.float().exp()

    def _finish(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """The block's output from its input x, the scan's y (..., H, P) and the gate z (..., E)."""
        gated = rms_norm(y.flatten(-2).to(x.dtype) * F.silu(z), self.gate_norm)
        return self.feed_forward(x + linear(gated, self.out))

    def fork(self, x: Tensor, forks: Tensor) -> tuple[Tensor, Fork]:
        """``forks`` are ends of chunks of FORK_CHUNK, counted from the first one's."""
        offset = int(forks[0]) % FORK_CHUNK + 1  # the first chunk is cut there, so that forks end chunks
        z, rows, dt = self._project(x, None)
        window, cell = self.initial_state(len(x), x.device)
        lead = FORK_CHUNK - offset
        joined = torch.cat((window, F.pad(rows, (0, 0, lead, 0))), dim=1)  # zeros before the start change nothing
        y, cells = self._scan(joined, F.pad(dt, (0, 0, lead, 0)), cell, FORK_CHUNK)
        windows = torch.stack(
            [F.pad(rows, (0, 0, self.KERNEL - 1, 0))[:, forks + 1 + tap] for tap in range(self.KERNEL - 1)], dim=2
        )  # (B, F, K - 1, C): the rows that end at each fork
        fork = _MambaFork(self, windows, cells[:, (forks + lead) // FORK_CHUNK])
        return self._finish(x[:, forks], y[:, forks + lead], z[:, forks]), fork

    def forks(self, count: int, every: int, generator: torch.Generator) -> Tensor:
        step = FORK_CHUNK * max(1, round(every / FORK_CHUNK))
        start = int(torch.randint(min(step, count), (1,), generator=generator))
        return torch.arange(start, count, step)

    def macs(self) -> int:
        mixer = self.in_proj.numel() + self.out.numel() + self.conv.numel() + 3 * self.inner * self.STATE
        return mixer + self.feed_forward.macs()

    def update_macs(self) -> int:
        rows = self.convolved + self.heads
        return rows * self.shape.width + self.conv.numel() + 2 * self.inner * self.STATE


class _MambaFork(Fork):
    """Window (B, F, K - 1, C) and cell (B, F, H, P, N) of every fork."""

    def __init__(self, block: MambaBlock, window: Tensor, cell: Tensor) -> None:
        self.block, self.window, self.cell = block, window, cell

    def step(self, x: Tensor) -> Tensor:
        block = self.block
        z, rows, dt = block._project(x, None)
        joined = torch.cat((self.window, rows.unsqueeze(2)), dim=2)  # (B, F, K, C)
        self.window = joined[:, :, 1:]
        fed, b, c = block._convolve(joined)  # one token each: (B, F, 1, H, P), (B, F, 1, N)
        keep = torch.exp(dt * block._decay())[..., None, None]  # (B, F, H, 1, 1)
        new = (fed.squeeze(2) * dt.unsqueeze(-1)).unsqueeze(-1) * b.unsqueeze(-2)  # (B, F, H, P, N)
        self.cell = self.cell * keep + new
        y = (self.cell @ c.squeeze(2)[:, :, None, :, None]).squeeze(-1) + fed.squeeze(2) * block.skip.float()
        return block._finish(x, y, z)
