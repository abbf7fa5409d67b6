"""A path of thresholds, one per exit, along one parameter λ from "never leave" (0) to "leave as soon as may be" (1).

Learnt on sequences that calibration does not use again, from the trace in which no token leaves: what every token
showed at every exit, and whether leaving there would have agreed. Two families are compared. *Common*: one threshold
for all exits. *Balanced*: beginning at "never", the exit whose lowered threshold costs the fewest disagreements per
layer saved goes next, so that at every λ the exits pay the same for a layer. Whichever has the smaller depth at the
aim on tokens that it was not fitted to is kept.

What the trace cannot show is what a token that leaves does to later ones through its approximate state. That is
measured once per exit and charged to every token that leaves there. An error in it costs depth, never validity: bounds
are taken from losses measured under the policy. Along a path no threshold ever rises with λ, so on a fixed trace depth
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
Bars = tuple[float | None, ...]

#: How many levels an exit may be lowered by at once: single ones are noisy where few tokens disagree.
STRIDES = (1, 2, 4, 8)
FAMILIES = ("balanced", "common")


@dataclass(frozen=True)
class Trace:
    """What N tokens showed at E exits when none left: ``confidence`` (E, N) float64, ``agrees`` (E, N) bool; ``halves``
    (N,) bool splits them by sequence. ``layers`` are the depths at which they would have left. ``drift_penalty`` (E,):
    disagreements that a token which leaves there causes among later ones, through the state it leaves behind."""

    confidence: Tensor
    agrees: Tensor
    halves: Tensor
    layers: tuple[int, ...]
    n_layers: int
    drift_penalty: tuple[float, ...] = ()

    @property
    def most(self) -> float:
        """Share of the depth that is saved if every token leaves at the first exit."""
        return 1.0 - self.layers[0] / self.n_layers

    def half(self, second: bool) -> Trace:
        """The tokens of the first or of the second half of the sequences."""
        kept = self.halves == second
        return replace(self, confidence=self.confidence[:, kept], agrees=self.agrees[:, kept], halves=self.halves[kept])

    def outcome(self, thresholds: Sequence[float | None]) -> tuple[float, float]:
        """(share of tokens expected to disagree, mean depth as a share) if tokens left at these thresholds."""
        bars = torch.tensor([float("inf") if bar is None else bar for bar in thresholds], dtype=torch.float64)
        return _outcome(self, bars)


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
    backbone: Backbone, readout: Readout, estimator: ConfidenceEstimator, batches: Sequence[Batch], counted: Tensor
) -> Trace:
    """The trace of right-padded batches; ``counted`` (rows in all,) holds each row's first position that may leave."""
    confidence, agrees, halves, row = [], [], [], 0
    for batch in batches:
        seen = collect_exits(backbone, readout, batch)
        rows = torch.arange(row, row + len(batch.ids))
        row += len(batch.ids)
        mask = batch.mask & (torch.arange(batch.ids.shape[1]) >= counted[rows].unsqueeze(1))
        on = mask.to(seen.labels.device)
        confidence.append(simulate_no_exit(estimator, seen).confidence[:, on].double().cpu())
        agrees.append(seen.labels[:, on].cpu())
        halves.append((rows % 2 == 1).unsqueeze(1).expand_as(mask)[mask])
    config = readout.config
    return Trace(
        torch.cat(confidence, dim=1), torch.cat(agrees, dim=1), torch.cat(halves), depths(config), config.n_layers
    )


def learn_path(trace: Trace, aim: float, parameters: Sequence[float]) -> Path:
    """The better family's points at the λ in ``parameters``; "never" (λ = 0) is none of them, and none comes twice.

    The families are compared by their least depth on one half of the sequences at which no more than a share ``aim``
    of its tokens disagrees, both fitted to the other half.
    """
    fitted, judged = trace.half(False), trace.half(True)
    scores = {}
    for family in FAMILIES:
        found = [judged.outcome(bars) for bars in _thresholds(family, fitted, parameters)]
        scores[family] = min((depth for error, depth in found if error <= aim), default=1.0)
    best = min(FAMILIES, key=lambda family: scores[family])
    points = []
    for bars in _thresholds(best, trace, parameters):
        error, depth = trace.outcome(bars)
        points.append(Point((1.0 - depth) / trace.most, bars, error, depth))
    return Path(best, tuple(points))


def _thresholds(family: str, trace: Trace, parameters: Sequence[float]) -> list[Bars]:
    """For every λ, rising, the riskiest thresholds of the family that save no more than this; each once."""
    if family == "balanced":
        walked = _balanced(trace)
    else:
        curve = sweep(trace.confidence, trace.agrees, trace.layers, trace.n_layers)
        every = zip(curve.thresholds.tolist(), curve.depth.tolist(), strict=True)
        common = [((bar,) * len(trace.layers), 1.0 - depth / trace.n_layers) for bar, depth in every if bar <= 1.0]
        walked = list(reversed(common))
    saved = [share / trace.most for _, share in walked]  # rising
    places = [bisect.bisect_right(saved, limit + 1e-9) - 1 for limit in sorted(parameters)]
    return [walked[place][0] for place in dict.fromkeys(places) if place >= 0]


def _balanced(trace: Trace) -> list[tuple[Bars, float]]:
    """Thresholds with the share of the depth they save: the cheapest exit's is lowered, again and again."""
    exits, count = trace.confidence.shape
    ranks = torch.linspace(0, count - 1, LEVELS + 1)[1:].long()
    levels = trace.confidence.sort(dim=1, descending=True).values[:, ranks]  # (E, LEVELS), falling
    levels = torch.cat((torch.full((exits, 1), torch.inf, dtype=torch.float64), levels), dim=1)
    place = [0] * exits
    error, depth = 0.0, 1.0
    walked: list[tuple[Bars, float]] = []
    while True:
        best: tuple[float, float, list[int], float, float] | None = None
        for index in range(exits):
            for stride in STRIDES:
                if place[index] + stride > LEVELS:
                    break
                tried = [*place[:index], place[index] + stride, *place[index + 1 :]]
                worse, shallower = _outcome(trace, torch.stack([levels[e, at] for e, at in enumerate(tried)]))
                saved = depth - shallower
                # What saves nothing (its tokens have left before) is taken only when nothing else is left.
                price = (worse - error) / saved if saved > 1e-12 else torch.inf
                if best is None or (price, -saved) < best[:2]:
                    best = (price, -saved, tried, worse, shallower)
        if best is None:
            return walked
        _, _, place, error, depth = best
        bars = tuple(None if at == 0 else float(levels[e, at]) for e, at in enumerate(place))
        walked.append((bars, 1.0 - depth))


def _outcome(trace: Trace, bars: Tensor) -> tuple[float, float]:
    """(share of tokens expected to disagree, mean depth) at thresholds ``bars`` (E,), infinite for never."""
    leaves = trace.confidence >= bars.unsqueeze(1)
    everyone = torch.cat((leaves, torch.ones_like(leaves[:1])))
    where = everyone.int().argmax(0, keepdim=True)  # the first exit that lets the token go
    right = torch.cat((trace.agrees, torch.ones_like(trace.agrees[:1])))
    layers = torch.tensor([*trace.layers, trace.n_layers], dtype=torch.float64)
    wrong = 1.0 - float(right.gather(0, where).double().mean())
    for index, drift_penalty in enumerate(trace.drift_penalty):
        wrong += drift_penalty * float((where == index).double().mean())
    return wrong, float(layers[where].mean()) / trace.n_layers
