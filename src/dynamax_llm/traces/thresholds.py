"""The search for the threshold that keeps an agreement; whatever measures agreement at a threshold can use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from dynamax_llm.traces.curves import Curve


class AtThreshold(Protocol):
    """What decoding at one threshold gave: ``depth`` and ``agreement`` are shares."""

    @property
    def threshold(self) -> float: ...
    @property
    def depth(self) -> float: ...
    @property
    def agreement(self) -> float: ...


P = TypeVar("P", bound=AtThreshold)


def threshold_for_agreement(
    measure: Callable[[float], P], target: float, curve: Curve | None = None, steps: int = 12, tolerance: float = 0.0
) -> list[P]:
    """The points measured on the way to the lowest threshold with at least ``target`` agreement, thresholds rising.

    [0, 1] is bisected: a threshold that keeps the target closes the bracket from above, another from below. With
    ``curve``, the curve of the trace in which no token leaves, the first guesses come from it: the threshold at which
    it has the target, then the target corrected by what was measured. Ends after ``steps`` measurements, or once the
    target is bracketed and a point is closer to it than ``tolerance``.
    """
    low, high, corrected = 0.0, 1.0, target
    points: dict[float, P] = {}
    for _ in range(steps):
        threshold = (low + high) / 2
        if curve is not None:
            guess = curve.depth_at(min(corrected, 1.0))[1]
            threshold = guess if low < guess < high else threshold
        point = points[threshold] = measure(threshold)
        low, high = (low, threshold) if point.agreement >= target else (threshold, high)
        miss = target - point.agreement
        corrected += miss if abs(miss) > 1e-4 else 2e-3
        kept = {found.agreement >= target for found in points.values()}
        if len(kept) == 2 and any(abs(found.agreement - target) < tolerance for found in points.values()):
            break
    return [points[threshold] for threshold in sorted(points)]


def shallowest(points: Sequence[P], target: float) -> P | None:
    """The point of least depth with at least ``target`` agreement; None if there is none."""
    return min((point for point in points if point.agreement >= target), key=lambda point: point.depth, default=None)
