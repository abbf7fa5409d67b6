"""How good a model's layers are on held-out text: the figures before and after a tuning.

Everything is teacher-forced with intact states, as in ``training.held_out``; agreement at a layer is with the same
model's own last layer.

Shapes: N tokens that have a next one, L layers, E exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamax_llm.backbones import Backbone
from dynamax_llm.errors import BackboneError
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.curves import oracle_depth, sweep
from dynamax_llm.traces.labels import slices
from dynamax_llm.training.multi_exit import depth_weights


@dataclass(frozen=True)
class Figures:
    """Losses in nats per token of the next-token cross-entropy; depths as shares of all layers."""

    tokens: int
    loss: float  # of the full model
    loss_per_layer: tuple[float, ...]  # L
    agreement_per_layer: tuple[float, ...]  # L, the last is 1
    exit_loss: float  # of the trained exits, weighted by depth
    oracle_depth: float  # leaving at the first of all layers that agrees
    oracle_depth_at_exits: float  # at the first of the trained exits that agrees
    margin_depth: float  # of the margin rule at the trained exits, at ``agreement``
    agreement: float
    choices: Tensor  # (N,) int64, CPU: the full model's tokens

    def to_json(self) -> dict[str, Any]:
        """All but the tokens themselves, as JSON types."""
        return {name: value for name, value in asdict(self).items() if name != "choices"}


@torch.no_grad()
def measure(backbone: Backbone, batches: Sequence[Batch], layers: tuple[int, ...], agreement: float) -> Figures:
    """The figures of a model on these batches, with exits after ``layers`` and the margin rule at ``agreement``.

    Raises BackboneError for a model that gives NaN or infinity.
    """
    parts = [_read(backbone, batch) for batch in batches]
    losses, tokens, margins = (torch.cat(group, dim=1) for group in zip(*parts, strict=True))  # (L, N) each
    if not bool(losses.isfinite().all()):
        raise BackboneError(
            f"a layer of this {backbone.model_type} gives no numbers (NaN or infinity) on this text in "
            f"{backbone.dtype}: load it in float32, or use another checkpoint."
        )
    same = tokens == tokens[-1]
    chosen = torch.tensor(layers) - 1
    n_layers, per_layer = backbone.n_layers, losses.mean(1).tolist()
    every = tuple(range(1, n_layers))
    margin, _ = sweep(margins[chosen], same[chosen], layers, n_layers).depth_at(agreement)
    return Figures(
        tokens=tokens.shape[1],
        loss=per_layer[-1],
        loss_per_layer=tuple(per_layer),
        agreement_per_layer=tuple(same.double().mean(1).tolist()),
        exit_loss=sum(w * per_layer[e - 1] for w, e in zip(depth_weights(layers), layers, strict=True)),
        oracle_depth=oracle_depth(same[:-1], every, n_layers) / n_layers,
        oracle_depth_at_exits=oracle_depth(same[chosen], layers, n_layers) / n_layers,
        margin_depth=margin / n_layers,
        agreement=agreement,
        choices=tokens[-1],
    )


def _read(backbone: Backbone, batch: Batch) -> tuple[Tensor, ...]:
    """Per layer and token of a batch (L, n), on the CPU: cross-entropy in float64, the likeliest token, its margin."""
    layers = []
    for depth, h in backbone.hidden_states(batch.ids):
        if depth == 0:
            continue
        counted = batch.mask[:, 1:].to(h.device)
        layers.append(_read_layer(backbone, h[:, :-1][counted], batch.ids[:, 1:].to(h.device)[counted]))
    return tuple(torch.stack(group) for group in zip(*layers, strict=True))


def _read_layer(backbone: Backbone, rows: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The same of one layer's rows (n, d)."""
    parts = []
    for piece in slices(backbone, len(rows)):
        logits = backbone.readout(rows[None, piece])[0]
        loss = F.cross_entropy(logits, targets[piece], reduction="none").double()
        top = torch.softmax(logits, -1).topk(2)
        parts.append((loss.cpu(), logits.argmax(-1).cpu(), (top.values[:, 0] - top.values[:, 1]).cpu()))
    return tuple(torch.cat(group) for group in zip(*parts, strict=True))
