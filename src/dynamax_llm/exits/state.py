"""What exits remember of the tokens so far: the states of the estimator and of the readout, copied in one place.

States are tuples of tensors with the batch as first axis and are never changed in place, so an old ``ExitState`` is a
snapshot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dynamax_llm.exits.features import ConfidenceEstimator, ExitFeatures, State
from dynamax_llm.exits.readout import Readout


@dataclass(frozen=True)
class ExitState:
    """Per exit, the estimator's and the readout's state; None for one that remembers nothing."""

    estimator: list[State] | None = None
    readout: list[State] | None = None

    @classmethod
    def initial(cls, estimator: ConfidenceEstimator, readout: Readout, batch: int, device: Any) -> ExitState:
        """The state of ``batch`` new sequences."""
        return cls(estimator.initial_state(batch, device), None)

    def of(self, exit: int) -> tuple[State | None, State | None]:
        """The estimator's and the readout's state at one exit."""
        return (
            None if self.estimator is None else self.estimator[exit],
            None if self.readout is None else self.readout[exit],
        )

    def with_exit(self, exit: int, estimator: State | None, readout: State | None) -> ExitState:
        """With other states at one exit."""
        return ExitState(_with(self.estimator, exit, estimator), _with(self.readout, exit, readout))

    def advanced(
        self,
        first: int,
        h: Tensor,
        features: ExitFeatures,
        estimator: ConfidenceEstimator,
        readout: Readout,
        padding: Tensor | None = None,
    ) -> ExitState:
        """After exits ``first`` and later have read tokens that left before them."""
        return replace(self, estimator=estimator.advance(first, h, features, self.estimator, padding))

    def put(self, row: int, other: ExitState) -> ExitState:
        """Row ``row`` replaced by row 0 of ``other``."""
        return ExitState(_put(self.estimator, row, other.estimator), _put(self.readout, row, other.readout))

    @staticmethod
    def after(history: Sequence[ExitState], counts: Tensor) -> ExitState:
        """Each row as it was after its ``counts`` (B,)-th token; ``history`` has one entry per token."""
        rows = torch.arange(len(counts), device=counts.device)

        def pick(states: list[list[State] | None]) -> list[State] | None:
            kept = [item for item in states if item is not None]
            if not kept:
                return None
            return [
                tuple(
                    torch.stack(parts)[counts - 1, rows] for parts in zip(*(moment[e] for moment in kept), strict=True)
                )
                for e in range(len(kept[0]))
            ]

        return ExitState(pick([item.estimator for item in history]), pick([item.readout for item in history]))


def _with(states: list[State] | None, exit: int, state: State | None) -> list[State] | None:
    if states is None or state is None:
        return states
    return [*states[:exit], state, *states[exit + 1 :]]


def _put(states: list[State] | None, row: int, other: list[State] | None) -> list[State] | None:
    if states is None or other is None:
        return states
    made = []
    for state, theirs in zip(states, other, strict=True):
        parts = tuple(part.clone() for part in state)
        for part, source in zip(parts, theirs, strict=True):
            part[row] = source[0]
        made.append(parts)
    return made
