"""Exit heads and confidence measures compared on one text: how well each ranks, and its depth at several agreements.

Every setting decodes the same documents, teacher-forced, at a few thresholds: under ``propagate`` in one pass per
threshold, with exits on, and with every state intact (``defer``) from one collected trace, replayed. Sums are kept
per document, so that depth at an agreement has an interval over documents. Agreement is the share of tokens equal to
the full model's given the same prefix.

Shapes: E exits, N documents, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.generate import EarlyExit
from dynamax_llm.decoding.thresholds import NEVER
from dynamax_llm.decoding.trace import Trace
from dynamax_llm.engines.base import DecodeStats
from dynamax_llm.evaluation.common.points import Points
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.collect import ExitBatch, collect_exits, forward
from dynamax_llm.traces.curves import auroc, average_precision, calibration_error, sweep
from dynamax_llm.traces.labels import argmax
from dynamax_llm.traces.simulate import ThresholdSample, depths, simulate_exits, simulate_no_exit
from dynamax_llm.traces.teacher_forced import teacher_forced

#: Agreements at which depth is reported.
TARGETS = (0.95, 0.98, 0.99)
#: Thresholds decoded at, as disagreements of the undisturbed trace in units of the target's disagreement. Under
#: ``propagate`` a threshold gives a lower agreement than on that trace, so its thresholds reach higher.
INTACT = (4.0, 3.0, 2.25, 1.5, 1.0, 0.7, 0.4, 0.15)
PROPAGATE = (2.25, 1.25, 0.7, 0.375, 0.175, 0.075, 0.025)
#: The same for heads whose drift penalty is known: 1 - threshold itself, which is near the disagreement that results.
NET = (12.5, 8.0, 5.5, 3.75, 2.5, 1.5, 0.75)


#: Agrees, exit index and mask of one batch at one threshold, (B, T) each.
Row = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class HeadSetting:
    """Exits and what decides at them: their own heads, or ``measure``."""

    name: str
    exits: Exits
    measure: str | None = None

    @property
    def estimator(self) -> ConfidenceEstimator:
        return self.exits.estimator(self.measure)

    @property
    def inputs(self) -> str:
        """The inputs of the heads, joined by "+"; empty for a measure."""
        return "" if self.measure else "+".join(self.exits.config.inputs)


@dataclass(frozen=True)
class HeadResult:
    """One setting: how it ranks per exit on the undisturbed trace, the oracle's mean depth there, decoded points."""

    setting: HeadSetting
    auroc: tuple[float | None, ...]
    average_precision: tuple[float | None, ...]
    calibration_error: tuple[float, ...]
    oracle: float
    propagate: Points
    intact: Points | None = None

    def to_json(self) -> dict[str, Any]:
        """A row of ``comparison_table`` as JSON types: ranks, depths with intervals, costs of a check."""
        setting, parts = self.setting, {"propagate": self.propagate, "intact": self.intact}
        heads = setting.exits.heads if setting.measure is None else None
        names = ("oracle", "auroc", "average_precision", "calibration_error")
        row: dict[str, Any] = {name: getattr(self, name) for name in names}
        row |= {"name": setting.name, "inputs": setting.inputs, "exits": list(setting.exits.config.layers)}
        row |= {name: depth_at_targets(points) for name, points in parts.items() if points is not None}
        row["reduction"] = {str(target): self.propagate.reduction(target) for target in TARGETS}
        row["threshold"] = {str(target): self.propagate.threshold(target) for target in TARGETS}
        if self.intact is not None:
            row["threshold_intact"] = {str(target): self.intact.threshold(target) for target in TARGETS}
        row["parameters"] = 0 if heads is None else sum(parameter.numel() for parameter in heads.parameters())
        return {**row, "check_macs": setting.estimator.macs(0)}


def depth_at_targets(points: Points) -> dict[str, list[float | None]]:
    """Depth with the ends of its interval at each of TARGETS."""
    found = {str(target): points.at(target) for target in TARGETS}
    return {target: [value.value, value.low, value.high] for target, value in found.items()}


