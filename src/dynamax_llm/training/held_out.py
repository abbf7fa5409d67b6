"""How good exits are on text they were not trained on: loss, AUROC, and depth at a given agreement.

Shapes: E exits, N held-out tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, count
from typing import Any

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.generate import EarlyExit
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.progress import Advance, unwatched
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.collect import ExitBatch, collect_exits
from dynamax_llm.traces.curves import auroc, oracle_depth, sweep
from dynamax_llm.traces.simulate import NEVER, ThresholdSample, depths, simulate_exits, simulate_no_exit
from dynamax_llm.traces.teacher_forced import teacher_forced
from dynamax_llm.traces.thresholds import shallowest, threshold_for_agreement
from dynamax_llm.training.learner import loss
from dynamax_llm.training.parallel import ALONE, Group

#: Exit batches of a held-out split that fit into this are kept; others are collected again at every evaluation.
KEPT_BYTES = 256 * 2**20
#: Thresholds at most that ``on_policy`` applies.
ON_POLICY_POINTS = 12
#: Held-out tokens decoded with exits on for the closing report, how often at most, and how close to the target.
DECODED_TOKENS, DECODED_POINTS, DECODED_TOLERANCE = 5_000, 7, 5e-4


class HeldOut:
    """The held-out batches; iterate to get the ExitBatch of every one in this process's share."""

    def __init__(self, batches: Sequence[Batch], collect: Callable[[Batch], ExitBatch], group: Group = ALONE) -> None:
        self.batches, self._collect, self.group = batches, collect, group
        self.share = range(group.rank, len(batches), group.size)
        self._kept: list[ExitBatch] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all processes' batches."""
        return sum(batch.tokens for batch in self.batches)

    def __iter__(self) -> Iterator[ExitBatch]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[ExitBatch] = []
        size = 0
        for index in self.share:
            exit_batch = self._collect(self.batches[index])
            size += exit_batch.nbytes
            if size <= KEPT_BYTES:
                kept.append(exit_batch)
            yield exit_batch
        if size <= KEPT_BYTES:
            self._kept = kept


@torch.no_grad()
def evaluate(
    estimators: dict[str, ExitHeads],
    weights: dict[str, Tensor],
    held: HeldOut,
    config: ExitConfig,
    no_exit_share: float,
    agreement: float,
    collect_on_policy: Callable[[ConfidenceEstimator, Batch, ThresholdSample], ExitBatch] | None = None,
) -> dict[str, dict[str, Any]]:
    """Per estimator: loss on a fixed sample of thresholds; on the trace in which no token leaves, AUROC and depth.

    ``weights`` are each estimator's class weights. With ``collect_on_policy`` the loss is on what that collects. Depth
    at an agreement is exact for a head without memory; for a recurrent one the confidences are those of tokens whose
    predecessors did not leave (``on_policy`` is exact, and costs more).
    """
    losses = {name: [0.0] * len(held.batches) for name in estimators}
    counts = [0.0] * len(held.batches)
    labels: dict[int, Tensor] = {}
    traces: dict[str, dict[int, Tensor]] = {name: {} for name in estimators}
    generator = torch.Generator().manual_seed(0)
    samples: list[ThresholdSample] = []
    for index, exit_batch in zip(held.share, held, strict=True):
        while len(samples) <= index:  # drawn for every batch, so that all processes draw the same
            samples.append(ThresholdSample.sample(held.batches[len(samples)].mask, no_exit_share, generator))
        sample, mask = samples[index], exit_batch.mask
        labels[index], counts[index] = exit_batch.labels[:, mask].float(), float(mask.sum())
        for name, heads in estimators.items():
            learned = collect_on_policy(heads, held.batches[index], sample) if collect_on_policy else exit_batch
            losses[name][index] = float(loss(simulate_exits(heads, learned, sample), learned.targets, weights[name]))
            traces[name][index] = simulate_no_exit(heads, exit_batch).confidence[:, mask]
    tokens = [round(count) for count in held.group.totals(*counts)]
    device = next(iter(estimators.values())).prior.device
    agrees = _whole(labels, tokens, len(config.layers), held.group, device).bool()
    reports = {}
    for name, trace in traces.items():
        totals = held.group.totals(*losses[name])
        mean = math.fsum(value * count for value, count in zip(totals, tokens, strict=True)) / max(sum(tokens), 1)
        whole = _whole(trace, tokens, len(config.layers), held.group, device)
        reports[name] = {"loss": mean, **_trace_report(whole, agrees, config, agreement)}
    return reports


def _whole(parts: dict[int, Tensor], tokens: list[int], exits: int, group: Group, device: torch.device) -> Tensor:
    """(E, N) over all batches, of ``tokens`` tokens each, from this process's (E, n) by batch and the others'."""
    whole = torch.zeros(exits, sum(tokens), device=device)
    ends = list(accumulate(tokens))
    for index, part in parts.items():
        whole[:, ends[index] - tokens[index] : ends[index]] = part
    return group.sum(whole)


