"""The ``tail`` readout: the last k layers on h at the exit, then final norm and LM head.

The engine runs those layers once a token has left. The decision is taken before, so its features come from final norm
and LM head on h at the exit (the logit lens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from dynamax_llm.errors import UsageError
from dynamax_llm.exits.config import ReadoutOptions
from dynamax_llm.exits.readouts.base import Readout
from dynamax_llm.exits.state import State


@final
@dataclass(frozen=True)
class TailOptions(ReadoutOptions):
    """``tail_layers``: how many of the last layers run."""

    tail_layers: int = 1

    def check(self, layers: Sequence[int], n_layers: int) -> None:
        most = n_layers - max(layers)
        if not 1 <= self.tail_layers <= most:
            raise UsageError(
                f"tail of {self.tail_layers} layers: with the last exit at depth {max(layers)} of {n_layers}, a tail "
                f"may have 1 to {most} layers."
            )


@final
class TailReadout(Readout):
    """Runs the last layers of the backbone between leaving an exit and reading out."""

    Options = TailOptions
    decision_is_output = False

    def transform(
        self, exit: int, h: Tensor, state: State | None = None, padding: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        return h, state
