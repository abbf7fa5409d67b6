"""What exits remember of earlier tokens, and the one place where it is copied, rolled back or reordered.

A state is a tuple of tensors with the batch as first axis, one per exit. It is never changed in place, so an older
reference to it is a snapshot.

Shapes: B batch, T tokens, d width, E exits.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax_llm.exits.features import ExitFeatures

#: What one exit remembers of the tokens so far.
State = tuple[Tensor, ...]


class Stateful(abc.ABC):
    """What readouts and confidence estimators have in common: a state per exit, and a cost."""

    #: True if earlier tokens are remembered, so that every token must reach every exit's state once.
    recurrent: bool = False

    def initial_state(self, batch: int, device: torch.device | str = "cpu") -> list[State] | None:
        """One state per exit for ``batch`` new sequences; None if nothing is remembered."""
        return None

    def advance(
        self, first: int, h: Tensor, features: ExitFeatures, states: list[State] | None, padding: Tensor | None = None
    ) -> list[State] | None:
        """States after T tokens that left before exit ``first``: those of exits ``first`` and later advance.

        ``h`` (B, T, d) and ``features`` are those with which the tokens left; ``padding`` (B, T) is 0 at left pads.
        """
        return states

    @abc.abstractmethod
    def macs(self, exit: int) -> int:
        """Multiply-accumulates of one use on one token."""

    def update_macs(self, exit: int) -> int:
        """Multiply-accumulates of advancing this exit's state by one token that left before it."""
        return 0


@dataclass(frozen=True)
class ExitState:
    """What the exits of a batch remember: the estimator's states and the readout's, one per exit; None for nothing."""

    estimator: list[State] | None = None
    readout: list[State] | None = None

    @classmethod
    def initial(
        cls, estimator: Stateful, readout: Stateful, batch: int, device: torch.device | str = "cpu"
    ) -> ExitState:
        """For ``batch`` new sequences."""
        return cls(estimator.initial_state(batch, device), readout.initial_state(batch, device))

    def of(self, exit: int) -> tuple[State | None, State | None]:
        """The estimator's and the readout's state at one exit."""
        return (
            None if self.estimator is None else self.estimator[exit],
            None if self.readout is None else self.readout[exit],
        )

    def with_exit(self, exit: int, estimator: State | None, readout: State | None) -> ExitState:
        """With these states at one exit; None leaves a state as it is."""
        return ExitState(_with(self.estimator, exit, estimator), _with(self.readout, exit, readout))

    def advanced(
        self,
        first: int,
        h: Tensor,
        features: ExitFeatures,
        estimator: Stateful,
        readout: Stateful,
        seen: Tensor | None = None,
    ) -> ExitState:
        """After T tokens that left before exit ``first``; arguments as of ``Stateful.advance``. ``seen`` (B, T, d):
        what the estimator read in place of h."""
        return ExitState(
            estimator.advance(first, h if seen is None else seen, features, self.estimator),
            readout.advance(first, h, features, self.readout),
        )

    def select(self, rows: Tensor) -> ExitState:
        """Rows ``rows`` (B',) of the batch, in that order."""
        return _combined([self], lambda parts: parts[0].index_select(0, rows))

    def put(self, row: int, other: ExitState) -> ExitState:
        """With row ``row`` replaced by row 0 of ``other``: a new sequence takes a slot."""

        def replaced(parts: Sequence[Tensor]) -> Tensor:
            into, new = parts
            return into.index_copy(0, torch.tensor([row], device=into.device), new[:1].to(into))

        return _combined([self, other], replaced)

    @classmethod
    def after(cls, history: Sequence[ExitState], counts: Tensor) -> ExitState:
        """Roll back: each row as it was after its ``counts`` (B,)-th token, from 1; ``history`` has one per token."""
        rows = torch.arange(len(counts), device=counts.device)
        return _combined(history, lambda parts: torch.stack(tuple(parts))[counts - 1, rows])


def _with(states: list[State] | None, exit: int, state: State | None) -> list[State] | None:
    return states if states is None or state is None else [*states[:exit], state, *states[exit + 1 :]]


def _combined(states: Sequence[ExitState], combine: Callable[[Sequence[Tensor]], Tensor]) -> ExitState:
    """One ExitState from the corresponding tensors of several; the first's states where another has none."""

    def field(name: str) -> list[State] | None:
        lists = [getattr(state, name) for state in states]
        if any(each is None for each in lists):
            return lists[0]
        return [
            tuple(combine(parts) for parts in zip(*exit_states, strict=True))
            for exit_states in zip(*lists, strict=True)
        ]

    return ExitState(field("estimator"), field("readout"))
