"""Estimators compared at the same agreement: teacher-forced over held-out text, under ``propagate``, costs included.

Agreement is the share of tokens equal to the full model's given the same prefix. Every point is *on policy*: the text
is decoded (in one pass) with exits on, so that tokens read the states that earlier exits left. A threshold is found
for each estimator along the curve of its trace without exits until the on-policy agreement meets the target; depth at
the target is interpolated between the two nearest measured points.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.generate import EarlyExit
from dynamax_llm.decoding.trace import Trace
from dynamax_llm.engines.base import DecodeStats
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.features import ConfidenceEstimator, exit_features
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.collect import collect_exits
from dynamax_llm.traces.curves import Curve, auroc, oracle_depth, sweep
from dynamax_llm.traces.simulate import depths, simulate_no_exit
from dynamax_llm.traces.teacher_forced import teacher_forced
from dynamax_llm.training.held_out import HeldOut

#: Measured points per judge while its threshold is looked for.
POINTS = 5


@dataclass(frozen=True)
class Candidate:
    """One way to judge: exits and, unless their heads do, the measure that judges."""

    name: str
    exits: Exits
    measure: str | None = None

    @property
    def estimator(self) -> ConfidenceEstimator:
        return self.exits.estimator(self.measure)

    @property
    def inputs(self) -> str:
        """What the estimator sees."""
        return "" if self.measure else "+".join(self.exits.config.inputs)


@dataclass(frozen=True)
class Outcome:
    """One judge at one threshold on the whole text. Depth is a share of the layers."""

    threshold: float
    agreement: float
    depth: float
    counted_reduction: float
    exit_counts: tuple[int, ...]  # tokens by the exit they left by, full depth last


@dataclass(frozen=True)
class Comparison:
    """One judge: its cost per check, how well it ranks, and where it lands at the target agreement."""

    candidate: Candidate
    target: float
    depth: float  # at the target, interpolated
    counted_reduction: float  # likewise
    points: tuple[Outcome, ...]
    auroc: tuple[float | None, ...]  # per exit, undisturbed
    parameters: int
    check_macs: int  # of the estimator alone
    read_macs: tuple[int, int]  # of what it reads at the first exit and at a later one, 0 if nothing


@torch.no_grad()
def compare(
    backbone: Backbone, candidates: Sequence[Candidate], batches: Sequence[Batch], target: float = 0.98
) -> tuple[list[Comparison], float]:
    """Every candidate at the target agreement on the same text, and the oracle's mean depth (undisturbed)."""
    truth = [full_depth_tokens(backbone, batch) for batch in batches]
    results, oracle = [], 1.0
    for candidate in candidates:
        if isinstance(candidate.estimator, nn.Module):
            candidate.estimator.to(backbone.device)
        curve, ranks, oracle = _no_exit(backbone, candidate, batches)
        points = _search(backbone, candidate, curve, batches, truth, target)
        depth, saved = (at_agreement(points, target, name) for name in ("depth", "counted_reduction"))
        results.append(Comparison(candidate, target, depth, saved, tuple(points), ranks, **_costs(backbone, candidate)))
    return results, oracle


def outcome(
    backbone: Backbone,
    candidate: Candidate,
    threshold: float,
    batches: Iterable[Batch],
    truth: Iterable[torch.Tensor],
) -> Outcome:
    """Decode every batch teacher-forced at ``threshold``; ``truth`` holds the full model's tokens (B, T)."""
    early = EarlyExit(candidate.exits, measure=candidate.measure, threshold=min(max(threshold, 0.0), 1.0))
    _, plan, costs = early.attach(backbone.model)
    agree, left = 0, []
    for batch, tokens in zip(batches, truth, strict=True):
        mask = batch.mask.to(backbone.device)
        found = teacher_forced(backbone, plan, batch.ids.to(backbone.device), early.thresholds.values)
        agree += int(((found.tokens == tokens) & mask).sum())
        left.append(found.exit_index[mask])
    exit_index = torch.cat(left).unsqueeze(0)
    trace = Trace(exit_index, costs, early.policy.name, DecodeStats(passes=int(costs.layers(exit_index).sum())))
    counts = tuple(trace.histogram.values())
    return Outcome(threshold, agree / trace.n_tokens, trace.mean_depth, trace.counted_reduction, counts)


@torch.no_grad()
def full_depth_tokens(backbone: Backbone, batch: Batch) -> torch.Tensor:
    """The full model's token (B, T) after every position of a batch."""
    h = backbone.embed(batch.ids.to(backbone.device))
    ctx = backbone.context(h)
    for index in range(backbone.n_layers):
        h = backbone.layer(index, h, None, ctx)
    return torch.stack([backbone.readout(row.unsqueeze(0))[0].argmax(-1) for row in h])


