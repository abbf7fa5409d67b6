"""What every exit shows of a batch, and the labels heads learn: one frozen forward at full depth.

Nothing is kept between batches, and logits exist for one slice of one exit at a time, so memory depends on the batch
alone. The states of attention and Mamba layers are those of full depth: labels describe an exit taken by one token
whose predecessors left intact states (``defer``). ``on_policy`` collects the same with exits on, under ``propagate``.

Shapes: B rows, T tokens, E exits, d width, F features, L layers, n real (unpadded) tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.exits.features import ExitFeatures
from dynamax_llm.exits.readouts.base import Readout
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.labels import ACTION, Label, LabelMaker


@dataclass(frozen=True)
class Packing:
    """A batch's real tokens side by side, and back. Positions are computed on the CPU: the device is not waited for."""

    mask: Tensor  # (B, T) bool, True at tokens
    positions: Tensor | None  # (n,) of the real tokens among all B T; None where all are real

    @classmethod
    def of(cls, mask: Tensor, device: torch.device) -> Packing:
        """For a mask (B, T) on the CPU, and values on ``device``."""
        positions = None if bool(mask.all()) else mask.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
        return cls(mask.to(device, non_blocking=True), positions)

    def pack(self, values: Tensor) -> Tensor:
        """The real tokens (n, ...) of values (B, T, ...)."""
        rows = values.flatten(0, 1)
        return rows if self.positions is None else rows[self.positions]

    def unpack(self, values: Tensor) -> Tensor:
        """Inverse of ``pack``, zero at pads."""
        if self.positions is not None:
            values = values.new_zeros(self.mask.numel(), *values.shape[1:]).index_copy_(0, self.positions, values)
        return values.unflatten(0, self.mask.shape)

    def unpack_features(self, features: ExitFeatures) -> ExitFeatures:
        """What heads read of features (1, n, ...), as (B, T, ...)."""
        token, rows = (None if part is None else self.unpack(part[0]) for part in (features.token, features.rows))
        return ExitFeatures(self.unpack(features.values[0]), token, rows=rows)


@dataclass(frozen=True)
class ExitBatch:
    """One batch at every exit. Values at pads are undefined."""

    mask: Tensor  # (B, T) bool, True at tokens
    hidden: tuple[Tensor, ...]  # E of (B, T, d)
    features: tuple[ExitFeatures, ...]  # E of (B, T, F)
    labels: Tensor  # (E, B, T) bool: stopping here agrees with the full model (see ``labels``)
    target: Tensor  # (B, T) int64: the full model's argmax
    targets: Tensor  # (E, B, T) float32 in [0, 1]: what heads learn, the labels or their soft kind

    @property
    def nbytes(self) -> int:
        """Memory of what grows with the backbone's width."""
        rows = [features.rows for features in self.features if features.rows is not None]
        return sum(part.nbytes for part in (*self.hidden, *rows))


class Collector:
    """Builds the ExitBatch of one batch, exit after exit."""

    def __init__(self, backbone: Backbone, readout: Readout, batch: Batch, final: Tensor, label: Label) -> None:
        """``final`` (B, T, d): the full model's hidden state after its last layer."""
        self.backbone, self.readout, self.ids = backbone, readout, batch.ids
        self.packing = Packing.of(batch.mask, final.device)
        self._maker = LabelMaker(backbone, readout, self.packing.pack(final), label)
        self._hidden: list[Tensor] = []
        self._features: list[ExitFeatures] = []
        self._labels: list[tuple[Tensor, Tensor]] = []  # agreement and target, (n,) each

    def add(self, h: Tensor, moved: Tensor, features: ExitFeatures, tokens: Tensor) -> None:
        """The next exit: h, h as its readout transforms it, and features (B, T, ...), and the argmax (n,) of its
        readout at real tokens."""
        exit, packed = len(self._hidden), self.packing.pack
        self._hidden.append(moved if self.readout.heads_read_output else h)
        self._features.append(features)
        read = packed(moved)
        if self.readout.tail_layers:
            read = packed(_through_tail(self.backbone, self.readout.tail_layers, self.ids, h))
        self._labels.append(self._maker.of(exit, packed(h), tokens, read))

    def finish(self) -> ExitBatch:
        """The batch at every exit added."""
        unpack = self.packing.unpack
        labels, targets = (torch.stack([unpack(part) for part in kind]) for kind in zip(*self._labels, strict=True))
        full = unpack(self._maker.full_tokens)
        return ExitBatch(self.packing.mask, tuple(self._hidden), tuple(self._features), labels, full, targets)


def _through_tail(backbone: Backbone, layers: int, ids: Tensor, h: Tensor) -> Tensor:
    """h (B, T, d) of an exit after the backbone's last ``layers`` layers, run over the whole sequence."""
    ctx = backbone.context(backbone.embed(ids.to(backbone.device)))
    for index in range(backbone.n_layers - layers, backbone.n_layers):
        h = backbone.layer(index, h, None, ctx)
    return h


@dataclass(frozen=True)
class Forward:
    """h at every exit, and h before the layer that made it, E of (B, T, d) each; ``final`` after the last layer."""

    hidden: tuple[Tensor, ...]
    before: tuple[Tensor, ...]
    final: Tensor


@torch.no_grad()
def forward(backbone: Backbone, layers: tuple[int, ...], ids: Tensor) -> Forward:
    """Run ids (B, T) through every layer, keeping h at the exits after ``layers``. Right pads need no mask."""
    hidden, before = [], []
    last = h = ids  # replaced by the embeddings
    for depth, h in backbone.hidden_states(ids):
        if depth in layers:
            hidden.append(h)
            before.append(last)
        last = h
    return Forward(tuple(hidden), tuple(before), h)


@torch.no_grad()
def hidden_at(backbone: Backbone, depths: Iterable[int], ids: Tensor) -> dict[int, Tensor]:
    """h (B, T, d) of whole texts ids (B, T) after each of ``depths`` (0: the embeddings) and after the last layer."""
    wanted = {*depths, backbone.n_layers}
    return {depth: h for depth, h in backbone.hidden_states(ids) if depth in wanted}


@torch.no_grad()
def collect_exits(backbone: Backbone, readout: Readout, batch: Batch, label: Label = ACTION) -> ExitBatch:
    """What the exits of ``readout.config`` show of this batch with every state intact, and the labels of one kind."""
    run = forward(backbone, readout.config.layers, batch.ids)
    collector = Collector(backbone, readout, batch, run.final, label)
    pack = collector.packing.pack
    features: ExitFeatures | None = None
    for exit, (h, before) in enumerate(zip(run.hidden, run.before, strict=True)):
        moved, _ = readout.transform(exit, h)
        features, tokens = readout.features(exit, pack(h)[None], pack(before)[None], features, pack(moved)[None])
        collector.add(h, moved, collector.packing.unpack_features(features), tokens[0])
    return collector.finish()
