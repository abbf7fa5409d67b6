"""The Mamba exit head (arXiv 2504.20922), recurrent over the tokens of a sequence, in the state-space-dual form of
Mamba-2 (arXiv 2405.21060)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamax_llm.exits.blocks import advance_cell, causal_convolution, scan
from dynamax_llm.exits.confidence.bank import Bank, project, unit_rms
from dynamax_llm.exits.state import State


class MambaBank(Bank):
    """A selective state-space block whose output projection is the exit decision.

    The inputs are projected down to w; in_proj makes the gate z and what the state reads: x, B, C and dt. The gated,
    RMS-normalised output y (inner width 2 w), the input x through D, and the embedding itself (the block's residual)
    are all read by one logit. The norm's weight would be absorbed by that projection, so there is none.
    """

    recurrent = True
    default_width = 80
    KERNEL = 4
    STATE = 16
    CHANNELS = 16  # per head

    def __init__(self, n_exits: int, inputs: int, width: int) -> None:
        super().__init__(n_exits, inputs, width)
        self.inner, self.heads = 2 * width, 2 * width // self.CHANNELS
        self.convolved = self.inner + 2 * self.STATE
        self.embed, self.embed_bias = self.matrix(inputs, width), self.constant(1, width)
        self.in_proj = self.matrix(width, self.convolved + self.heads + self.inner)  # x, B, C | dt | z
        self.conv = self.matrix(self.KERNEL, self.convolved)
        self.conv_bias = self.constant(1, 1, self.convolved)
        # As in Mamba-2: time steps between 1/1000 and 1/10 of a unit, decay rates between 1 and 16 per unit.
        step = torch.exp(torch.empty(n_exits, 1, 1, self.heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.log_decay = nn.Parameter(torch.empty(n_exits, 1, 1, self.heads).uniform_(1.0, 16.0).log())
        self.skip = self.constant(1, 1, self.heads, 1, value=1.0)  # D
        self.out, self.out_bias = self.constant(self.inner, 1), self.constant(1, 1)
        self.residual = self.constant(width, 1)

    def forward(self, exits: slice, x: Tensor, state: State | None, padding: Tensor | None) -> tuple[Tensor, State]:
        state = self.past(exits, x, state)
        embedded = project(x, self.embed[exits], self.embed_bias[exits])
        rows = project(embedded, self.in_proj[exits])
        z = rows[..., self.convolved + self.heads :]
        x, b, c, dt, window = self._convolve(exits, rows, state, padding)
        y, cell = scan(x, dt, -self.log_decay[exits].exp(), b, c, state[1])
        y = (y + x * self.skip[exits]).flatten(-2) * F.silu(z)
        logit = project(unit_rms(y), self.out[exits], self.out_bias[exits])
        return (logit + project(embedded, self.residual[exits])).squeeze(-1), (window, cell)

    def _convolve(
        self, exits: slice, rows: Tensor, state: State, padding: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x (S, B, T, H, P), B and C (S, B, T, N), dt (S, B, T, H) and the next window; zero dt and rows at pads."""
        dt = F.softplus(rows[..., self.convolved : self.convolved + self.heads] + self.dt_bias[exits])
        fresh = rows[..., : self.convolved]
        if padding is not None:
            real = padding.to(rows.dtype)[None, :, :, None]
            dt, fresh = dt * real, fresh * real
        mixed, window = causal_convolution(fresh, self.conv[exits], self.conv_bias[exits], state[0])
        x, b, c = mixed.split((self.inner, self.STATE, self.STATE), dim=-1)
        return x.unflatten(-1, (self.heads, self.CHANNELS)), b, c, dt, window

    def advance(self, exits: slice, x: Tensor, state: State, padding: Tensor | None) -> State:
        if x.shape[2] > 1:
            return self(exits, x, state, padding)[1]
        embedded = project(x, self.embed[exits], self.embed_bias[exits])
        rows = project(
            embedded, self.in_proj[exits][..., : self.convolved + self.heads]
        )  # the state does not depend on z
        x, b, _, dt, window = self._convolve(exits, rows, state, padding)
        return window, advance_cell(x, dt, -self.log_decay[exits].exp(), b, state[1])

    def initial_state(self, batch: int, device: torch.device | str) -> State:
        window = torch.zeros(self.n_exits, batch, self.KERNEL - 1, self.convolved, device=device)
        return window, torch.zeros(self.n_exits, batch, self.heads, self.CHANNELS, self.STATE, device=device)

    def macs(self) -> int:
        return self.update_macs() + self.width * self.inner + self.inner * self.STATE + 2 * self.inner + self.width

    def update_macs(self) -> int:
        weights = self.inputs * self.width + self.width * (self.convolved + self.heads) + self.KERNEL * self.convolved
        return weights + 2 * self.inner * self.STATE
