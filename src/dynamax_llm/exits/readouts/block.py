"""The ``block`` readout: a trained block on h at the exit, then the backbone's frozen final norm and LM head.

Each exit has a block of its own, whose state holds every token: as h_e where the token went past, and as the h with
which it left where it left earlier. Shapes: B batch, T tokens, d width, E exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from dynamax_llm.exits.block_kinds.base import Block, linear
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.features import ExitFeatures
from dynamax_llm.exits.readouts.trained import TrainedReadout, TrainedWeights
from dynamax_llm.exits.state import State


@final
class Blocks(TrainedWeights):
    """Per exit: a matrix that takes h_e into the space of the last layers, the identity at first, and a block."""

    def __init__(self, config: ExitConfig, width: int) -> None:
        options = TrainedReadout.options_of(config)
        super().__init__(options.vocabulary)
        self.enter = nn.ParameterList(nn.Parameter(torch.eye(width)) for _ in config.layers)
        self.blocks = nn.ModuleList(options.new_block(width) for _ in config.layers)

    def block(self, exit: int) -> Block:
        """The block of one exit."""
        block = self.blocks[exit]
        assert isinstance(block, Block)
        return block

    def entered(self, exit: int, h: Tensor) -> Tensor:
        """h (B, T, d) of an exit as its block reads it."""
        return linear(h, self.enter[exit])


@final
class BlockReadout(TrainedReadout):
    """Final norm and LM head of what the exit's block makes of h."""

    learner = "block"

    @classmethod
    def new_weights(cls, config: ExitConfig, width: int) -> Blocks:
        return Blocks(config, width)

    @property
    def _blocks(self) -> Blocks:
        assert isinstance(self.weights, Blocks)
        return self.weights

    @property
    def taps(self) -> tuple[int, ...]:
        return self.config.layers

    def initial_state(self, batch: int, device: torch.device | str = "cpu") -> list[State]:
        return [self._blocks.block(exit).initial_state(batch, device) for exit in range(len(self.config.layers))]

    def transform(
        self, exit: int, h: Tensor, state: State | None = None, padding: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        block = self._blocks.block(exit)
        past = block.initial_state(len(h), h.device) if state is None else state
        return block(self._blocks.entered(exit, h), past, padding)

    def advance(
        self, first: int, h: Tensor, features: ExitFeatures, states: list[State] | None, padding: Tensor | None = None
    ) -> list[State] | None:
        assert states is not None
        later = [
            self._blocks.block(exit).update(self._blocks.entered(exit, h), states[exit], padding)
            for exit in range(first, len(states))
        ]
        return states[:first] + later

    def observe(
        self,
        embedded: Tensor,
        tapped: Sequence[Tensor],
        states: list[State],
        padding: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> list[State]:
        return [
            self._blocks.block(exit).update(self._blocks.entered(exit, h), state, padding, counts)
            for exit, (h, state) in enumerate(zip(tapped, states, strict=True))
        ]

    def transform_macs(self, exit: int) -> int:
        return self._blocks.enter[exit].numel() + self._blocks.block(exit).macs()

    def update_macs(self, exit: int) -> int:
        return self._blocks.enter[exit].numel() + self._blocks.block(exit).update_macs()