def _no_exit(
    backbone: Backbone, candidate: Candidate, batches: Sequence[Batch]
) -> tuple[Curve, tuple[float | None, ...], float]:
    """The curve of the trace in which no token leaves, AUROC per exit, and the oracle's depth as a share."""
    config, readout = candidate.exits.config, candidate.exits.readout(backbone)
    held = HeldOut(batches, lambda batch: collect_exits(backbone, readout, batch))
    scores, labels = [], []
    for item in held:
        scores.append(simulate_no_exit(candidate.estimator, item).confidence[:, item.mask])
        labels.append(item.labels[:, item.mask])
    trace, truth = torch.cat(scores, dim=1), torch.cat(labels, dim=1)
    ranks = tuple(auroc(score, label) for score, label in zip(trace, truth, strict=True))
    oracle = oracle_depth(truth, depths(config), config.n_layers) / config.n_layers
    return sweep(trace, truth, depths(config), config.n_layers), ranks, oracle


def _search(
    backbone: Backbone,
    candidate: Candidate,
    curve: Curve,
    batches: Sequence[Batch],
    truth: Sequence[torch.Tensor],
    target: float,
) -> list[Outcome]:
    """Measured points around the target: aim at an undisturbed agreement, see the true one, aim again."""
    aim, points, tried = target, [], set()
    for _ in range(POINTS):
        threshold = curve.depth_at(min(aim, 1.0))[1]
        threshold = 1.0 if threshold == float("inf") else threshold
        if threshold in tried:
            break
        tried.add(threshold)
        points.append(outcome(backbone, candidate, threshold, batches, truth))
        miss = target - points[-1].agreement
        aim += miss if abs(miss) > 1e-4 else 2e-3
        if len(points) >= 3 and min(abs(p.agreement - target) for p in points) < 5e-4 and _bracketed(points, target):
            break
    return sorted(points, key=lambda point: point.agreement)


def _bracketed(points: Sequence[Outcome], target: float) -> bool:
    return min(p.agreement for p in points) < target <= max(p.agreement for p in points)


def at_agreement(points: Sequence[Outcome], target: float, name: str) -> float:
    """The value of ``name`` at the target agreement, linear between the nearest points on either side.

    Full depth agrees entirely and saves nothing: it closes the curve above the highest measured point.
    """
    end = Outcome(1.0, 1.0, 1.0, 0.0, ())
    above = min((p for p in (*points, end) if p.agreement >= target), key=lambda p: (p.agreement, p.depth))
    below = max((p for p in points if p.agreement < target), key=lambda p: p.agreement, default=None)
    if below is None:
        return float(getattr(above, name))
    share = (target - below.agreement) / (above.agreement - below.agreement)
    return float(getattr(below, name) + share * (getattr(above, name) - getattr(below, name)))


def _costs(backbone: Backbone, candidate: Candidate) -> dict[str, Any]:
    estimator, readout = candidate.estimator, candidate.exits.readout(backbone)
    heads = candidate.exits.heads if candidate.measure is None else None
    return {
        "parameters": 0 if heads is None else sum(parameter.numel() for parameter in heads.parameters()),
        "check_macs": estimator.macs(0),
        "read_macs": (readout.read_macs(0), readout.read_macs(1)) if estimator.needs_logits else (0, 0),
    }


@torch.no_grad()
def check_microseconds(backbone: Backbone, candidate: Candidate) -> tuple[float, float, float]:
    """One check of one token in µs, CPU only: the estimator, its features at the first exit, at a later one.

    A look makes the features; for an estimator that reads no logits it is the cosine alone.
    """
    estimator, readout = candidate.estimator, candidate.exits.readout(backbone)
    h = torch.randn(1, 1, backbone.width, device=backbone.device, dtype=backbone.dtype)
    states = estimator.initial_state(1, backbone.device)
    state = None if states is None else states[0]
    unread = exit_features(h, h, None, None)
    first = readout.read(0, h, h, None)[0] if estimator.needs_logits else unread
    looks = [lambda: exit_features(h, h, None, None)] * 2
    if estimator.needs_logits:
        looks = [lambda: readout.read(0, h, h, None)[0], lambda: readout.read(1, h, h, first)[0]]
    check = _microseconds(lambda: estimator.confidence(0, h, first, state))
    return check, _microseconds(looks[0]), _microseconds(looks[1])


def _microseconds(call: Callable[[], object], rounds: int = 20, each: int = 10) -> float:
    """Least mean time of ``each`` calls over ``rounds``: what the call costs when nothing else runs."""
    best = float("inf")
    call()
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(each):
            call()
        best = min(best, (time.perf_counter() - start) / each)
    return best * 1e6
