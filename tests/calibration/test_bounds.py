"""P-values and the number of prompts: against their definitions, and where they must say nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dynamax_llm.calibration.bounds import (
    crc_limit,
    crc_sequence,
    fixed_sequence,
    greatest_loss,
    p_value,
    passes,
    prompts_needed,
    rejected,
    tokenwise_bound,
)


def test_no_loss_has_the_p_value_of_never_losing():
    assert p_value(0.0, 149, 0.02) == pytest.approx(0.98**149)
    assert p_value(0.02, 1000, 0.02) == 1.0
    assert p_value(0.5, 1000, 0.02) == 1.0


def test_the_p_value_is_the_lesser_of_its_two_parts():
    for loss, n, limit in ((0.01, 400, 0.02), (0.05, 200, 0.1), (0.003, 90, 0.05)):
        kl = loss * math.log(loss / limit) + (1 - loss) * math.log((1 - loss) / (1 - limit))
        bentkus = math.e * stats.binom.cdf(math.ceil(n * loss - 1e-9), n, limit)
        assert p_value(loss, n, limit) == pytest.approx(min(1.0, math.exp(-n * kl), bentkus))


def test_p_values_are_valid_for_coins():
    # The worst of all losses in [0, 1] with a given mean are coins: under the hypothesis p <= t at most t of the time.
    n, limit = 60, 0.1
    outcomes = np.arange(n + 1)
    p, chance = p_value(outcomes / n, n, limit), stats.binom.pmf(outcomes, n, limit)
    for level in (0.01, 0.05, 0.2):
        assert chance[p <= level].sum() <= level


def test_fixed_sequence_stops_at_the_first_that_is_not_rejected():
    assert fixed_sequence([0.01, 0.02, 0.2, 0.01], 0.05) == 2
    assert fixed_sequence([[0.2, 0.0], [0.0, 0.0]], 0.05).tolist() == [0, 2]
    tests = list(rejected(iter([("a", 0.01), ("b", 0.2), ("c", 0.0)]), 0.05))
    assert tests == [("a", 0.01, True), ("b", 0.2, False)]


def test_conformal_risk_control_counts_one_more_loss_and_never_lets_losses_fall():
    assert crc_limit(0.0, 49) == pytest.approx(0.02)
    falling = np.array([[0.0, 1.0, 0.0]] * 3)
    assert crc_sequence(falling, 0.5) == 1


@pytest.mark.parametrize("confidence", [0.9, 0.95, None])
@pytest.mark.parametrize(("limit", "loss"), [(0.02, 0.0), (0.1, 0.0), (0.1, 0.04), (0.02, 0.011)])
def test_the_prompts_needed_are_enough_and_fewer_are_not_at_loss_0(confidence, limit, loss):
    n = prompts_needed(limit, confidence, loss)
    assert passes(loss, n, limit, confidence)
    if loss == 0.0:
        assert n == 1 or not passes(loss, n - 1, limit, confidence)


def test_nothing_is_enough_where_the_loss_is_the_limit():
    assert prompts_needed(0.02, 0.95, 0.02) is None
    assert prompts_needed(0.02, 0.95, 0.01999999) is None
    assert (prompts_needed(0.02, 0.95), prompts_needed(0.02, None)) == (149, 49)


def test_the_greatest_loss_is_at_the_edge():
    edge = greatest_loss(400, 0.02, 0.95)
    assert passes(edge, 400, 0.02, 0.95) and not passes(edge + 1e-4, 400, 0.02, 0.95)
    assert greatest_loss(100, 0.02, 0.95) == -1.0


def test_the_tokenwise_bound_is_clopper_and_pearsons():
    bound = float(tokenwise_bound(3, 100, 0.95))
    assert stats.binom.cdf(3, 100, bound) == pytest.approx(0.05)
    assert tokenwise_bound(5, 5, 0.95) == 1.0
