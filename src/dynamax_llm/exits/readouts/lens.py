"""The ``lens`` readout: a learned low-rank translator h + B (A h), then final norm and LM head.

A low-rank relative of the tuned lens (arXiv 2303.08112). Shapes: B batch, T tokens, d width, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from dynamax_llm.exits.config import ExitConfig, ReadoutOptions
from dynamax_llm.exits.readouts.base import Readout
from dynamax_llm.exits.state import State
from dynamax_llm.shapes import Hidden


@final
@dataclass(frozen=True)
class LensOptions(ReadoutOptions):
    """``lens_rank``: the rank r of the translators."""

    lens_rank: int = 16


class Lens(nn.Module):
    """One low-rank residual translator per exit: h + B (A h), zero at the start because B is."""

    def __init__(self, n_exits: int, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.ParameterList(nn.Parameter(torch.randn(rank, width) * width**-0.5) for _ in range(n_exits))
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(width, rank)) for _ in range(n_exits))

    def forward(self, exit: int, h: Hidden) -> Hidden:
        """h (B, T, d) translated, in its own dtype; the product runs in float32. B A h scales with h by itself."""
        moved = nn.functional.linear(nn.functional.linear(h.float(), self.down[exit]), self.up[exit])
        return (h.float() + moved).to(h.dtype)

    def macs(self, exit: int) -> int:
        """Multiply-accumulates per token."""
        return self.down[exit].numel() + self.up[exit].numel()


@final
class LensReadout(Readout):
    """Translates h by its exit's translator before reading out."""

    Options = LensOptions
    learner = "lens"

    @classmethod
    def new_weights(cls, config: ExitConfig, width: int) -> Lens:
        assert isinstance(config.readout_options, LensOptions)
        return Lens(len(config.layers), width, config.readout_options.lens_rank)

    def transform(
        self, exit: int, h: Tensor, state: State | None = None, padding: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        assert isinstance(self.weights, Lens)
        return self.weights(exit, h), state

    def transform_macs(self, exit: int) -> int:
        assert isinstance(self.weights, Lens)
        return self.weights.macs(exit)
