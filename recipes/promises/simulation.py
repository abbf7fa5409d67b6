"""Calibrations drawn again and again from a pool of losses whose mean is known, because the pool is all there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamax_llm.calibration.bounds import crc_limit, fixed_sequence, p_value


@dataclass(frozen=True)
class Outcomes:
    """Per calibration: points kept (0: nothing could be promised), and the true mean loss and depth of what was."""

    kept: np.ndarray
    loss: np.ndarray
    depth: np.ndarray

    def broken(self, limit: float) -> float:
        """Share of the calibrations whose promise is broken."""
        return float((self.loss > limit).mean())


def simulate(
    losses: np.ndarray, depth: np.ndarray, n: int, limit: float, confidence: float | None, draws: int, seed: int = 0
) -> Outcomes:
    """``draws`` calibrations on ``n`` sequences drawn with replacement from ``losses`` (pool, points), safe to risky.

    With ``confidence`` None by conformal risk control. ``depth`` (points,) is the mean depth at each point.
    """
    rng, pool = np.random.default_rng(seed), len(losses)
    counts = rng.multinomial(n, np.full(pool, 1.0 / pool), size=draws).astype(np.float64)
    if confidence is None:
        risen = np.maximum.accumulate(losses, axis=1)
        kept = fixed_sequence(crc_limit(counts @ risen / n, n), limit)
    else:
        kept = fixed_sequence(p_value(counts @ losses / n, n, limit), 1.0 - confidence)
    truth = np.concatenate(([0.0], losses.mean(0)))
    return Outcomes(kept, truth[kept], np.concatenate(([1.0], depth))[kept])


def pool_of(document: dict[str, Any], measure: str, kind: str = "wikipedia") -> tuple[np.ndarray, np.ndarray]:
    """Losses (pool, points) and mean depth (points,) of a pool file."""
    found = document[measure]["kinds"][kind]
    return np.array(found["losses"], dtype=np.float64).T / document[measure]["unit"], np.array(found["depth"])
