"""A path of thresholds, one per exit, along one parameter λ from "never leave" (0) to "leave at the first exit" (1).

Learnt on sequences that calibration does not use again, from the trace in which no token leaves. Two families are
compared. *Common*: one threshold for all exits. *Balanced*: beginning at "never", the exit whose lowered threshold
costs the fewest disagreements per layer saved goes next, so that at every λ the exits pay the same for a layer. The
family with the smaller depth at the target, on tokens that it was not fitted to, is taken.

The trace does not contain what a token that leaves causes among later ones through its approximate state; that is the
drift penalty, charged to every token that leaves at an exit. An error in it costs depth, never validity: bounds are
taken from losses measured under the policy. Along a path no threshold ever rises with λ, so on a fixed trace depth
never does.

Shapes: E exits, N tokens.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.readouts.base import Readout
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.collect import collect_exits
from dynamax_llm.traces.curves import sweep
from dynamax_llm.traces.simulate import depths, simulate_no_exit

#: Thresholds an exit may have in the balanced family: quantiles of its confidences.
LEVELS = 128
PathThresholds = tuple[float | None, ...]
#: How many levels an exit may be lowered by at once: single ones are noisy where few tokens disagree.
STRIDES = (1, 2, 4, 8)
FAMILIES = ("balanced", "common")


@dataclass(frozen=True)
class Trace:
    """N tokens at E exits when none left: ``confidence`` (E, N) float64, ``agrees`` (E, N) bool; ``halves`` (N,) bool
    splits them by sequence. ``layers`` are the depths at which they would have left. ``drift_penalty`` (E,), or empty:
    later disagreements caused by a token that leaves there."""

    confidence: Tensor
    agrees: Tensor
    halves: Tensor
    layers: tuple[int, ...]
    n_layers: int
    drift_penalty: tuple[float, ...] = ()

    @property
    def most_saved(self) -> float:
        """Share of the depth that is saved if every token leaves at the first exit."""
        return 1.0 - self.layers[0] / self.n_layers

    def half(self, second: bool) -> Trace:
        """The tokens of the first or of the second half of the sequences."""
        part = self.halves == second
        return replace(self, confidence=self.confidence[:, part], agrees=self.agrees[:, part], halves=self.halves[part])

    def outcome(self, thresholds: Sequence[float | None] | Tensor) -> tuple[float, float]:
        """(share of tokens expected to disagree, mean depth as a share) if tokens left at these thresholds (E,), None
        or infinity for never."""
        if not isinstance(thresholds, Tensor):
            finite = [float("inf") if value is None else value for value in thresholds]
            thresholds = torch.tensor(finite, dtype=torch.float64)
        leaves = self.confidence >= thresholds.unsqueeze(1)
        exit_index = torch.cat((leaves, torch.ones_like(leaves[:1]))).int().argmax(0, keepdim=True)
        agrees = torch.cat((self.agrees, torch.ones_like(self.agrees[:1])))
        layers = torch.tensor([*self.layers, self.n_layers], dtype=torch.float64)
        error = 1.0 - float(agrees.gather(0, exit_index).double().mean())
        for index, penalty in enumerate(self.drift_penalty):
            error += penalty * float((exit_index == index).double().mean())
        return error, float(layers[exit_index].mean()) / self.n_layers


@dataclass(frozen=True)
class Point:
    """One place on a path. ``error`` (expected) and ``depth`` are shares on the path's own trace."""

    parameter: float  # λ: share of the depth that could be saved there, saved
    thresholds: tuple[float | None, ...]
    error: float
    depth: float


@dataclass(frozen=True)
class Path:
    """Points from safe to risky, thresholds never rising; ``family`` is "balanced" or "common"."""

    family: str
    points: tuple[Point, ...]


