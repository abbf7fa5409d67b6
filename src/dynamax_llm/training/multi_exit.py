"""The multi-exit loss, defined once: ``dynamax tune`` and the recipe of the reference backbones compute this.

Per token, for the last layer L and the exits E of a step,

    (1 - k_L) CE_L + k_L KL(q || p_L)  +  a Σ_{e in E} w_e [(1 - k) CE_e + k KL(q || p_e)],    w_e = e / Σ E

p_e is what final norm and LM head make of h after layer e, q a teacher's distribution, held fixed, and k the share of
distillation. The weights are CALM's (arXiv 2207.07061); exits that rotate over the steps make every layer speak at the
price of a few readouts (LayerSkip, arXiv 2404.16710, rotates too). Nothing here needs more than torch.

Shapes: n tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

#: Where the random numbers of rotating exits begin, so that they are not those of a seed for weights or data.
ROTATION = 1_000_003


def depth_weights(layers: Sequence[int]) -> list[float]:
    """w_e = e / Σ E for exits after these layers, counted from 1; they sum to 1. Empty for no exits."""
    return [layer / math.fsum(layers) for layer in layers]


def rotate_exits(step: int, layers: Sequence[int], count: int) -> list[int]:
    """``count`` of ``layers``, one from each of ``count`` equal bands of them: a function of ``step`` alone."""
    bands = [layers[len(layers) * i // count : len(layers) * (i + 1) // count] for i in range(count)]
    draws = torch.rand(count, generator=torch.Generator().manual_seed(ROTATION + step)).tolist()
    return [band[int(draw * len(band))] for band, draw in zip(bands, draws, strict=True) if len(band)]


@dataclass(frozen=True)
class Mixture:
    """What each readout of a step learns from, the last layer's at the end: weights of CE and of KL to the teacher."""

    hard: tuple[float, ...]
    soft: tuple[float, ...]

    @classmethod
    def of(cls, exits: Sequence[int], distil: float, exit_weight: float = 1.0, last_distil: float = 0.0) -> Mixture:
        """k = ``distil`` and a = ``exit_weight`` at the exits, k_L = ``last_distil`` at the last layer."""
        shares = [exit_weight * weight for weight in depth_weights(exits)]
        return cls(
            (*(share * (1 - distil) for share in shares), 1 - last_distil),
            (*(share * distil for share in shares), last_distil),
        )


def readout_loss(logits: Tensor, targets: Tensor, teacher: Tensor | None, hard: float, soft: float) -> Tensor:
    """hard · CE + soft · KL(teacher || readout), summed over tokens: nats, a scalar with gradient.

    logits (n, V) float32, targets (n,) int64, teacher (n, V) log-probabilities without gradient; it may be None
    where ``soft`` is 0.
    """
    found = torch.log_softmax(logits, -1)
    value = hard * F.nll_loss(found, targets, reduction="sum") if hard else found.new_zeros(())
    if soft:
        assert teacher is not None
        value = value + soft * F.kl_div(found, teacher, reduction="sum", log_target=True)
    return value
