"""An estimator for benchmarks: rows leave at steps drawn beforehand, decided on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.features import ExitFeatures
from dynamax_llm.exits.state import State

#: Tokens after which the draw begins again.
PERIOD = 512


def draw(batch: int, exits: int, leave: float, together: float, seed: int = 0, period: int = PERIOD) -> Tensor:
    """Where each row's tokens leave: (period, B) int64, ``exits`` for full depth.

    Every row leaves at a share ``leave`` of its tokens, by an exit drawn evenly; at a share ``together`` of those steps
    all rows leave by the same exit, at the others each row leaves on its own.
    """
    generator = torch.Generator().manual_seed(seed)

    def share(value: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) < value

    common = share(leave * together, period, 1)
    # Chosen so that the two kinds of steps add up to ``leave``.
    own = share((leave - leave * together) / max(1.0 - leave * together, 1e-9), period, batch)
    places = torch.randint(exits, (period, batch), generator=generator)
    full = torch.full_like(places, exits)
    return torch.where(common, places[:, :1], torch.where(own, places, full))


class DrawnConfidence(ConfidenceEstimator):
    """Confidence 1 at the exits in ``pattern`` (S, B), 0 elsewhere. Its state counts each row's tokens.

    It works on tensors alone, so that programs of the GPU engine can record it; ``pattern`` must be on the same device.
    A step is two look-ups, so its cost is not that of a real estimator.
    """

    needs_logits = False
    needs_features = False
    recurrent = True

    def __init__(self, pattern: Tensor, exits: int) -> None:
        self.pattern, self.exits = pattern, exits
        self.sure = torch.stack([(pattern == exit).float() for exit in range(exits)])  # (E, S, B)
        self.following = torch.arange(1, len(pattern) + 1, device=pattern.device) % len(pattern)
        self.rows = torch.arange(pattern.shape[1], device=pattern.device)

    def confidence(
        self, exit: int, h: Tensor, features: ExitFeatures, state: State | None, padding: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        assert state is not None, "it counts tokens, from what initial_state() made"
        if h.shape[1] == 1:
            return self.sure[exit].gather(0, state[0].t()).t(), (self.following.take(state[0]),)
        steps = torch.arange(h.shape[1], device=h.device)
        at = (state[0] + steps) % len(self.pattern)  # (B, T)
        taken = self.pattern[at, self.rows[: len(h), None]]
        return (taken == exit).float(), (self._after(state, h.shape[1]),)

    def _after(self, state: State, tokens: int) -> Tensor:
        return (state[0] + tokens) % len(self.pattern)

    def advance(
        self, first: int, h: Tensor, features: ExitFeatures, states: list[State] | None, padding: Tensor | None = None
    ) -> list[State] | None:
        if states is None:
            return None
        return states[:first] + [(self._after(state, h.shape[1]),) for state in states[first:]]

    def initial_state(self, batch: int, device: torch.device | str = "cpu") -> list[State] | None:
        return [(torch.zeros(batch, 1, dtype=torch.int64, device=device),) for _ in range(self.exits)]

    def macs(self, exit: int) -> int:
        return 0
