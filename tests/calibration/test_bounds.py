"""P-values and the number of prompts: against their definitions, and where they must say nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dynamax_llm.calibration.betting import BOLDEST, betting_p_value
from dynamax_llm.calibration.bounds import binomial_cdf, crc_limit, fixed_sequence, p_value
from dynamax_llm.calibration.risk_test import RiskTest
from dynamax_llm.exits.promise import METHODS


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


def capital(losses: list[float], bets: list[float], limit: float) -> float:
    """The most that is held, step by step."""
    held = most = 1.0
    for loss, bet in zip(losses, bets, strict=True):
        held *= 1.0 - bet * (loss - limit)
        most = max(most, held)
    return most


def test_the_highest_bet_is_placed_while_nothing_is_lost():
    highest = BOLDEST / 0.98
    for n in (10, 150):
        p = 1.0 / capital([0.0] * n, [highest] * n, 0.02)
        assert betting_p_value(np.zeros((n, 1)), 0.02) == pytest.approx(p)
    # Two lost tokens of 64 at the end: the capital of before counts.
    losses = np.zeros((150, 1))
    losses[-1] = 2 / 64
    assert betting_p_value(losses, 0.02) == pytest.approx(1.0 / capital([0.0] * 149, [highest] * 149, 0.02))


def test_bets_look_at_earlier_losses_only():
    rng = np.random.default_rng(0)
    losses = rng.random((3, 80, 4)) ** 6
    cut = losses[:, :50]
    early = betting_p_value(np.concatenate((cut, np.ones((3, 30, 4))), axis=1), 0.2)
    better = betting_p_value(np.concatenate((cut, np.zeros((3, 30, 4))), axis=1), 0.2)
    assert early.shape == (3, 4) and (better <= early).all() and (better < early).any()
    one = betting_p_value(losses[1, :, 2:3], 0.2)
    assert one == pytest.approx(betting_p_value(losses, 0.2)[1, 2:3])


def test_little_variance_pays():
    n, limit = 400, 0.02
    steady = np.tile([0.0, 0.02], n // 2)[:, None]  # a mean of .01, as 1 % of the sequences losing all has
    rare = (np.arange(n) % 100 == 50).astype(float)[:, None]
    assert betting_p_value(steady, limit) < 0.03 < p_value(0.01, n, limit) < betting_p_value(rare, limit)
    assert betting_p_value(np.full((n, 1), limit), limit) == 1.0


def test_fixed_sequence_stops_at_the_first_that_is_not_rejected():
    assert fixed_sequence([0.01, 0.02, 0.2, 0.01], 0.05) == 2
    assert fixed_sequence([[0.2, 0.0], [0.0, 0.0]], 0.05).tolist() == [0, 2]
    assert fixed_sequence([0.01, 0.05, 0.2], 0.05) == 2


def risk_test(method: str, limit: float, confidence: float = 0.95) -> RiskTest:
    return RiskTest(method, limit, None if method == "crc" else confidence)


def test_conformal_risk_control_counts_one_more_loss_and_never_lets_losses_fall():
    assert crc_limit(0.0, 49) == pytest.approx(0.02)
    falling = np.array([[0.0, 1.0, 0.0]] * 3)
    assert risk_test("crc", 0.5).accepted(falling) == 1
    assert risk_test("crc", 0.5).value(falling).tolist() == pytest.approx([0.25, 1.0, 0.25])


def test_learn_then_test_keeps_up_to_the_first_that_is_not_rejected():
    losses = np.stack([np.zeros((200, 3)), np.zeros((200, 3))])
    losses[1, ::2, 1] = 1.0
    for method in ("ltt", "ltt-hb"):
        assert risk_test(method, 0.02).accepted(losses).tolist() == [3, 1]
        assert risk_test(method, 0.02).value(losses).shape == (2, 3)
        assert risk_test(method, 0.02).controls(losses[0, :, 0]) and not risk_test(method, 0.02).controls(
            losses[1, :, 1]
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize(("limit", "loss"), [(0.02, 0.0), (0.1, 0.0), (0.1, 0.04), (0.02, 0.011)])
def test_the_prompts_needed_are_enough_and_fewer_are_not(method, confidence, limit, loss):
    test = risk_test(method, limit, confidence)
    n = test.prompts_needed([loss])
    assert test.controls(np.full(n, loss))
    if method == "ltt" or loss == 0.0:
        assert n == 1 or not test.controls(np.full(n - 1, loss))


def test_what_varies_needs_more_prompts_only_where_betting_sees_it():
    losses = {"steady": [0.01], "rare": [0.0] * 99 + [1.0]}  # of equal mean
    needed = {(m, kind): risk_test(m, 0.02).prompts_needed(seen) for m in METHODS for kind, seen in losses.items()}
    assert needed["ltt", "rare"] > 2 * needed["ltt", "steady"]
    assert needed["ltt", "steady"] < needed["ltt-hb", "steady"] == needed["ltt-hb", "rare"]
    assert needed["crc", "steady"] == needed["crc", "rare"]


def test_nothing_is_enough_where_the_loss_is_the_limit(monkeypatch):
    monkeypatch.setattr("dynamax_llm.calibration.risk_test.MOST_PROMPTS", 10_000)
    for method in METHODS:
        assert risk_test(method, 0.02).prompts_needed([0.02]) is None
        assert risk_test(method, 0.02).prompts_needed([0.01999]) is None
    assert [risk_test(method, 0.02).prompts_needed() for method in METHODS] == [150, 149, 49]


def test_the_binomial_distribution_is_scipys():
    k, n = np.meshgrid(np.arange(-1, 40, 3), np.array([1, 7, 39, 400, 20_000]))
    for share in (1e-4, 0.02, 0.3, 0.97):
        expected = stats.binom.cdf(k, n, share)
        assert binomial_cdf(k, n, share) == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert binomial_cdf(400, 20_000, 0.02) == pytest.approx(stats.binom.cdf(400, 20_000, 0.02), rel=1e-9)
    assert binomial_cdf(3, 10, 0.5).shape == ()
