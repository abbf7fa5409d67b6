"""The threshold at which an estimator reaches a mean depth, in free generation and under the policy it will be used
with.

Confidences crowd towards 1, so the search moves in log odds: x = log(t / (1 - t)). Depth rises with the threshold, up
to the noise of texts that change with it; targets of one judge and policy share the points already measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable

#: Log odds searched, .0025 to 1 - 1e-7: beyond, float32 confidences are not told from 0 and 1.
LEAST, MOST = -6.0, 16.0
#: A mean depth this near to the target is near enough.
TOLERANCE = 0.01
#: Depths measured per target at most.
TRIES = 8
#: A step goes at least this share of the bracket from its ends, so that a flat stretch cannot stall the search.
MARGIN = 0.2


def threshold_of(log_odds: float) -> float:
    """The threshold in (0, 1)."""
    return 1.0 / (1.0 + math.exp(-log_odds))


def find_threshold(
    depth_at: Callable[[float], float], target: float, floor: float, known: dict[float, float]
) -> tuple[float, float]:
    """The threshold nearest to ``target`` mean depth, and the depth measured there.

    ``floor`` is the depth when all tokens leave at the first exit; ``known`` maps log odds to depths already measured
    and gains what is measured now.
    """
    for _ in range(TRIES):
        if known and min(abs(depth - target) for depth in known.values()) <= TOLERANCE:
            break
        x = _next(target, floor, known)
        known[x] = depth_at(threshold_of(x))
    nearest = min(known, key=lambda x: abs(known[x] - target))
    return threshold_of(nearest), known[nearest]


def _next(target: float, floor: float, known: dict[float, float]) -> float:
    """Where to look next: between the nearest points around the target, by linear interpolation."""
    low = max([x for x, depth in known.items() if depth <= target], default=LEAST)
    high = min([x for x, depth in known.items() if depth > target and x > low], default=MOST)
    below, above = known.get(low, floor), known.get(high, 1.0)
    share = (target - below) / (above - below) if above > below else 0.5
    return low + (high - low) * min(max(share, MARGIN), 1.0 - MARGIN)
