"""A text decoded at several thresholds: depth at a given agreement, with its interval over documents.

Shapes: E exits, N documents, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynamax_llm.evaluation.common.bootstrap import draws, ends
from dynamax_llm.evaluation.harness.results import Interval


@dataclass(frozen=True)
class Points:
    """One setting decoded at several thresholds, rising: sums per document."""

    thresholds: tuple[float, ...]  # P
    agree: np.ndarray  # (P, N) tokens equal to the full model's
    depth: np.ndarray  # (P, N) shares of the depth, summed over tokens
    tokens: np.ndarray  # (N,)
    exit_counts: np.ndarray  # (P, E + 1) tokens per exit, full depth last
    saved: tuple[float, ...] = ()  # P counted reductions; empty where the state is intact

    @property
    def agreement(self) -> np.ndarray:
        """Share of all tokens that agree (P,)."""
        return self.agree.sum(-1) / self.tokens.sum()

    @property
    def mean_depth(self) -> np.ndarray:
        """Mean share of the layers (P,)."""
        return self.depth.sum(-1) / self.tokens.sum()

    def at(self, target: float) -> Interval:
        """Mean depth at this agreement with its 95 % interval over documents, linear between points.

        Full depth agrees on every token and closes the curve. Below the lowest point's agreement: that point's depth.
        """
        index = draws(len(self.tokens))  # (draws, N)
        low, high = ends(np.concatenate([self.drawn(part, target) for part in np.array_split(index, 40)]))
        return Interval(value=float(self.drawn(np.arange(len(self.tokens))[None], target)[0]), low=low, high=high)

    def drawn(self, index: np.ndarray, target: float) -> np.ndarray:
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

    def reduction(self, target: float, saved: Sequence[float] | None = None) -> float:
        """Counted reduction at this agreement, linear between points; of ``saved`` per point instead, if given."""
        agreement = np.maximum.accumulate([*self.agreement, 1.0])
        return float(np.interp(target, agreement, [*(self.saved if saved is None else saved), 0.0]))

    def threshold(self, target: float) -> float:
        """The threshold at this agreement, linear between points; the last point's where none reaches it."""
        return float(np.interp(target, np.maximum.accumulate(self.agreement), self.thresholds))
