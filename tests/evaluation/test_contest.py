"""Estimators at equal terms: depths at an agreement, read off decoded points."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynamax_llm.backbones import adapt
from dynamax_llm.evaluation.compare.contest import Contest, Points
from dynamax_llm.evaluation.compare.heads import Candidate
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.testing import random_ids, tiny_model
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.curves import average_precision, calibration_error


def points() -> Points:
    """Two documents of 10 tokens: agreement .9 at depth .5, then .95 at .7."""
    return Points(
        (0.3, 0.6), np.array([[9, 9], [10, 9]]), np.array([[5.0, 5.0], [6.0, 8.0]]), np.array([10, 10]), (0.4, 0.2)
    )


def test_depth_at_an_agreement_is_linear_between_points() -> None:
    made = points()
    assert made.at(0.9).value == pytest.approx(0.5)
    assert made.at(0.925).value == pytest.approx(0.6)
    assert made.at(0.975).value == pytest.approx(0.85)  # half way to full depth, which agrees entirely
    assert made.at(0.5).value == pytest.approx(0.5)
    assert made.reduction(0.925) == pytest.approx(0.3)
    assert made.threshold(0.925) == pytest.approx(0.45)
    low, high = made.at(0.925).low, made.at(0.925).high
    assert low < 0.6 < high


def test_points_are_what_decoding_does() -> None:
    backbone = adapt(tiny_model("mistral", layers=5))
    masks = torch.arange(24) < torch.tensor([[24], [19], [11]])
    contest = Contest(backbone, [Batch(random_ids(3, 24) * masks, masks)])
    exits = Exits.untrained(backbone, (2, 4))
    candidate = Candidate("margin", exits, "softmax_margin")
    decoded = contest.decode(candidate, [0.0, 1.0])
    assert decoded.depth[0] == pytest.approx(contest.tokens * 2 / 5)
    assert decoded.agree[1].tolist() == contest.tokens.tolist()
    only = contest.static(exits)
    assert only.depth[:, 0] / contest.tokens[0] == pytest.approx([2 / 5, 4 / 5])
    assert only.agree[0].tolist() == decoded.agree[0].tolist()
    standing = contest.stand(candidate, contest.exit_batches(candidate))
    agreeing = sum(int(one.labels[0][one.mask].sum()) for one in contest.exit_batches(candidate))
    assert standing.intact.at(0.0).value >= 2 / 5
    assert standing.oracle == pytest.approx(
        (2 * agreeing + sum(_later(one) for one in contest.exit_batches(candidate))) / 5 / contest.tokens.sum(),
        abs=1e-6,
    )


def _later(one) -> int:
    """Layers of the tokens that the first of two exits gets wrong."""
    wrong = ~one.labels[0][one.mask]
    second = one.labels[1][one.mask]
    return int(4 * (wrong & second).sum() + 5 * (wrong & ~second).sum())


def test_average_precision_and_calibration_error_by_hand() -> None:
    scores, labels = torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([True, False, True, False])
    assert average_precision(scores, labels) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(scores, torch.zeros(4)) is None
    assert calibration_error(torch.tensor([0.25, 0.25, 0.25, 0.25]), labels, bins=1) == pytest.approx(0.25)
    assert calibration_error(torch.tensor([1.0, 0.0, 1.0, 0.0]), labels, bins=4) == pytest.approx(0.0)
