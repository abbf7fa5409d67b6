"""What every kind of exit head is: a bank of E heads, one an exit, whose parameters have a leading exit axis.

Shapes: B batch, T tokens, D inputs, w inner width, E exits, S exits run side by side.
"""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor, nn

from dynamax_llm.exits.state import State


class Bank(nn.Module, abc.ABC):
    """E heads of one kind, computed for any run of consecutive exits at once. ``exits`` is that run."""

    recurrent = False
    #: Inner width at which a head costs about as much as the other kinds': 74 to 77 thousand parameters on the default
    #: inputs of a backbone of width 192, less than 2 % of a 7B layer's multiply-accumulates.
    default_width = 64

    def __init__(self, n_exits: int, inputs: int, width: int) -> None:
        super().__init__()
        self.n_exits, self.inputs, self.width = n_exits, inputs, width

    def matrix(self, *shape: int) -> nn.Parameter:
        """(E, *shape), drawn for inputs along the first axis of ``shape``."""
        return nn.Parameter(torch.randn(self.n_exits, *shape) * shape[0] ** -0.5)

    def constant(self, *shape: int, value: float = 0.0) -> nn.Parameter:
        return nn.Parameter(torch.full((self.n_exits, *shape), value))

    @abc.abstractmethod
    def forward(self, exits: slice, x: Tensor, state: State | None, padding: Tensor | None) -> tuple[Tensor, State]:
        """Logits (S, B, T) from inputs x (S, B, T, D), and the state, whose tensors are (S, B, ...)."""

    def advance(self, exits: slice, x: Tensor, state: State, padding: Tensor | None) -> State:
        """The state that ``forward`` would return, without the logits."""
        return self(exits, x, state, padding)[1]

    def initial_state(self, batch: int, device: torch.device | str) -> State:
        """(E, B, ...) zeros, before any token."""
        return ()

    def past(self, exits: slice, x: Tensor, state: State | None) -> State:
        """``state``, or where it is None the initial one of these exits, for inputs x (S, B, T, D)."""
        return tuple(part[exits] for part in self.initial_state(x.shape[1], x.device)) if state is None else state

    @abc.abstractmethod
    def macs(self) -> int:
        """Multiply-accumulates of one head on one token."""

    def update_macs(self) -> int:
        """Multiply-accumulates of advancing one head's state by one token."""
        return 0


def auto_width(width: int) -> int:
    """Inner width of a head on a backbone of this width: under 2 % of a 7B layer, small on small backbones."""
    return max(16, min(64, width // 6))


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (S, B, T, D), each exit by its own weight (S, D, w) and bias (S, 1, w), to (S, B, T, w)."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    out = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias, rows, weight)
    return out.view(*x.shape[:-1], -1)


def unit_rms(h: Tensor) -> Tensor:
    """h scaled to root mean square 1 along its last axis, in float32."""
    h = h.float()
    return h * (math.sqrt(h.shape[-1]) / torch.linalg.vector_norm(h, dim=-1, keepdim=True).clamp(min=1e-12))