@torch.no_grad()
def trace_of(
    backbone: Backbone, readout: Readout, estimator: ConfidenceEstimator, batches: Sequence[tuple[Batch, int]]
) -> Trace:
    """The trace of right-padded batches, each with the tokens of its rows' prompts, where no token may leave."""
    confidence, agrees, halves, row = [], [], [], 0
    for batch, prompt in batches:
        shown = collect_exits(backbone, readout, batch)
        counted = batch.mask.clone()
        counted[:, :prompt] = False
        on_device = counted.to(shown.labels.device)
        confidence.append(simulate_no_exit(estimator, shown).confidence[:, on_device].double().cpu())
        agrees.append(shown.labels[:, on_device].cpu())
        rows = torch.arange(row, row + len(batch.ids))
        halves.append((rows % 2 == 1).unsqueeze(1).expand_as(counted)[counted])
        row += len(batch.ids)
    config = readout.config
    return Trace(
        torch.cat(confidence, dim=1), torch.cat(agrees, dim=1), torch.cat(halves), depths(config), config.n_layers
    )


def learn_path(trace: Trace, target: float, parameters: Sequence[float]) -> Path:
    """The better family's points at the λ in ``parameters``, without "never" (λ = 0) and without repetition.

    The families are compared by their least depth on one half of the sequences at which no more than a share ``target``
    of its tokens disagrees, both fitted to the other half.
    """
    fitted, compared = trace.half(False), trace.half(True)
    scores = {}
    for family in FAMILIES:
        outcomes = [compared.outcome(thresholds) for thresholds in _thresholds(family, fitted, parameters)]
        scores[family] = min((depth for error, depth in outcomes if error <= target), default=1.0)
    best = min(FAMILIES, key=lambda family: scores[family])
    points = []
    for thresholds in _thresholds(best, trace, parameters):
        error, depth = trace.outcome(thresholds)
        points.append(Point((1.0 - depth) / trace.most_saved, thresholds, error, depth))
    return Path(best, tuple(points))


def _thresholds(family: str, trace: Trace, parameters: Sequence[float]) -> list[PathThresholds]:
    """For every λ, rising, the riskiest thresholds of the family that save no more than this; each once."""
    if family == "balanced":
        candidates = _balanced(trace)
    else:
        curve = sweep(trace.confidence, trace.agrees, trace.layers, trace.n_layers)
        pairs = zip(curve.thresholds.tolist(), curve.depth.tolist(), strict=True)
        common = [((value,) * len(trace.layers), 1.0 - depth / trace.n_layers) for value, depth in pairs if value <= 1]
        candidates = list(reversed(common))
    saved = [share / trace.most_saved for _, share in candidates]  # rising
    indices = [bisect.bisect_right(saved, limit + 1e-9) - 1 for limit in sorted(parameters)]
    return [candidates[index][0] for index in dict.fromkeys(indices) if index >= 0]


def _balanced(trace: Trace) -> list[tuple[PathThresholds, float]]:
    """Thresholds with the share of the depth they save: the exit with the lowest price is lowered, again and again."""
    exits, count = trace.confidence.shape
    ranks = torch.linspace(0, count - 1, LEVELS + 1)[1:].long()
    levels = trace.confidence.sort(dim=1, descending=True).values[:, ranks]  # (E, LEVELS), falling
    levels = torch.cat((torch.full((exits, 1), torch.inf, dtype=torch.float64), levels), dim=1)
    current = [0] * exits  # each exit's level
    error, depth = 0.0, 1.0
    steps: list[tuple[PathThresholds, float]] = []
    while True:
        best: tuple[float, float, list[int], float, float] | None = None
        for index in range(exits):
            for stride in STRIDES:
                if current[index] + stride > LEVELS:
                    break
                lowered = [*current[:index], current[index] + stride, *current[index + 1 :]]
                worse, shallower = trace.outcome(torch.stack([levels[e, level] for e, level in enumerate(lowered)]))
                saved = depth - shallower
                # What saves nothing (its tokens have left before) is taken only when nothing else is left.
                price = (worse - error) / saved if saved > 1e-12 else torch.inf
                if best is None or (price, -saved) < best[:2]:
                    best = (price, -saved, lowered, worse, shallower)
        if best is None:
            return steps
        _, _, current, error, depth = best
        thresholds = tuple(None if level == 0 else float(levels[e, level]) for e, level in enumerate(current))
        steps.append((thresholds, 1.0 - depth))
