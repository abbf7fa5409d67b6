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

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamax_llm.traces.simulate import ExitSimulation


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


def tally(targets: Tensor, reached: Tensor) -> Tensor:
    """Of the tokens that reach each exit, how many disagree and how many agree there: (2, E) from (E, B, T).

    A soft label counts as that share of a token.
    """
    agree = (targets.double() * reached).sum((1, 2))
    return torch.stack((reached.sum((1, 2)) - agree, agree))


def exit_weights(n_exits: int) -> list[float]:
    """Share of each exit in the loss, i / Σj, as CALM (arXiv 2207.07061) weighs layers."""
    return [(exit + 1) / math.fsum(range(1, n_exits + 1)) for exit in range(n_exits)]


def loss(step: ExitSimulation, targets: Tensor, weights: Tensor, reached: Tensor | None = None) -> Tensor:
    """Class-balanced binary cross-entropy over the tokens that reach each exit, averaged over exits by i / Σj.

    ``targets`` (E, B, T) in [0, 1], ``weights`` (2, E) from ``Balance``; ``reached`` (E,) is how many tokens reach each
    exit where ``step`` holds only this process's share of them. An exit that no token reaches adds nothing. Tokens are
    masked, not picked out, because how many there are is known on the device alone.
    """
    assert step.logits is not None
    disagree, agree = weights.to(step.logits.device)[:, :, None, None].unbind()
    each = torch.lerp(disagree, agree, targets) * step.reached
    losses = F.binary_cross_entropy_with_logits(step.logits, targets, each, reduction="none").sum((1, 2))
    means = losses / (step.reached.sum((1, 2)) if reached is None else reached).clamp(min=1)
    return torch.stack([share * mean for share, mean in zip(exit_weights(len(targets)), means, strict=True)]).sum()


def learning_rate(progress: float, peak: float, warmup: float) -> float:
    """Linear warm-up to ``peak``, then cosine to 0, at ``progress`` in [0, 1] of the budget."""
    if progress < warmup:
        return peak * max(progress, 1e-3) / warmup
    through = (progress - warmup) / max(1.0 - warmup, 1e-9)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(through, 1.0)))