class HeadComparison:
    """Settings compared on the same batches; one row of a batch counts as one document.

    ``prompt_length`` positions of every row run at full depth. The full model's tokens are computed once.
    """

    def __init__(self, backbone: Backbone, batches: Sequence[Batch], prompt_length: int = 0) -> None:
        self.backbone, self.batches, self.prompt_length = backbone, batches, prompt_length
        self.truth = [full_depth_tokens(backbone, batch) for batch in batches]
        self.tokens = np.concatenate([batch.mask.sum(1).numpy() for batch in batches]).astype(np.float64)

    def exit_batches(self, setting: HeadSetting) -> list[ExitBatch]:
        """The trace of these exits; settings whose readouts and inputs are equal can share it."""
        readout = setting.exits.readout(self.backbone)
        return [collect_exits(self.backbone, readout, batch) for batch in self.batches]

    @torch.no_grad()
    def evaluate(
        self,
        setting: HeadSetting,
        exit_batches: Sequence[ExitBatch] | None = None,
        target: float = 0.98,
        *,
        intact: bool = True,
    ) -> HeadResult:
        """Rank and decode ``setting`` at thresholds around ``target``, with intact states too unless told not to."""
        estimator, config = setting.estimator, setting.exits.config
        if isinstance(estimator, nn.Module):
            estimator.to(self.backbone.device)
        traces = self.exit_batches(setting) if exit_batches is None else exit_batches
        confidence = torch.cat([simulate_no_exit(estimator, one).confidence[:, one.mask] for one in traces], dim=1)
        labels = torch.cat([one.labels[:, one.mask] for one in traces], dim=1)
        curve, error = sweep(confidence, labels, depths(config), config.n_layers), 1.0 - target

        def thresholds(factors: Sequence[float]) -> list[float]:
            found = (curve.depth_at(max(1.0 - factor * error, 0.0))[1] for factor in factors)
            return sorted({min(max(value, 0.0), 1.0) for value in found})

        net = setting.measure is None and "propagate" in setting.exits.drift_penalty
        chosen = sorted({max(1.0 - factor * error, 0.0) for factor in NET}) if net else thresholds(PROPAGATE)
        first = torch.cat((labels.int(), torch.ones_like(labels[:1]).int())).argmax(0)
        pairs = list(zip(confidence, labels, strict=True))
        return HeadResult(
            setting,
            tuple(auroc(*pair) for pair in pairs),
            tuple(average_precision(*pair) for pair in pairs),
            tuple(calibration_error(*pair) for pair in pairs),
            float(_shares(setting.exits, first.device)[first].mean()),
            self.decode(setting, chosen),
            self._replay(setting, traces, thresholds(INTACT)) if intact else None,
        )

    def _replay(self, setting: HeadSetting, traces: Sequence[ExitBatch], thresholds: Sequence[float]) -> Points:
        """From the trace: a token that exits changes nothing but what later exits' heads see of it."""
        rows = []
        for threshold in thresholds:
            for one in traces:
                sample = ThresholdSample.fixed(len(one.mask), threshold)
                where = simulate_exits(setting.estimator, one, sample).exit_index
                labels = torch.cat((one.labels, torch.ones_like(one.labels[:1])))
                rows.append((labels.gather(0, where[None])[0], where, one.mask))
        return self._points(setting, tuple(thresholds), rows)

    @torch.no_grad()
    def decode(self, setting: HeadSetting, thresholds: Sequence[float | Sequence[float | str]]) -> Points:
        """The documents decoded under ``propagate`` at each of ``thresholds``: one number, or one per exit."""
        rows: list[Row] = []
        saved: list[float] = []
        for threshold in thresholds:
            early = EarlyExit(setting.exits, measure=setting.measure, threshold=threshold)
            _, plan, costs = early.attach(self.backbone.model)
            first = len(rows)
            for batch, truth in zip(self.batches, self.truth, strict=True):
                mask, ids = batch.mask.to(truth.device), batch.ids.to(truth.device)
                values = early.thresholds.values
                found = teacher_forced(self.backbone, plan, ids, values, prompt_length=self.prompt_length)
                # Exits above the last open one are cut from the plan: full depth has another index there.
                full = len(setting.exits.config.layers)
                where = torch.where(found.exit_index < len(plan.layers), found.exit_index, full)
                rows.append((found.tokens == truth, where, mask))
            index = torch.cat([where[mask] for _, where, mask in rows[first:]]).unsqueeze(0)
            spent = DecodeStats(passes=int(costs.layers(index).sum()))
            saved.append(Trace(index, costs, early.policy.name, spent).counted_reduction)
        names = tuple(float(each) if isinstance(each, int | float) else float(i) for i, each in enumerate(thresholds))
        return self._points(setting, names, rows, tuple(saved))

    def static(self, exits: Exits) -> Points:
        """Every token leaving at one exit, for each exit in turn, under ``propagate``: no confidence decides."""
        count = len(exits.config.layers)
        only = [[0.0 if exit == one else NEVER for exit in range(count)] for one in range(count)]
        return self.decode(HeadSetting("static depth", exits, "state_similarity"), only)

    def _points(
        self,
        setting: HeadSetting,
        thresholds: tuple[float, ...],
        rows: Sequence[Row],
        saved: tuple[float, ...] = (),
    ) -> Points:
        """Sums per document of rows, batch after batch and point after point."""
        agree, depth, counts = [], [], []
        for agrees, where, mask in rows:
            shares = _shares(setting.exits, where.device)
            agree.append((agrees & mask).sum(1).double().cpu().numpy())
            depth.append(torch.where(mask, shares[where], 0.0).sum(1).cpu().numpy())
            counts.append(torch.bincount(where[mask], minlength=len(shares)).cpu().numpy())
        shape = (len(thresholds), len(self.tokens))
        per_exit = np.stack(counts).reshape(len(thresholds), len(self.batches), -1).sum(1)
        agreeing, depths_run = (np.concatenate(part).reshape(shape) for part in (agree, depth))
        return Points(thresholds, agreeing, depths_run, self.tokens, per_exit, saved)


def _shares(exits: Exits, device: torch.device) -> Tensor:
    """Share of the layers run at each exit and at full depth (E + 1,) float64."""
    config = exits.config
    layers = torch.tensor([*depths(config), config.n_layers], dtype=torch.float64, device=device)
    return layers / config.n_layers


@torch.no_grad()
def full_depth_tokens(backbone: Backbone, batch: Batch) -> Tensor:
    """The full model's token (B, T) after every position of a batch."""
    ids = batch.ids.to(backbone.device)
    return argmax(backbone, forward(backbone, (), ids).final.flatten(0, 1)).view(ids.shape)
