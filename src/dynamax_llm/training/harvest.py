"""What one frozen full-depth forward tells about every exit: hidden states, statistics, labels.

Nothing is kept between batches, and logits exist for one slice of one exit at a time, so memory depends on the batch
alone. The states of attention and Mamba layers are those of full depth: labels describe an exit taken by one token
whose predecessors left intact states (``defer``); under ``propagate`` and ``copy`` they are an approximation.

Shapes: B rows, T tokens, E exits, d width, V vocabulary, n real (unpadded) tokens of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone, Context
from dynamax_llm.exits.confidence import Signals
from dynamax_llm.exits.readout import Readout, tokens_at_once
from dynamax_llm.training.data import Batch


@dataclass(frozen=True)
class Harvest:
    """One batch at every exit. Values at pads mean nothing."""

    mask: Tensor  # (B, T) bool, True at tokens
    hidden: tuple[Tensor, ...]  # E of (B, T, d)
    signals: tuple[Signals, ...]  # E of (B, T, F)
    labels: Tensor  # (E, B, T) bool: stopping here gives the full model's token
    target: Tensor  # (B, T) int64: the full model's argmax


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
def harvest(backbone: Backbone, readout: Readout, batch: Batch) -> Harvest:
    """Everything the exits of ``readout.config`` show on this batch.

    The label "action" is 1 iff what this exit does gives the full model's argmax: for ``head`` and ``lens``, iff
    its own argmax is that token; for ``tail``, iff the last k layers, run over h_e of the whole sequence, give it.
    "topk" is the paper's: 1 iff that token is among the label_k likeliest of final norm and LM head on h_e.
    """
    config = readout.config
    run = forward(backbone, config.layers, batch.ids)
    real = Packing.of(batch.mask, run.final.device)
    target = argmax(backbone, real.pack(run.final))  # (n,)
    values: list[Tensor] = []
    tokens: list[Tensor] = []
    labels: list[Tensor] = []
    seen: Signals | None = None
    for exit, (h, before) in enumerate(zip(run.hidden, run.before, strict=True)):
        packed = real.pack(h).unsqueeze(0)  # (1, n, d)
        seen, spoken = readout.signals(exit, packed, real.pack(before).unsqueeze(0), seen)
        assert seen.token is not None  # this readout was read
        values.append(seen.values[0])
        tokens.append(seen.token[0])
        if config.label == "topk":
            labels.append(among_top(backbone, packed[0], target, config.label_k))
        elif config.readout == "tail":
            through = h
            for index in range(backbone.n_layers - config.tail_layers, backbone.n_layers):
                through = backbone.layer(index, through, None, run.ctx)
            labels.append(argmax(backbone, real.pack(through)) == target)
        else:
            labels.append(spoken[0] == target)
    return Harvest(
        mask=real.mask,
        hidden=run.hidden,
        signals=tuple(
            Signals(real.unpack(value), real.unpack(token)) for value, token in zip(values, tokens, strict=True)
        ),
        labels=torch.stack([real.unpack(label) for label in labels]),
        target=real.unpack(target),
    )


@dataclass(frozen=True)
class Packing:
    """A batch's real tokens side by side, and back. Where they lie is found on the CPU: no device is waited for."""

    mask: Tensor  # (B, T) bool, True at tokens
    places: Tensor | None  # (n,) of the real tokens among all B T; None where all are real

    @classmethod
    def of(cls, mask: Tensor, device: torch.device) -> Packing:
        """For a mask (B, T) on the CPU, and values on ``device``."""
        places = None if bool(mask.all()) else mask.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
        return cls(mask.to(device, non_blocking=True), places)

    def pack(self, values: Tensor) -> Tensor:
        """The real tokens (n, ...) of values (B, T, ...)."""
        rows = values.flatten(0, 1)
        return rows if self.places is None else rows[self.places]

    def unpack(self, values: Tensor) -> Tensor:
        """Inverse of ``pack``, zero at pads."""
        if self.places is not None:
            values = values.new_zeros(self.mask.numel(), *values.shape[1:]).index_copy_(0, self.places, values)
        return values.unflatten(0, self.mask.shape)


def slices(backbone: Backbone, count: int) -> list[slice]:
    """Runs of ``count`` tokens whose logits may exist at once."""
    step = tokens_at_once(backbone)
    return [slice(start, start + step) for start in range(0, count, step)]


def argmax(backbone: Backbone, h: Tensor) -> Tensor:
    """The token (n,) that final norm and LM head give for h (n, d)."""
    return torch.cat([backbone.readout(h[None, run])[0].argmax(-1) for run in slices(backbone, len(h))])


def among_top(backbone: Backbone, h: Tensor, target: Tensor, k: int) -> Tensor:
    """Whether ``target`` (n,) is among the k likeliest tokens that final norm and LM head give for h (n, d)."""
    found = []
    for run in slices(backbone, len(h)):
        logits = backbone.readout(h[None, run])[0]  # (slice, V)
        found.append((logits > logits.gather(-1, target[run, None])).sum(-1) < k)
    return torch.cat(found)
