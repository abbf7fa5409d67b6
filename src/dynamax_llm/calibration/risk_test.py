"""A method, a limit and a confidence: which losses are accepted, and how many sequences that takes.

ltt      Learn then Test with the p-value of ``betting``: uses how little losses vary
ltt-hb   Learn then Test with the Hoeffding-Bentkus p-value: only the mean loss counts
crc      conformal risk control: in expectation only, no confidence
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dynamax_llm.calibration.betting import betting_p_value
from dynamax_llm.calibration.bounds import crc_limit, fixed_sequence, p_value

#: No number of prompts above this is named: the loss is then too near to the limit.
MOST_PROMPTS = 1_000_000
#: P-values are known to rounding only.
ROUNDING = 1e-12


@dataclass(frozen=True)
class RiskTest:
    """``limit`` is the mean loss to stay below; ``confidence`` is None under "crc" and must be given otherwise."""

    method: str
    limit: float
    confidence: float | None

    @property
    def level(self) -> float:
        """The greatest ``value`` that is accepted: 1 - confidence for a p-value, the limit itself under "crc"."""
        return self.limit if self.confidence is None else 1.0 - self.confidence

    def value(self, losses: ArrayLike) -> NDArray[np.float64]:
        """P-values (…, candidates) of losses (…, sequences, candidates), in drawn order; under "crc" the mean loss
        with one more sequence whose loss is 1."""
        loss = np.asarray(losses, dtype=np.float64)
        if self.method == "ltt":
            return betting_p_value(loss, self.limit, self.level)
        return self._of_mean(loss.mean(-2), loss.shape[-2])

    def controls(self, losses: ArrayLike) -> bool:
        """Whether the losses (sequences,) of one candidate are accepted as below the limit."""
        return bool(self.value(np.asarray(losses)[:, None])[0] <= self.level + ROUNDING)

    def accepted(self, losses: ArrayLike) -> NDArray[np.int64]:
        """How many candidates of losses (…, sequences, candidates), from the safest on, are accepted in sequence.

        Conformal risk control requires losses that never fall towards risk, so each sequence's loss is replaced there
        by the greatest it had so far; that bounds the loss itself.
        """
        loss = np.asarray(losses, dtype=np.float64)
        risen = np.maximum.accumulate(loss, axis=-1) if self.method == "crc" else loss
        return fixed_sequence(self.value(risen), self.level + ROUNDING)

    def prompts_needed(self, losses: ArrayLike = (0.0,)) -> int | None:
        """The least number of sequences that would be accepted if their losses were these, repeated.

        With the default, the least number with which anything can be promised. None if no number would do, or more
        than MOST_PROMPTS.
        """
        loss = np.asarray(losses, dtype=np.float64)
        if float(loss.mean()) >= self.limit:
            return None
        most = 1
        while not self._accepts(loss, most):
            most *= 2
            if most > MOST_PROMPTS:
                return None
        counts = range(most // 2 + 1, most)
        return counts.start + bisect.bisect_left(counts, True, key=lambda n: self._accepts(loss, n))

    def _accepts(self, loss: NDArray[np.float64], n: int) -> bool:
        if self.method == "ltt":
            return self.controls(np.resize(loss, n))
        return bool(self._of_mean(loss.mean(), n) <= self.level + ROUNDING)

    def _of_mean(self, loss: ArrayLike, n: int) -> NDArray[np.float64]:
        return crc_limit(loss, n) if self.method == "crc" else p_value(loss, n, self.limit)
