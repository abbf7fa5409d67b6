"""The loss of exit heads, on the inputs they get when decoding.

While decoding, every later head reads a token that left as it was when it left: frozen h, frozen features. Training
does the same to whole rows in parallel (``traces.simulate``): each row draws a threshold, the heads' own (detached)
confidences decide exit after exit which tokens leave, and later exits read the frozen inputs. In some rows no token
leaves, and the others start at a random position, because prompts are read at full depth. The loss counts only tokens
that reach an exit.

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

    They stay on the device, so that no step waits for them.
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


def loss(simulation: ExitSimulation, targets: Tensor, weights: Tensor, reached: Tensor | None = None) -> Tensor:
    """Class-balanced binary cross-entropy over the tokens that reach each exit, averaged over exits by i / Σj.

    ``targets`` (E, B, T) in [0, 1], ``weights`` (2, E) from ``Balance``; ``reached`` (E,) is the number of tokens that
    reach each exit where ``simulation`` holds only this process's share of them. An exit that no token reaches adds
    nothing. Tokens are masked, not selected, because their number is known on the device alone.
    """
    assert simulation.logits is not None
    disagree, agree = weights.to(simulation.logits.device)[:, :, None, None].unbind()
    each = torch.lerp(disagree, agree, targets) * simulation.reached
    losses = F.binary_cross_entropy_with_logits(simulation.logits, targets, each, reduction="none").sum((1, 2))
    means = losses / (simulation.reached.sum((1, 2)) if reached is None else reached).clamp(min=1)
    return torch.stack([share * mean for share, mean in zip(exit_weights(len(targets)), means, strict=True)]).sum()
