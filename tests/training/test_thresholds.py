"""The search for the threshold that keeps an agreement: bracketed, guided by a curve, over whatever is measured."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from dynamax_llm.traces.curves import sweep
from dynamax_llm.traces.thresholds import shallowest, threshold_for_agreement


@dataclass(frozen=True)
class Point:
    threshold: float
    depth: float
    agreement: float


def points(target: float, **how) -> list[Point]:
    """Agreement rises with the threshold, from 0.8 to 1, and so does depth."""
    return threshold_for_agreement(lambda at: Point(at, 0.5 + 0.5 * at, 0.8 + 0.2 * at), target, **how)


def test_bisection_finds_the_lowest_threshold_that_keeps_the_target() -> None:
    found = points(0.95)
    assert len(found) == 12
    assert [point.threshold for point in found] == sorted(point.threshold for point in found)
    best = shallowest(found, 0.95)
    assert best.agreement >= 0.95
    assert best.threshold == pytest.approx(0.75, abs=2**-11)
    assert len(points(0.95, steps=5)) == 5


def test_a_target_that_nothing_keeps_has_no_point() -> None:
    assert shallowest(points(1.01), 1.01) is None
    assert shallowest([], 0.5) is None


def test_the_search_ends_once_the_target_is_bracketed_and_near() -> None:
    found = points(0.9, tolerance=1e-2)
    assert len(found) < 8
    agreements = [point.agreement for point in found]
    assert min(agreements) < 0.9 <= max(agreements)
    assert min(abs(value - 0.9) for value in agreements) < 1e-2


def test_a_curve_gives_the_first_guess_and_its_error_corrects_the_next() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(2, 4000, generator=generator)
    agrees = torch.rand(2, 4000, generator=generator) < confidence
    curve = sweep(confidence, agrees, (1, 2), 4)

    def measure(threshold: float, lost: float) -> Point:
        index = int((curve.thresholds < threshold).sum().clamp(max=len(curve.depth) - 1))
        return Point(threshold, float(curve.depth[index]) / 4, float(curve.agreement[index]) - lost)

    exact = threshold_for_agreement(lambda at: measure(at, 0.0), 0.9, curve, 3)
    assert curve.depth_at(0.9)[1] in [point.threshold for point in exact]
    worse = threshold_for_agreement(lambda at: measure(at, 0.03), 0.9, curve, 7, 5e-4)
    blind = threshold_for_agreement(lambda at: measure(at, 0.03), 0.9, None, 7, 5e-4)
    errors = [min(abs(point.agreement - 0.9) for point in found) for found in (worse, blind)]
    assert errors[0] < 1e-3
    assert errors[0] <= errors[1]
    assert len(worse) <= len(blind)
