"""Exits simulated on collected batches: which tokens leave at which exit, with no layer run again.

While decoding, later estimators read a token that left as it was when it left: frozen h, frozen features. The
simulation does the same to whole rows in parallel, so training, curves and calibration share one function.

Shapes: B rows, T tokens, E exits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.features import select
from dynamax_llm.traces.collect import ExitBatch

#: Thresholds of the rows that let tokens leave are drawn between these, as P(agree).
THRESHOLDS = (0.5, 1.0)
NEVER = 2.0


@dataclass(frozen=True)
class ThresholdSample:
    """Each row's threshold (B, 1), NEVER for rows in which no token leaves, and the first token that may (B, 1)."""

    threshold: Tensor
    start: Tensor

    @classmethod
    def sample(cls, mask: Tensor, no_exit_share: float, generator: torch.Generator) -> ThresholdSample:
        """For rows of mask (B, T): thresholds uniform in THRESHOLDS; half begin like a prompt, of random length."""
        rows, length = mask.shape
        uniform = torch.rand(4, rows, 1, generator=generator)
        low, high = THRESHOLDS
        threshold = torch.where(uniform[0] < no_exit_share, NEVER, low + (high - low) * uniform[1])
        return cls(threshold, torch.where(uniform[2] < 0.5, 0.0, uniform[3] * length).long())

    def rows(self, rows: slice) -> ThresholdSample:
        """The sample of these rows; where there are none, of one row in which no token leaves."""
        if rows.start == rows.stop:
            return ThresholdSample.fixed(1, NEVER)
        return ThresholdSample(self.threshold[rows], self.start[rows])

    @classmethod
    def fixed(cls, rows: int, threshold: float) -> ThresholdSample:
        """One threshold for every token."""
        return cls(torch.full((rows, 1), threshold), torch.zeros(rows, 1, dtype=torch.int64))


@dataclass(frozen=True)
class ExitSimulation:
    """What an estimator gave for every token at every exit, and which exit each token left by."""

    confidence: Tensor  # (E, B, T)
    logits: Tensor | None  # (E, B, T) of learned heads, class-balanced, with gradient
    reached: Tensor  # (E, B, T) bool: which tokens had not left before the exit
    exit_index: Tensor  # (B, T) where each token left, E if it did not


def simulate_exits(estimator: ConfidenceEstimator, exit_batch: ExitBatch, sample: ThresholdSample) -> ExitSimulation:
    """Run a batch from exit to exit; later exits read a token that left as it was when it left."""
    mask = exit_batch.mask
    threshold, start = (part.to(mask.device, non_blocking=True) for part in (sample.threshold, sample.start))
    may_leave = mask & (torch.arange(mask.shape[1], device=mask.device) >= start)
    left = torch.zeros_like(mask)
    exit_index = torch.full_like(mask, len(exit_batch.hidden), dtype=torch.int64)
    h, features = exit_batch.hidden[0], exit_batch.features[0]
    states = estimator.initial_state(len(mask), mask.device)
    confidences: list[Tensor] = []
    logits: list[Tensor] = []
    reached: list[Tensor] = []
    for exit, (fresh, statistics) in enumerate(zip(exit_batch.hidden, exit_batch.features, strict=True)):
        h, features = torch.where(left.unsqueeze(-1), h, fresh), select(left, features, statistics)
        state = None if states is None else states[exit]
        if isinstance(estimator, ExitHeads):
            logit, _ = estimator.logits(exit, h, features, state)
            confidence = torch.sigmoid(logit.detach() + estimator.prior[exit])
            logits.append(logit)
        else:
            confidence, _ = estimator.confidence(exit, h, features, state)
        confidences.append(confidence)
        reached.append(mask & ~left)
        leaving = may_leave & ~left & (confidence >= threshold)
        exit_index = torch.where(leaving, exit, exit_index)
        left = left | leaving
    learned = torch.stack(logits) if logits else None
    return ExitSimulation(torch.stack(confidences), learned, torch.stack(reached), exit_index)


def simulate_no_exit(estimator: ConfidenceEstimator, exit_batch: ExitBatch) -> ExitSimulation:
    """The simulation in which no token leaves."""
    return simulate_exits(estimator, exit_batch, ThresholdSample.fixed(len(exit_batch.mask), NEVER))


def depths(config: ExitConfig) -> tuple[int, ...]:
    """Layers a token runs that leaves at each exit: the exit's depth, and the tail if there is one."""
    return tuple(layer + config.tail_layers for layer in config.layers)
