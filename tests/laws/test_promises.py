"""Law 9: a calibrated promise is broken in at most its share of repeated draws.

On synthetic losses the truth is known because the distribution is; on the reference backbones' it is known because the
pool of real losses that calibrations are drawn from, with replacement, is all there is (recipes/promises).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parents[2]
from dynamax_llm.calibration.bounds import fixed_sequence
from dynamax_llm.calibration.risk_test import RiskTest
from tests.recipes.scripts import script

STUDY = script("promises/study")
DRAWS, N, TOKENS = 2000, 200, 64
DELTA = 0.05  # 1 - confidence
LIMIT = 0.05
#: True mean losses of the candidates, from safe to risky; the limit lies among them.
RATES = np.array([0.005, 0.01, 0.02, 0.03, 0.04, 0.049, 0.051, 0.06, 0.08, 0.12])
#: How alike the tokens of one sequence are: independent, alike, and all but equal.
CORRELATIONS = (0.0, 0.3, 0.99)


def most(share: float, draws: int) -> float:
    """The share of broken promises that chance alone exceeds once in a thousand tries."""
    return stats.binom.ppf(0.999, draws, share) / draws


@cache
def draws_of(correlation: float) -> tuple[np.ndarray, np.ndarray]:
    """Losses (draws, sequences, candidates), shares of wrong tokens whose rate differs from sequence to sequence, and
    the true mean of each candidate, with 0 for "never" before them.

    Rates are Beta with the wanted mean and intraclass correlation; candidates of one sequence share their quantile,
    as thresholds on one text do.
    """
    rng = np.random.default_rng(0)
    if correlation == 0.0:
        rates = RATES
    else:
        scale = 1.0 / correlation - 1.0
        grid = (np.arange(4096) + 0.5) / 4096  # a table of quantiles: its mean is the truth, by construction
        table = np.stack([stats.beta.ppf(grid, rate * scale, (1 - rate) * scale) for rate in RATES], axis=1)
        rates = table[rng.integers(0, len(grid), (DRAWS, N))]
    losses = rng.binomial(TOKENS, rates, (DRAWS, N, len(RATES))).astype(np.float32) / TOKENS
    return losses, np.concatenate(([0.0], RATES if correlation == 0.0 else table.mean(0)))


def risk_test(method: str, limit: float = LIMIT) -> RiskTest:
    return RiskTest(method, limit, None if method == "crc" else 1.0 - DELTA)


@cache
def accepted_by(method: str, correlation: float, n: int) -> np.ndarray:
    """How many candidates each of the simulated calibrations accepts."""
    return risk_test(method).accepted(draws_of(correlation)[0][:, :n])


@pytest.mark.parametrize("method", ["ltt", "ltt-hb"])
@pytest.mark.parametrize(("correlation", "n"), [*((correlation, N) for correlation in CORRELATIONS), (0.99, 70)])
def test_learn_then_test_breaks_at_most_its_share(method, correlation, n):
    truth, accepted = draws_of(correlation)[1], accepted_by(method, correlation, n)
    assert (truth > LIMIT).sum() >= 3
    assert (truth[accepted] > LIMIT).mean() <= most(DELTA, DRAWS)
    if n == N:
        assert (accepted > 0).mean() > 0.5, "a promise that is never made cannot be broken"


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_betting_keeps_more_than_hoeffding_and_bentkus(correlation):
    truth = draws_of(correlation)[1]
    betting, bentkus = (truth[accepted_by(method, correlation, N)].mean() for method in ("ltt", "ltt-hb"))
    assert betting > (1.5 if correlation < 0.9 else 1.1) * bentkus


#: Losses (draws, sequences) whose mean is exactly ``limit``, by the name of their distribution.
HARD = {
    "coins": lambda rng, limit, shape: rng.random(shape) < limit,
    "always the limit": lambda rng, limit, shape: np.full(shape, limit),
    "none or twice the limit": lambda rng, limit, shape: 2 * limit * (rng.random(shape) < 0.5),
    "a tenth of the limit, and rarely all": lambda rng, limit, shape: np.where(
        rng.random(shape) < 0.9 * limit / (1 - 0.1 * limit), 1.0, 0.1 * limit
    ),
    "few sequences, each of like tokens": lambda rng, limit, shape: (
        rng.binomial(TOKENS, rng.beta(limit / 2, (1 - limit) / 2, shape)) / TOKENS
    ),
    "independent tokens": lambda rng, limit, shape: rng.binomial(TOKENS, limit, shape) / TOKENS,
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("limit", [0.01, LIMIT])
def test_a_loss_exactly_at_the_bound_is_taken_for_less_in_at_most_its_share(name, limit):
    shape = (DRAWS, 100 if limit == LIMIT else 400)
    losses = np.asarray(HARD[name](np.random.default_rng(1), limit, shape), dtype=np.float64)
    assert losses.mean() == pytest.approx(limit, rel=0.05)
    for method in ("ltt", "ltt-hb"):
        for claimed in (limit, 0.98 * limit):  # the mean is at what is claimed, or just above it
            p = risk_test(method, claimed).value(losses[..., None])
            assert (p <= DELTA).mean() <= most(DELTA, DRAWS)


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_conformal_risk_control_keeps_the_mean_and_not_every_draw(correlation):
    found = draws_of(correlation)[1][accepted_by("crc", correlation, N)]
    error = stats.norm.ppf(0.999) * found.std() / DRAWS**0.5
    assert found.mean() <= LIMIT + error
    if correlation > 0.9:
        assert (found > LIMIT).mean() > 3 * DELTA


def tokenwise_bound(wrong: np.ndarray | int, tokens: int, confidence: float) -> np.ndarray:
    """Clopper and Pearson's upper bound on the share of wrong tokens, *as if tokens were independent*."""
    k = np.asarray(wrong, dtype=np.float64)
    return np.where(k >= tokens, 1.0, stats.beta.ppf(confidence, k + 1.0, np.maximum(tokens - k, 1e-9)))


