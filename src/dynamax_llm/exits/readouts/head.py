"""The ``head`` readout: the backbone's final norm and LM head on h at the exit."""

from __future__ import annotations

from typing import final

from torch import Tensor

from dynamax_llm.exits.readouts.base import Readout
from dynamax_llm.exits.state import State


@final
class HeadReadout(Readout):
    """Nothing but final norm and LM head."""

    def transform(
        self, exit: int, h: Tensor, state: State | None = None, padding: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        return h, state
