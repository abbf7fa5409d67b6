"""The loss of exit heads, on the inputs they will meet when decoding.

**Substitution.** While decoding, a token that leaves at an exit is seen by every later head as it was when it left:
frozen h, frozen statistics. Training does the same to whole rows in parallel: each row draws a threshold, the heads'
own (detached) verdicts decide exit after exit who leaves, and later exits read the frozen inputs. Some rows never let
a token leave, and the others start at a random place, because prompts are read at full depth. The loss counts only
tokens that reach an exit.

Shapes: B rows, T tokens, E exits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamax_llm.exits.confidence import Judge, select
from dynamax_llm.exits.heads import ExitHeads
from dynamax_llm.training.harvest import Harvest

#: Thresholds of the rows that let tokens leave are drawn between these, as P(agree).
THRESHOLDS = (0.5, 1.0)
NEVER = 2.0


@dataclass(frozen=True)
class Draw:
    """Each row's threshold (B, 1), NEVER for rows in which no token leaves, and the first token that may (B, 1)."""

    threshold: Tensor
    start: Tensor

    @classmethod
    def sample(cls, mask: Tensor, never: float, generator: torch.Generator) -> Draw:
        """For rows of mask (B, T): thresholds uniform in THRESHOLDS; half begin like a prompt, of random length."""
        rows, length = mask.shape
        uniform = torch.rand(4, rows, 1, generator=generator)
        low, high = THRESHOLDS
        threshold = torch.where(uniform[0] < never, NEVER, low + (high - low) * uniform[1])
        return cls(threshold, torch.where(uniform[2] < 0.5, 0.0, uniform[3] * length).long())

    def rows(self, rows: slice) -> Draw:
        """The draw of these rows; where there are none, of one row in which nothing counts."""
        if rows.start == rows.stop:
            return Draw.fixed(1, NEVER)
        return Draw(self.threshold[rows], self.start[rows])

    @classmethod
    def fixed(cls, rows: int, threshold: float) -> Draw:
        """One threshold for every token."""
        return cls(torch.full((rows, 1), threshold), torch.zeros(rows, 1, dtype=torch.int64))


@dataclass(frozen=True)
class Walk:
    """What a judge said of every token at every exit, and what came of it."""

    confidence: Tensor  # (E, B, T)
    logits: Tensor | None  # (E, B, T) of learned heads, class-balanced, with gradient
    reached: Tensor  # (E, B, T) bool: which tokens had not left before the exit
    exit_index: Tensor  # (B, T) where each token left, E if it did not


def walk(judge: Judge, harvest: Harvest, draw: Draw) -> Walk:
    """Lead a batch from exit to exit; a token that leaves is seen by later exits as it was when it left."""
    mask = harvest.mask
    threshold, start = (part.to(mask.device, non_blocking=True) for part in (draw.threshold, draw.start))
    may_leave = mask & (torch.arange(mask.shape[1], device=mask.device) >= start)
    left = torch.zeros_like(mask)
    exit_index = torch.full_like(mask, len(harvest.hidden), dtype=torch.int64)
    h, signals = harvest.hidden[0], harvest.signals[0]
    states = judge.initial_state(len(mask), mask.device)
    confidences: list[Tensor] = []
    logits: list[Tensor] = []
    reached: list[Tensor] = []
    for exit, (fresh, statistics) in enumerate(zip(harvest.hidden, harvest.signals, strict=True)):
        h, signals = torch.where(left.unsqueeze(-1), h, fresh), select(left, signals, statistics)
        state = None if states is None else states[exit]
        if isinstance(judge, ExitHeads):
            logit, _ = judge.logits(exit, h, signals, state)
            confidence = torch.sigmoid(logit.detach() + judge.prior[exit])
            logits.append(logit)
        else:
            confidence, _ = judge.confidence(exit, h, signals, state)
        confidences.append(confidence)
        reached.append(mask & ~left)
        leaving = may_leave & ~left & (confidence >= threshold)
        exit_index = torch.where(leaving, exit, exit_index)
        left = left | leaving
    return Walk(torch.stack(confidences), torch.stack(logits) if logits else None, torch.stack(reached), exit_index)


class Balance:
    """Running counts, per exit, of tokens that agree and that do not, among those that reach it.

    They stay on the device: to read them every step, the host would have to wait for it every step.
    """

    def __init__(self, n_exits: int, device: torch.device | str = "cpu") -> None:
        # disagree, agree; one of each to begin with
        self.counts = torch.ones(2, n_exits, dtype=torch.float64, device=device)

    def add(self, counted: Tensor) -> None:
        """Add a ``tally`` (2, E)."""
        self.counts += counted

    def prior(self) -> Tensor:
        """Log-odds of agreement (E,) float32."""
        return (self.counts[1] / self.counts[0]).log().float()

    def weights(self) -> Tensor:
        """Loss weight (2, E) float32 of tokens that disagree and that agree: both classes weigh the same."""
        return (self.counts.sum(0) / (2 * self.counts)).float()


def tally(aims: Tensor, reached: Tensor) -> Tensor:
    """Of the tokens that reach each exit, how many disagree and how many agree there: (2, E) from (E, B, T).

    A soft label counts as that share of a token.
    """
    agree = (aims.double() * reached).sum((1, 2))
    return torch.stack((reached.sum((1, 2)) - agree, agree))


def exit_weights(n_exits: int) -> list[float]:
    """Share of each exit in the loss, i / Σj, as CALM (arXiv 2207.07061) weighs layers."""
    return [(exit + 1) / math.fsum(range(1, n_exits + 1)) for exit in range(n_exits)]


def loss(step: Walk, aims: Tensor, weights: Tensor, reached: Tensor | None = None) -> Tensor:
    """Class-balanced binary cross-entropy over the tokens that reach each exit, averaged over exits by i / Σj.

    ``aims`` (E, B, T) in [0, 1], ``weights`` (2, E) from ``Balance``; ``reached`` (E,) is how many tokens reach each
    exit where ``step`` holds only this process's share of them. An exit that no token reaches adds nothing. Tokens are
    masked, not picked out, because how many there are is known on the device alone.
    """
    assert step.logits is not None
    disagree, agree = weights.to(step.logits.device)[:, :, None, None].unbind()
    each = torch.lerp(disagree, agree, aims) * step.reached
    losses = F.binary_cross_entropy_with_logits(step.logits, aims, each, reduction="none").sum((1, 2))
    means = losses / (step.reached.sum((1, 2)) if reached is None else reached).clamp(min=1)
    return torch.stack([share * mean for share, mean in zip(exit_weights(len(aims)), means, strict=True)]).sum()


def learning_rate(progress: float, peak: float, warmup: float) -> float:
    """Linear warm-up to ``peak``, then cosine to 0, at ``progress`` in [0, 1] of the budget."""
    if progress < warmup:
        return peak * max(progress, 1e-3) / warmup
    through = (progress - warmup) / max(1.0 - warmup, 1e-9)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(through, 1.0)))