def test_the_tokenwise_bound_is_clopper_and_pearsons():
    bound = float(tokenwise_bound(3, 100, 0.95))
    assert stats.binom.cdf(3, 100, bound) == pytest.approx(0.05)
    assert tokenwise_bound(5, 5, 0.95) == 1.0


def test_the_tokenwise_bound_breaks_where_tokens_are_alike():
    def broken(correlation: float) -> float:
        losses, truth = draws_of(correlation)
        wrong = np.round(losses.sum(1, dtype=np.float64) * TOKENS)
        holds = tokenwise_bound(wrong, N * TOKENS, 1.0 - DELTA) <= LIMIT
        return float((truth[fixed_sequence(np.where(holds, 0.0, 1.0), 0.5)] > LIMIT).mean())

    assert broken(0.0) <= most(DELTA, DRAWS)
    assert broken(0.3) > 3 * DELTA
    assert broken(0.99) > 3 * DELTA


def pool(model: str) -> dict:
    return json.loads((ROOT / "recipes" / "promises" / "results" / f"pool-{model}.json").read_text())


@pytest.mark.parametrize("model", ["transformer-ee", "mamba-ee"])
@pytest.mark.parametrize(("measure", "bound"), [("agreement", 0.98), ("consistency", 0.9)])
def test_promises_on_the_reference_backbones_hold(model, measure, bound):
    losses, depth = STUDY.losses_of(pool(model), measure)
    limit, draws = 1.0 - bound, 300
    assert len(losses) >= 400 and losses.min() >= 0.0 and losses.max() <= 1.0
    assert losses.mean(0).max() > limit, "some points do break this promise"
    depths = {}
    for method in ("ltt", "ltt-hb"):
        for n in (200, 400) if method == "ltt" else (400,):
            found = STUDY.simulate(losses, depth, n, risk_test(method, limit), draws, seed=n)
            assert (found.loss > limit).mean() <= most(DELTA, draws)
        assert (found.kept > 0).mean() > 0.9
        depths[method] = found.depth.mean()
    assert depths["ltt"] < depths["ltt-hb"] < 1.0
    expected = STUDY.simulate(losses, depth, 200, risk_test("crc", limit), draws, seed=1).loss
    assert expected.mean() <= limit + stats.norm.ppf(0.999) * expected.std() / draws**0.5
