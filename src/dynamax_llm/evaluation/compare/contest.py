"""Estimators at equal terms: how well each ranks, and where it lands at several agreements, per state policy.

Every judge decodes the same documents, teacher-forced, at a few thresholds on the way up: under ``propagate`` in one
pass each, with exits on (heads at thresholds net of what an exit disturbs), and with every state intact (``defer``)
from one exit batch, replayed. Sums are kept per document, so that depth at an agreement comes with an interval over
documents. Agreement is the share of tokens equal to the full model's given the same prefix.

Shapes: E exits, N documents, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.generate import EarlyExit
from dynamax_llm.decoding.thresholds import NEVER
from dynamax_llm.decoding.trace import Trace
from dynamax_llm.engines.base import DecodeStats
from dynamax_llm.evaluation.common.bootstrap import draws, ends
from dynamax_llm.evaluation.compare.heads import Candidate, full_depth_tokens
from dynamax_llm.evaluation.harness.results import Interval
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.collect import ExitBatch, collect_exits
from dynamax_llm.traces.curves import Curve, auroc, average_precision, calibration_error, sweep
from dynamax_llm.traces.simulate import ThresholdSample, depths, simulate_exits, simulate_no_exit
from dynamax_llm.traces.teacher_forced import teacher_forced

#: Agreements at which depth is read off.
TARGETS = (0.95, 0.98, 0.99)
#: Agreements of the undisturbed trace whose thresholds are decoded with: dense where the targets are. Under
#: ``propagate`` a threshold gives a lower agreement than on the undisturbed trace, so they reach higher.
INTACT_AIMS = (0.92, 0.94, 0.955, 0.97, 0.98, 0.986, 0.992, 0.997)
PROPAGATE_AIMS = (0.955, 0.975, 0.986, 0.9925, 0.9965, 0.9985, 0.9995)
#: Thresholds of heads whose drift penalty is known: what they leave is near the agreement that comes of it.
NET = (0.75, 0.84, 0.89, 0.925, 0.95, 0.97, 0.985)


@dataclass(frozen=True)
class Points:
    """Decoded points of one judge under one policy, thresholds rising: sums per document."""

    thresholds: tuple[float, ...]  # P
    agree: np.ndarray  # (P, N) tokens that agree
    depth: np.ndarray  # (P, N) shares of the depth, summed over tokens
    tokens: np.ndarray  # (N,)
    saved: tuple[float, ...]  # P counted reductions; not known where the state is intact

    def at(self, target: float) -> Interval:
        """Mean depth at this agreement with its 95 % interval over documents, linear between points.

        Full depth agrees entirely: it closes the curve. Below the lowest point's agreement, that point's depth.
        """
        index = draws(len(self.tokens))  # (draws, N)
        drawn = [self._depths(part, target) for part in np.array_split(index, 40)]
        low, high = ends(np.concatenate(drawn))
        return Interval(value=float(self._depths(np.arange(len(self.tokens))[None], target)[0]), low=low, high=high)

    def _depths(self, index: np.ndarray, target: float) -> np.ndarray:
        """Depth at the target (D,) for documents ``index`` (D, N)."""
        total = self.tokens[index].sum(-1)  # (D,)
        agreement, depth = (part[:, index].sum(-1) / total for part in (self.agree, self.depth))  # (P, D)
        ones = np.ones((1, len(total)))
        agreement = np.maximum.accumulate(np.concatenate((agreement, ones)), axis=0)
        depth = np.concatenate((depth, ones))
        above = (agreement >= target).argmax(0)
        below = np.maximum(above - 1, 0)
        column = np.arange(len(total))
        gap = agreement[above, column] - agreement[below, column]
        share = np.where(gap > 0, (target - agreement[below, column]) / np.where(gap > 0, gap, 1.0), 1.0)
        return depth[below, column] + share * (depth[above, column] - depth[below, column])

    def reduction(self, target: float) -> float:
        """Counted reduction at this agreement, linear between points."""
        agreement = [*self.agree.sum(-1) / self.tokens.sum(), 1.0]
        return float(np.interp(target, np.maximum.accumulate(agreement), [*self.saved, 0.0]))

    def threshold(self, target: float) -> float:
        """The threshold at this agreement, linear between points; of the last point where none reaches it."""
        agreement = np.maximum.accumulate(self.agree.sum(-1) / self.tokens.sum())
        return float(np.interp(target, agreement, self.thresholds))


@dataclass(frozen=True)
class Standing:
    """One judge: per exit, undisturbed, how well it ranks and how far its confidence is from the truth; its points."""

    candidate: Candidate
    auroc: tuple[float | None, ...]
    average_precision: tuple[float | None, ...]
    calibration_error: tuple[float, ...]
    intact: Points
    propagate: Points
    oracle: float  # mean depth


class Contest:
    """The documents of a contest, one a row, and the full model's tokens after them."""

    def __init__(self, backbone: Backbone, batches: Sequence[Batch]) -> None:
        self.backbone, self.batches = backbone, batches
        self.truth = [full_depth_tokens(backbone, batch) for batch in batches]
        self.tokens = np.concatenate([batch.mask.sum(1).numpy() for batch in batches]).astype(np.float64)

    def exit_batches(self, candidate: Candidate) -> list[ExitBatch]:
        """What the exits of ``candidate`` show; the same for all that read them alike."""
        readout = candidate.exits.readout(self.backbone)
        return [collect_exits(self.backbone, readout, batch) for batch in self.batches]

    @torch.no_grad()
    def stand(self, candidate: Candidate, seen: Sequence[ExitBatch]) -> Standing:
        """Let ``candidate`` judge. ``seen``: ``exit_batches`` of it, or of one whose exits show the same."""
        estimator, config = candidate.estimator, candidate.exits.config
        if isinstance(estimator, nn.Module):
            estimator.to(self.backbone.device)
        trace = torch.cat([simulate_no_exit(estimator, one).confidence[:, one.mask] for one in seen], dim=1)
        labels = torch.cat([one.labels[:, one.mask] for one in seen], dim=1)
        net = candidate.measure is None and "propagate" in candidate.exits.drift_penalty
        curve = sweep(trace, labels, depths(config), config.n_layers)
        each = list(zip(trace, labels, strict=True))
        first = torch.cat((labels.int(), torch.ones_like(labels[:1]).int())).argmax(0)
        shares = torch.tensor([*depths(config), config.n_layers], device=first.device) / config.n_layers
        return Standing(
            candidate,
            tuple(auroc(*pair) for pair in each),
            tuple(average_precision(*pair) for pair in each),
            tuple(calibration_error(*pair) for pair in each),
            self._intact(candidate, seen, self._thresholds(curve, INTACT_AIMS)),
            self.decode(candidate, NET if net else self._thresholds(curve, PROPAGATE_AIMS)),
            float(shares[first].mean()),
        )

    @staticmethod
    def _thresholds(curve: Curve, targets: Sequence[float]) -> list[float]:
        found = {min(max(curve.depth_at(aim)[1], 0.0), 1.0) for aim in targets}
        return sorted(found)

    def _intact(self, candidate: Candidate, seen: Sequence[ExitBatch], thresholds: Sequence[float]) -> Points:
        """From the exit batch: a token that leaves changes nothing but what later exits' heads see of it."""
        config = candidate.exits.config
        agree, depth = [], []
        for threshold in thresholds:
            rows = []
            for one in seen:
                where = simulate_exits(
                    candidate.estimator, one, ThresholdSample.fixed(len(one.mask), threshold)
                ).exit_index
                truth = torch.cat((one.labels, torch.ones_like(one.labels[:1])))
                rows.append(self._sums(config, truth.gather(0, where[None])[0], where, one.mask))
            agree.append(np.concatenate([row[0] for row in rows]))
            depth.append(np.concatenate([row[1] for row in rows]))
        return Points(tuple(thresholds), np.stack(agree), np.stack(depth), self.tokens, ())

    def decode(self, candidate: Candidate, settings: Sequence[float | Sequence[float | str]]) -> Points:
        """The documents decoded under ``propagate`` at each of ``settings``: one threshold, or one per exit."""
        config = candidate.exits.config
        agree, depth, saved = [], [], []
        for thresholds in settings:
            early = EarlyExit(candidate.exits, measure=candidate.measure, threshold=thresholds)
            _, plan, costs = early.attach(self.backbone.model)
            rows, left = [], []
            for batch, truth in zip(self.batches, self.truth, strict=True):
                mask, ids = batch.mask.to(truth.device), batch.ids.to(truth.device)
                found = teacher_forced(self.backbone, plan, ids, early.thresholds.values, prompt_length=0)
                # Exits above the last open one are not asked, nor counted in the index of full depth.
                where = torch.where(found.exit_index < len(plan.layers), found.exit_index, len(config.layers))
                rows.append(self._sums(config, found.tokens == truth, where, mask))
                left.append(where[mask])
            agree.append(np.concatenate([row[0] for row in rows]))
            depth.append(np.concatenate([row[1] for row in rows]))
            index = torch.cat(left).unsqueeze(0)
            spent = DecodeStats(passes=int(costs.layers(index).sum()))
            saved.append(Trace(index, costs, early.policy.name, spent).counted_reduction)
        names = tuple(each if isinstance(each, float) else float(place) for place, each in enumerate(settings))
        return Points(names, np.stack(agree), np.stack(depth), self.tokens, tuple(saved))

    def static(self, exits: Exits) -> Points:
        """Every token leaving at the same exit, exit after exit, under ``propagate``: no estimator at all."""
        count = len(exits.config.layers)
        only = [[0.0 if exit == one else NEVER for exit in range(count)] for one in range(count)]
        return self.decode(Candidate("static depth", exits, "state_similarity"), only)

    @staticmethod
    def _sums(config: ExitConfig, agrees: Tensor, where: Tensor, mask: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that agree and shares of the depth, summed per row (B,)."""
        layers = torch.tensor([*depths(config), config.n_layers], device=where.device, dtype=torch.float64)
        depth = torch.where(mask, layers[where] / config.n_layers, 0.0).sum(1)
        return (agrees & mask).sum(1).double().cpu().numpy(), depth.cpu().numpy()
