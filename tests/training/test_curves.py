"""Depth against agreement, against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamax_llm.traces.curves import auroc, oracle_depth, sweep

LAYERS, L = (3, 5, 6), 8


def brute_force(confidences: torch.Tensor, labels: torch.Tensor, threshold: float) -> tuple[float, float]:
    """Mean depth and agreement, token by token."""
    depth = agree = 0.0
    for token in range(confidences.shape[1]):
        for exit, layer in enumerate(LAYERS):
            if confidences[exit, token] >= threshold:
                depth, agree = depth + layer, agree + float(labels[exit, token])
                break
        else:
            depth, agree = depth + L, agree + 1
    return depth / confidences.shape[1], agree / confidences.shape[1]


def trace(seed: int, count: int = 40, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    confidences = torch.rand(len(LAYERS), count, generator=generator)
    if ties:
        confidences = (confidences * 4).round() / 4
    return confidences, torch.rand(len(LAYERS), count, generator=generator) < 0.7


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_sweep_is_what_each_threshold_would_do(seed: int, ties: bool) -> None:
    confidences, labels = trace(seed, ties=ties)
    curve = sweep(confidences, labels, LAYERS, L)
    assert len(curve.thresholds) > (3 if ties else 40)
    for threshold, depth, agreement in zip(curve.thresholds, curve.depth, curve.agreement, strict=True):
        expected = brute_force(confidences, labels, float(threshold))
        assert (float(depth), float(agreement)) == pytest.approx(expected, abs=1e-12)
    assert set(confidences.cummax(0).values.flatten().double().tolist()) | {float("inf")} == set(
        curve.thresholds.tolist()
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), ties=st.booleans(), count=st.integers(1, 30))
def test_depth_never_falls_as_the_threshold_rises(seed: int, ties: bool, count: int) -> None:
    confidences, labels = trace(seed, count, ties)
    curve = sweep(confidences, labels, LAYERS, L)
    assert bool((curve.thresholds[1:] > curve.thresholds[:-1]).all())
    assert bool((curve.depth[1:] >= curve.depth[:-1] - 1e-12).all())
    assert float(curve.depth[-1]) == L
    assert float(curve.agreement[-1]) == 1


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), target=st.sampled_from([0.5, 0.9, 0.98, 1.0]))
def test_depth_at_an_agreement_is_the_least_that_reaches_it(seed: int, target: float) -> None:
    confidences, labels = trace(seed, count=12, ties=bool(seed % 2))
    depth, threshold = sweep(confidences, labels, LAYERS, L).depth_at(target)
    tried = [brute_force(confidences, labels, float(value)) for value in [*confidences.flatten(), 2.0]]
    assert depth == pytest.approx(min(d for d, agreement in tried if agreement >= target - 1e-9), abs=1e-9)
    assert brute_force(confidences, labels, threshold)[1] >= target - 1e-9
    if target == 1.0:
        assert depth >= oracle_depth(labels, LAYERS, L) - 1e-9  # the oracle bounds every measure


def test_the_oracle_leaves_at_the_first_exit_that_agrees() -> None:
    labels = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]]).bool()
    assert oracle_depth(labels, LAYERS, L) == (3 + 5 + 6 + 8) / 4


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (torch.rand(60, generator=generator) * 10).round() / 10
    labels = torch.rand(60, generator=generator) < scores
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels].tolist() for b in scores[~labels].tolist()]
    assert auroc(scores, labels) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert auroc(labels.float(), labels) == 1.0
    assert auroc(torch.zeros(60), labels) == 0.5
    assert auroc(scores, torch.ones(60)) is None
