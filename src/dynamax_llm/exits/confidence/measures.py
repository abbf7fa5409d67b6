"""The fixed confidence measures: how sure the readout is, or how little the last layer changed h."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.features import LOG_SCALE, STATISTICS, ExitFeatures
from dynamax_llm.exits.registries import MEASURES
from dynamax_llm.exits.state import State


class Measure(ConfidenceEstimator):
    """A fixed function of the statistics ``ExitFeatures.values`` (B, T, F), clamped to [0, 1]."""

    def __init__(self, name: str, formula: Callable[[Tensor], Tensor], *, needs_logits: bool = True) -> None:
        self.name, self.needs_logits, self._formula = name, needs_logits, formula

    def confidence(
        self, exit: int, h: Tensor, features: ExitFeatures, state: State | None, padding: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        return self._formula(features.values).clamp(0.0, 1.0), state

    def macs(self, exit: int) -> int:
        return 0  # sums over statistics that the readout has already paid for

    def __repr__(self) -> str:
        return f"Measure({self.name!r})"


def measure(name: str) -> Measure:
    """The fixed measure called ``name``. Raises UsageError naming the value, the nearest name and all of them."""
    return MEASURES.lookup(name)


_MARGIN, _ENTROPY, _SIMILARITY = (STATISTICS.index(name) for name in ("margin", "entropy", "similarity"))

SOFTMAX_MAX = Measure("softmax_max", lambda values: (values[..., 0] * LOG_SCALE).exp())
SOFTMAX_MARGIN = Measure("softmax_margin", lambda values: values[..., _MARGIN])
ENTROPY = Measure("entropy", lambda values: 1.0 - values[..., _ENTROPY])
STATE_SIMILARITY = Measure(
    "state_similarity", lambda values: (1.0 + values[..., _SIMILARITY]) / 2.0, needs_logits=False
)
