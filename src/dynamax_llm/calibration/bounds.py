"""Tests of whether a mean loss is below a limit, from one loss in [0, 1] per sequence.

Learn then Test (Angelopoulos et al., arXiv 2110.01052): for every candidate, "its mean loss exceeds δ" is a hypothesis
with a p-value: that of ``betting``, or Hoeffding and Bentkus' here (Bates et al., arXiv 2101.02703). Candidates are
tested from safe to risky, each at 1 - confidence, until the first is not rejected (fixed-sequence testing needs no
correction for their number). Then, with probability at least ``confidence`` over the draw of the sequences, the mean
loss of every candidate that was rejected is at most δ.

Conformal risk control (Angelopoulos et al., arXiv 2208.02814) guarantees less: the *expected* loss on one more sequence
is at most δ, on average over the draws of the sequences too. The mean loss of a single calibration may lie above δ; no
confidence is attached. It needs fewer sequences.

Learn then Test requires sequences drawn independently from one source; for conformal risk control it is enough that
they are exchangeable. Tokens of one sequence are neither: a bound that counts tokens as independent fails, which
``tests/laws/test_promises.py`` shows.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def p_value(loss: ArrayLike, n: ArrayLike, limit: float) -> Floats:
    """Hoeffding-Bentkus p-value of "the mean loss exceeds ``limit``", for observed means of ``n`` losses in [0, 1].

    The lesser of Hoeffding's exp(-n kl(loss, limit)) and Bentkus' e P(Binomial(n, limit) <= ceil(n loss)); 1 where the
    observed mean is no less than the limit.
    """
    observed, count = np.minimum(np.asarray(loss, dtype=np.float64), limit), np.asarray(n, dtype=np.float64)
    hoeffding = np.exp(-count * _relative_entropy(observed, limit))
    # A sum of n losses is known to rounding only: 3 + 1e-12 is 3.
    bentkus = math.e * binomial_cdf(np.ceil(count * np.asarray(loss, dtype=np.float64) - 1e-9), count, limit)
    return np.where(np.asarray(loss) >= limit, 1.0, np.minimum(1.0, np.minimum(hoeffding, bentkus)))


def _relative_entropy(a: Floats, b: float) -> Floats:
    """kl(a, b) of Bernoulli distributions."""
    one = np.where(a > 0, a * np.log(np.where(a > 0, a, 1.0) / b), 0.0)
    rest = np.where(a < 1, (1 - a) * np.log(np.where(a < 1, 1 - a, 1.0) / (1 - b)), 0.0)
    return one + rest


def binomial_cdf(successes: ArrayLike, draws: ArrayLike, share: float) -> Floats:
    """P(Binomial(draws, share) <= successes), elementwise for whole numbers; ``share`` lies between 0 and 1."""
    k, n = np.broadcast_arrays(np.asarray(successes, dtype=np.int64), np.asarray(draws, dtype=np.int64))
    pairs, which = np.unique(np.stack((k.ravel(), n.ravel())), axis=1, return_inverse=True)
    found = np.array([_binomial_cdf(int(k), int(n), share) for k, n in pairs.T])
    return found[which].reshape(k.shape)


def _binomial_cdf(k: int, n: int, share: float) -> float:
    if k < 0 or k >= n:
        return float(k >= n)
    i = np.arange(1, k + 1)
    logs = np.concatenate(([0.0], np.cumsum(np.log((n - i + 1) / i) + math.log(share / (1.0 - share)))))
    return min(1.0, float(np.exp(logs + n * math.log1p(-share)).sum()))


def fixed_sequence(p_values: ArrayLike, level: float) -> NDArray[np.int64]:
    """How many candidates, from the first on, are rejected before the first that is not. ``p_values`` (…, candidates)
    are ordered from safe to risky; the order must not depend on the losses."""
    accepted = np.asarray(p_values) > level
    return np.where(accepted.any(-1), accepted.argmax(-1), accepted.shape[-1])


def crc_limit(loss: ArrayLike, n: ArrayLike) -> Floats:
    """What conformal risk control holds against δ: (n loss + 1) / (n + 1), the worst that one more sequence can do."""
    count = np.asarray(n, dtype=np.float64)
    return (count * np.asarray(loss, dtype=np.float64) + 1.0) / (count + 1.0)
