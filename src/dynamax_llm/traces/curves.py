"""Depth against agreement on a fixed trace: what every threshold would have done, without running anything again.

A trace is what each of N tokens showed at each of E exits: a confidence, and whether stopping there agrees with the
full model. Depth is in layers; a token that never leaves runs all of them and agrees by definition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Curve:
    """Mean depth in layers and agreement at each threshold, thresholds rising; the last one nobody reaches."""

    thresholds: Tensor  # (K,) float64
    depth: Tensor  # (K,) float64
    agreement: Tensor  # (K,) float64
    n_layers: int

    def depth_at(self, agreement: float) -> tuple[float, float]:
        """(mean depth, threshold) of the lowest threshold with at least this agreement; full depth at worst."""
        index = int((self.agreement >= agreement - 1e-12).nonzero()[0])
        return float(self.depth[index]), float(self.thresholds[index])


def sweep(confidences: Tensor, labels: Tensor, layers: tuple[int, ...], n_layers: int) -> Curve:
    """Every threshold that changes anything, one for all exits, on confidences and labels (E, N).

    A token leaves at the first exit whose confidence is at least the threshold, so at threshold t it leaves at the
    first e whose running maximum reaches t. Lowering t past a running maximum moves that token down one step:
    sorting these steps gives the whole curve in O(E N log E N).
    """
    count = confidences.shape[1]
    reach = confidences.double().cummax(0).values  # (E, N)
    depth_above = torch.full((count,), float(n_layers), dtype=torch.float64, device=reach.device)
    agree_above = torch.ones_like(depth_above)
    at, depth_step, agree_step = [], [], []
    for exit in range(len(layers) - 1, -1, -1):
        below = torch.full_like(reach[0], -1.0) if exit == 0 else reach[exit - 1]
        moves = reach[exit] > below  # otherwise an earlier exit has the token at every threshold
        agrees = labels[exit].double()
        at.append(reach[exit][moves])
        depth_step.append((layers[exit] - depth_above)[moves])
        agree_step.append((agrees - agree_above)[moves])
        depth_above = torch.where(moves, float(layers[exit]), depth_above)
        agree_above = torch.where(moves, agrees, agree_above)
    values, order = torch.cat(at).sort(descending=True)
    depth = n_layers + torch.cat(depth_step)[order].cumsum(0) / count
    agreement = 1.0 + torch.cat(agree_step)[order].cumsum(0) / count
    last = torch.cat((values[1:] < values[:-1], values.new_ones(1, dtype=torch.bool)))  # tokens that tie move together
    unreached = values.new_tensor([float("inf")])
    return Curve(
        torch.cat((unreached, values[last])).flip(0),
        torch.cat((depth.new_tensor([float(n_layers)]), depth[last])).flip(0),
        torch.cat((agreement.new_ones(1), agreement[last])).flip(0),
        n_layers,
    )


def oracle_depth(labels: Tensor, layers: tuple[int, ...], n_layers: int) -> float:
    """Mean depth if each token left at the first exit that agrees; labels (E, N). Bounds every measure."""
    depths = torch.tensor([*layers, n_layers], dtype=torch.float64, device=labels.device)
    always = torch.cat((labels.bool(), labels.new_ones(1, labels.shape[1], dtype=torch.bool)))
    return float(depths[always.int().argmax(0)].mean())


def auroc(scores: Tensor, labels: Tensor) -> float | None:
    """Probability that a token that agrees scores above one that does not, ties counting half; None without both.

    Scores and labels (N,). From the ranks: Mann and Whitney's U over the number of pairs.
    """
    positive = labels.bool()
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return None
    _, place, counts = scores.double().unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0) - (counts - 1) / 2  # the mean rank of equal scores, from 1
    rank_sum = float(ranks[place][positive].sum())
    return (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def average_precision(scores: Tensor, labels: Tensor) -> float | None:
    """Mean precision over the tokens that agree, taken from the surest down; None where none agrees.

    Scores and labels (N,). Ties count as one step, at its end.
    """
    positive = labels.bool()
    if not int(positive.sum()):
        return None
    levels, place = scores.double().unique(return_inverse=True)
    agreeing = torch.zeros_like(levels).index_add_(0, place, positive.double()).flip(0)
    taken = torch.zeros_like(levels).index_add_(0, place, torch.ones_like(scores, dtype=torch.float64)).flip(0)
    precision = agreeing.cumsum(0) / taken.cumsum(0)
    return float((precision * agreeing).sum() / agreeing.sum())


def calibration_error(scores: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al., arXiv 1706.04599): |agreement - mean confidence| in equally filled bins,
    averaged over tokens. Scores in [0, 1] and labels (N,)."""
    order = scores.double().argsort()
    pairs = zip(scores.double()[order].tensor_split(bins), labels.double()[order].tensor_split(bins), strict=True)
    gaps = [abs(float((label - score).sum())) for score, label in pairs]
    return sum(gaps) / max(len(scores), 1)
