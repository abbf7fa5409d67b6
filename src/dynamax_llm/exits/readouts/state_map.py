"""A learned state update: what each skipped layer would have read, estimated from what the exit knows.

Under ``propagate`` a skipped layer makes its state from h_e. Here it makes it from h_e plus a low-rank correction of
its own, a linear function of h_e and of the block's output, both at unit root mean square. Approximate as before, and
closer: trained against what the layers do read. Shapes: B batch, T tokens, d width, r rank, n skipped layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynamax_llm.exits.block_kinds.base import EPSILON, linear, matrix


class StateMap(nn.Module):
    """The corrections of one exit, zero at first: layer ``first`` reads h_e itself, the n after it h_e corrected."""

    def __init__(self, first: int, n_layers: int, width: int, rank: int) -> None:
        super().__init__()
        self.first = first
        self.down = matrix(rank, 2 * width)
        self.up = nn.Parameter(torch.zeros(n_layers - first - 1, width, rank))

    def code(self, h: Tensor, moved: Tensor) -> Tensor:
        """(B, T, r) of h_e and the block's output, both (B, T, d)."""
        return linear(torch.cat((_unit(h), _unit(moved)), dim=-1), self.down)

    def entering(self, layer: int, h: Tensor, code: Tensor) -> Tensor:
        """What skipped layer ``layer`` (from 0) reads: (B, T, d)."""
        if layer == self.first:
            return h
        return h + _size(h) * linear(code, self.up[layer - self.first - 1])

    def macs(self) -> int:
        """Multiply-accumulates of all corrections of one token."""
        return self.down.numel() + self.up.numel()


def _size(h: Tensor) -> Tensor:
    """The root mean square (B, T, 1) of h, in its dtype."""
    return h.float().square().mean(-1, keepdim=True).sqrt().to(h.dtype)


def _unit(h: Tensor) -> Tensor:
    return nn.functional.rms_norm(h, h.shape[-1:], eps=EPSILON)
