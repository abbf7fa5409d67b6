"""A p-value that uses how losses vary: the capital of a bettor against "the mean loss is at least δ".

Waudby-Smith and Ramdas (arXiv 2010.09686; for risk control Bates et al., arXiv 2101.02703). Before each loss L_i, a bet
ν_i in [0, 1/(1 - δ)) is placed on its being below δ, and the capital, 1 at first, is multiplied by 1 - ν_i (L_i - δ).
If the mean loss is δ or more, the expected capital does not grow whatever the bets, as long as each depends on earlier
losses only; by Ville's inequality it then *ever* reaches 1/α with a probability of at most α. So 1 over the greatest
capital is a p-value for independent losses in [0, 1] of any distribution. The bets only decide how small it gets.

The bet here is made for a coin with the mean and the mean square of the losses so far, whose heads count M (mean square
over mean, the size of a typical loss): the bet of greatest growth against the greatest mean that n tosses of this coin
would still distinguish from δ at the level asked for. Where losses vary little M is small and the bet is as high as
allowed; where a few sequences have a loss of 1, M is near 1 and the bet is small.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Of the highest bet, at which a loss of 1 would take all capital, the greatest share that is placed.
BOLDEST = 0.99
#: Pseudo-count of sequences with a loss of 1 before the first.
FEARED = 0.25


def betting_p_value(losses: ArrayLike, limit: float, level: float = 0.05) -> NDArray[np.float64]:
    """P-values (…, candidates) of "the mean loss exceeds ``limit``", for losses (…, sequences, candidates) in [0, 1]
    in the order in which they were drawn, which must not depend on their values.

    Valid at every level, and smallest where ``level`` is the one it is compared with.
    """
    loss = np.asarray(losses, dtype=np.float64)
    gains = -_bets(loss, limit, level) * (loss - limit)
    capital = np.cumsum(np.log1p(gains), axis=-2)  # its logarithm
    return np.exp(-np.maximum(capital.max(-2), 0.0))


def _bets(loss: NDArray[np.float64], limit: float, level: float) -> NDArray[np.float64]:
    """ν of every sequence, from the losses before it."""
    heads = (FEARED + _before(loss * loss)) / (FEARED + _before(loss))
    # A coin whose heads count no more than the limit cannot have a mean above it: the highest bet is safe.
    over = np.maximum(heads - limit, 1e-9)
    ease = np.minimum(1.0, over * math.log(1.0 / level) / (loss.shape[-2] * limit))
    # The share u of the limit by which the mean must lie below it: (1 - u) log(1 - u) + u = ease, to within .01.
    share = 1.0 - (1.0 - np.sqrt(ease)) ** math.sqrt(2.0)
    return np.minimum(share / over, BOLDEST / (1.0 - limit))


def _before(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums over the sequences before each one."""
    return np.cumsum(values, axis=-2) - values
