"""Intervals over samples: the percentile bootstrap (Efron, 1979), seeded, the same draws for every figure of a run.

Samples, not tokens, are drawn: tokens of one text are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dynamax_llm.evaluation.common.documents import Interval

#: Draws, and the share of them between the two ends.
DRAWS, CONFIDENCE = 2000, 0.95

Statistic = Callable[[np.ndarray], np.ndarray]


def mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis."""
    return values.mean(axis=-1)


def median(values: np.ndarray) -> np.ndarray:
    """Median over the last axis."""
    return np.median(values, axis=-1)


def interval(values: Sequence[float], seed: int = 0, statistic: Statistic = mean) -> Interval:
    """A statistic of one value per sample with its 95 % interval; no interval for fewer than two samples.

    ``values`` must not be empty.
    """
    data = np.asarray(values, dtype=np.float64)
    value = float(statistic(data))
    if len(data) < 2:
        return Interval(value=value)
    low, high = ends(statistic(data[draws(len(data), seed)]))
    return Interval(value=value, low=low, high=high)


def weighted(sums: Sequence[float], weights: Sequence[float], seed: int = 0) -> Interval:
    """A ratio of totals over samples (a mean per token, say) with its 95 % interval.

    A draw without any weight counts as the ratio over all samples.
    """
    over, under = np.asarray(sums, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if under.sum() <= 0:
        return Interval(value=0.0)
    ratio = float(over.sum() / under.sum())
    if len(over) < 2:
        return Interval(value=ratio)
    index = draws(len(over), seed)
    totals = under[index].sum(axis=-1)
    ratios = np.where(totals > 0, over[index].sum(axis=-1) / np.where(totals > 0, totals, 1.0), ratio)
    low, high = ends(ratios)
    return Interval(value=ratio, low=low, high=high)


def draws(count: int, seed: int = 0) -> np.ndarray:
    """Indices (DRAWS, count), drawn with replacement."""
    return np.random.default_rng(seed).integers(0, count, size=(DRAWS, count))


def ends(values: np.ndarray) -> tuple[float, float]:
    """The two ends of the interval that a statistic's values over all draws make."""
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(values, (tail, 1.0 - tail))
    return float(low), float(high)
