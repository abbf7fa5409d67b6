"""Calibrations drawn again and again from a pool of losses whose mean is known, because the pool is all there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamax_llm.calibration.risk_test import RiskTest

#: Calibrations whose losses are held at once.
AT_ONCE = 100


@dataclass(frozen=True)
class Outcomes:
    """Per calibration: points kept (0: nothing could be promised), and the true mean loss and depth of what was."""

    kept: np.ndarray
    loss: np.ndarray
    depth: np.ndarray

    def broken(self, limit: float) -> float:
        """Share of the calibrations whose promise is broken."""
        return float((self.loss > limit).mean())


def simulate(losses: np.ndarray, depth: np.ndarray, n: int, proof: RiskTest, draws: int, seed: int = 0) -> Outcomes:
    """``draws`` calibrations on ``n`` sequences drawn with replacement from ``losses`` (pool, points), safe to risky.

    ``depth`` (points,) is the mean depth at each point.
    """
    rows = np.random.default_rng(seed).integers(0, len(losses), (draws, n))
    kept = np.concatenate([proof.accepted(losses[some]) for some in np.array_split(rows, -(-draws // AT_ONCE))])
    truth = np.concatenate(([0.0], losses.mean(0)))
    return Outcomes(kept, truth[kept], np.concatenate(([1.0], depth))[kept])


def pool_of(document: dict[str, Any], measure: str, kind: str = "wikipedia") -> tuple[np.ndarray, np.ndarray]:
    """Losses (pool, points) and mean depth (points,) of a pool file."""
    found = document[measure]["kinds"][kind]
    return np.array(found["losses"], dtype=np.float64).T / document[measure]["unit"], np.array(found["depth"])
