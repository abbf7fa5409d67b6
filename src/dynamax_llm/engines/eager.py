"""Plain PyTorch on any device and any family: the reference that every faster engine must agree with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone, Context
from dynamax_llm.backbones.cache import Snapshot


@dataclass(frozen=True)
class Moment:
    """A copy of all that an engine knows of its batch."""

    state: Snapshot
    length: int
    padding: Tensor | None


class EagerEngine:
    """One batch being decoded: a backbone, its cache, and which positions are padding.

    Left padding only: ``padding`` (B, T) is 1 for tokens and 0 for pads, None if no row is padded.
    """

    def __init__(self, backbone: Backbone, padding: Tensor | None = None) -> None:
        self.backbone = backbone
        self.cache = backbone.new_cache()
        self.padding = padding if padding is not None and not bool(padding.all()) else None
        self.passes = 0  # readings of a layer's weights for the batch since the prompt
        self.length = 0  # slots that have been entered, pads included

    def enter(self, ids: Tensor) -> tuple[Tensor, Context]:
        """Embed ids (B, T) that follow what was entered before: (h (B, T, d), context)."""
        h = self.backbone.embed(ids)
        ctx = self.backbone.context(h, past=self.length, padding=self.padding)
        self.length += ids.shape[1]
        return h, ctx

    def snapshot(self) -> Moment:
        """Everything this batch has come to; ``restore`` goes back to it."""
        return Moment(self.cache.snapshot(), self.length, self.padding)

    def restore(self, moment: Moment) -> None:
        """Forget what happened since ``moment``."""
        self.cache.restore(moment.state)
        self.length, self.padding = moment.length, moment.padding

    def grow(self) -> None:
        """Make room in the padding mask for one more token per row."""
        if self.padding is not None:
            self.padding = torch.cat((self.padding, self.padding.new_ones(len(self.padding), 1)), dim=1)

    def reorder(self, rows: Tensor) -> None:
        """Keep rows ``rows`` (B',) of the batch, in that order."""
        self.cache.select_rows(rows)
        if self.padding is not None:
            self.padding = self.padding[rows]

    def run(self, first: int, stop: int, h: Tensor, ctx: Context) -> Tensor:
        """Layers ``first`` to ``stop - 1``; their state advances."""
        self.passes += stop - first
        for index in range(first, stop):
            h = self.backbone.layer(index, h, self.cache, ctx)
        return h

    def update_states(self, first: int, stop: int, h: Tensor, ctx: Context) -> None:
        """State of layers ``first`` to ``stop - 1``, all reading h, without running them."""
        if first < stop:
            self.backbone.update_states(first, stop, h, self.cache, ctx)