def _trace_report(trace: Tensor, labels: Tensor, config: ExitConfig, agreement: float) -> dict[str, Any]:
    depth, threshold = sweep(trace, labels, depths(config), config.n_layers).depth_at(agreement)
    return {
        "depth": depth / config.n_layers,
        "threshold": threshold,
        "agreement": agreement,
        "auroc": [auroc(scores, label) for scores, label in zip(trace, labels, strict=True)],  # None: one class only
        "base_rate": [float(label.double().mean()) for label in labels],
        "oracle_depth": oracle_depth(labels, depths(config), config.n_layers) / config.n_layers,
        "tokens": labels.shape[1],
    }


@dataclass(frozen=True)
class Decoded:
    """Held-out text at one threshold: shares of the depth, of tokens that agree, and of multiply-accumulates saved."""

    threshold: float
    depth: float
    agreement: float
    counted_reduction: float | None = None


@torch.no_grad()
def apply_threshold(
    estimator: ConfidenceEstimator,
    held: HeldOut,
    config: ExitConfig,
    threshold: float,
    step: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """(mean depth as a share, agreement) when every exit compares ``estimator`` with this threshold; ``step`` is called
    after each batch."""
    shares = torch.tensor([*depths(config), config.n_layers], dtype=torch.float64) / config.n_layers
    depth, agree, tokens = 0.0, 0, 0
    for exit_batch in held:
        sample = ThresholdSample.fixed(len(exit_batch.mask), threshold)
        exit_index = simulate_exits(estimator, exit_batch, sample).exit_index[exit_batch.mask].cpu()
        labels = exit_batch.labels[:, exit_batch.mask].cpu()
        depth += float(shares[exit_index].sum())
        agree += int(torch.cat((labels, torch.ones_like(labels[:1]))).gather(0, exit_index[None]).sum())
        tokens += len(exit_index)
        step()
    depth, agreed, count = held.group.totals(depth, agree, tokens)
    return depth / count, agreed / count


def on_policy(
    estimator: ConfidenceEstimator,
    held: HeldOut,
    config: ExitConfig,
    agreement: float,
    advance: Advance = unwatched,
) -> dict[str, float]:
    """Lowest depth found, with its threshold, at no less than this agreement, by bisection; later exits read, and
    recurrent heads remember, tokens that leave as they were when they left. ``advance`` counts batches."""
    step = _steps(advance, ON_POLICY_POINTS * len(held.share))

    def measure(threshold: float) -> Decoded:
        return Decoded(threshold, *apply_threshold(estimator, held, config, threshold, step))

    points = threshold_for_agreement(measure, agreement, steps=ON_POLICY_POINTS)
    best = shallowest(points, agreement) or Decoded(NEVER, 1.0, 1.0)
    return {"depth": best.depth, "agreement": best.agreement, "threshold": best.threshold}


def _steps(advance: Advance, total: int) -> Callable[[], None]:
    """A function that moves ``advance`` by one step of ``total`` at each call."""
    done = count(1)
    return lambda: advance(next(done), total)


@torch.no_grad()
def decoded_report(
    backbone: Backbone, exits: Exits, batches: Sequence[Batch], target: float, advance: Advance = unwatched
) -> dict[str, Any]:
    """What decoding with exits on, under ``propagate``, gives on held-out text, for the record of a training.

    ``advance`` counts passes over a batch. ``best`` is the shallowest point found with at least ``target`` agreement,
    None where there is none.
    """
    ends = accumulate(batch.tokens for batch in batches)
    text = [batch for batch, end in zip(batches, ends, strict=True) if end - batch.tokens < DECODED_TOKENS]
    readout, estimator, config = exits.readout(backbone), exits.estimator(), exits.config
    step = _steps(advance, (1 + DECODED_POINTS) * len(text))
    traces, labels, full = [], [], []
    for batch in text:
        shown = collect_exits(backbone, readout, batch)
        traces.append(simulate_no_exit(estimator, shown).confidence[:, shown.mask])
        labels.append(shown.labels[:, shown.mask])
        full.append(shown.target[shown.mask])
        step()
    curve = sweep(torch.cat(traces, dim=1), torch.cat(labels, dim=1), depths(config), config.n_layers)
    exits.check_backbone(backbone)

    def measure(threshold: float) -> Decoded:
        early = EarlyExit(exits, threshold=threshold)
        _, plan, costs = early.attach(backbone.model)
        exit_index, agree = [], 0
        for batch, tokens in zip(text, full, strict=True):
            mask = batch.mask.to(tokens.device)
            forced = teacher_forced(backbone, plan, batch.ids.to(tokens.device), early.thresholds.values)
            agree += int((forced.tokens[mask] == tokens).sum())
            left = forced.exit_index[mask]
            exit_index.append(torch.where(left < len(plan.layers), left, len(config.layers)).cpu())
            step()
        where = torch.cat(exit_index)
        macs = torch.tensor(costs.by_exit, dtype=torch.float64)[where].mean()
        depth = costs.layers(where).double().mean() / backbone.n_layers
        return Decoded(threshold, float(depth), agree / len(where), 1.0 - float(macs) / costs.full)

    points = threshold_for_agreement(measure, target, curve, DECODED_POINTS, DECODED_TOLERANCE)
    best = shallowest(points, target)
    return {
        "policy": "propagate",
        "target": target,
        "tokens": sum(batch.tokens for batch in text),
        "best": None if best is None else asdict(best),
    }
