"""A pass: the rows of one run through layers, in memory that stays where it is so that programs can be replayed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Pass:
    """``tokens`` rows of each of ``batch`` sequences, row b * tokens + t; M = batch * tokens rows.

    h (M, d); slot (M,) int32, where in the caches a row goes, -1 for a row without a token; place (M,) int32, its
    rotary position; live (M,) int32, 1 where layers may change h; pad (B,) int32, slots at a sequence's start that hold
    no token.
    """

    batch: int
    tokens: int
    h: Tensor
    pad: Tensor
    slot: Tensor = field(init=False)
    place: Tensor = field(init=False)
    live: Tensor = field(init=False)
    ready: Tensor | None = None  # (M, d): h weighted by the norm that reads it next, in the weights' dtype
    sums: Tensor | None = None  # (M, parts): sums of squares of h
    scratch: dict[str, Tensor] = field(default_factory=dict)  # of the family's layers, by name

    def __post_init__(self) -> None:
        self.slot = self._rows(-1)
        self.place, self.live = self._rows(0), self._rows(1)

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    def _rows(self, value: int) -> Tensor:
        return torch.full((self.rows,), value, dtype=torch.int32, device=self.h.device)

    def prepare(self, parts: int, dtype: torch.dtype) -> None:
        """Have room for h made ready by a kernel of ``parts`` programs."""
        if self.ready is None:
            self.ready = torch.zeros(self.h.shape, dtype=dtype, device=self.h.device)
        if self.sums is None or self.sums.shape[1] != parts:
            self.sums = self.buffer(f"sums {parts}", self.rows, parts, dtype=torch.float32)

    def buffer(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory of this name, made on first use."""
        if name not in self.scratch:
            self.scratch[name] = torch.zeros(shape, dtype=dtype, device=self.h.device)
        return self.scratch[name]
