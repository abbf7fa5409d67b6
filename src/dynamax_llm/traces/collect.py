"""What one frozen full-depth forward tells about every exit: hidden states, statistics, labels.

Nothing is kept between batches, and logits exist for one slice of one exit at a time, so memory depends on the batch
alone. The states of attention and Mamba layers are those of full depth: labels describe an exit taken by one token
whose predecessors left intact states (``defer``); what ``propagate`` makes of them is in ``on_policy``.

Shapes: B rows, T tokens, E exits, d width, V vocabulary, n real (unpadded) tokens of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone, Context
from dynamax_llm.exits.features import ExitFeatures
from dynamax_llm.exits.readout import Readout
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.labels import Labels
from dynamax_llm.traces.packing import Packing


@dataclass(frozen=True)
class ExitBatch:
    """One batch at every exit. Values at pads mean nothing."""

    mask: Tensor  # (B, T) bool, True at tokens
    hidden: tuple[Tensor, ...]  # E of (B, T, d)
    features: tuple[ExitFeatures, ...]  # E of (B, T, F)
    labels: Tensor  # (E, B, T) bool: stopping here gives the full model's token (see ``labels``)
    target: Tensor  # (B, T) int64: the full model's argmax
    targets: Tensor  # (E, B, T) float32: what heads learn, the labels or their soft kind

    @property
    def nbytes(self) -> int:
        """Memory of what grows with the backbone's width."""
        rows = [features.rows for features in self.features if features.rows is not None]
        return sum(part.nbytes for part in (*self.hidden, *rows))


@dataclass(frozen=True)
class Forward:
    """h at every exit, and h before the layer that made it, E of (B, T, d) each; ``final`` after the last layer."""

    hidden: tuple[Tensor, ...]
    before: tuple[Tensor, ...]
    final: Tensor
    ctx: Context


@torch.no_grad()
def forward(backbone: Backbone, layers: tuple[int, ...], ids: Tensor) -> Forward:
    """Run ids (B, T) through every layer, keeping h at the exits after ``layers``. Right pads need no mask."""
    h = backbone.embed(ids.to(backbone.device, non_blocking=True))
    ctx = backbone.context(h)
    hidden, before = [], []
    for index in range(backbone.n_layers):
        earlier, h = h, backbone.layer(index, h, None, ctx)
        if index + 1 in layers:
            hidden.append(h)
            before.append(earlier)
    return Forward(tuple(hidden), tuple(before), h, ctx)


@torch.no_grad()
def collect_exits(backbone: Backbone, readout: Readout, batch: Batch) -> ExitBatch:
    """Everything the exits of ``readout.config`` show on this batch, and the labels that it names."""
    run = forward(backbone, readout.config.layers, batch.ids)
    real = Packing.of(batch.mask, run.final.device)
    labels = Labels(backbone, readout, run.final, real)
    shown: list[ExitFeatures] = []
    found: list[tuple[Tensor, Tensor]] = []
    seen: ExitFeatures | None = None
    for exit, (h, before) in enumerate(zip(run.hidden, run.before, strict=True)):
        seen, spoken = readout.features(exit, real.pack(h)[None], real.pack(before)[None], seen)
        shown.append(real.unpack_features(seen))
        found.append(labels.of(exit, h, run.ctx, spoken[0]))
    agree, targets = (torch.stack(part) for part in zip(*found, strict=True))
    return ExitBatch(real.mask, run.hidden, tuple(shown), agree, real.unpack(labels.target), targets)
