"""The ``block`` readout: a trained block on h at the exit, then the backbone's frozen final norm and LM head.

Each exit has a block of its own, whose state holds every token: as h_e where the token went past, and as the h with
which it left where it left earlier. Shapes: B batch, T tokens, d width, E exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from dynamax_llm.errors import UsageError
from dynamax_llm.exits.block_kinds.base import Block, linear
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.features import ExitFeatures
from dynamax_llm.exits.readouts.state_map import StateMap
from dynamax_llm.exits.readouts.trained import TrainedOptions, TrainedReadout, TrainedWeights
from dynamax_llm.exits.state import State


@final
@dataclass(frozen=True)
class BlockOptions(TrainedOptions):
    """``state_rank``: the rank of the learned state update (``state_map``); 0: skipped layers read h_e itself."""

    state_rank: int = 0

    def check(self, layers: Sequence[int], n_layers: int) -> None:
        super().check(layers, n_layers)
        if self.state_rank < 0:
            raise UsageError(f"state_rank {self.state_rank}: give the rank of the learned state update, or 0 for none.")


@final
class Blocks(TrainedWeights):
    """Per exit: a matrix that takes h_e into the space of the last layers, the identity at first, and a block."""

    def __init__(self, config: ExitConfig, width: int) -> None:
        options = config.readout_options
        assert isinstance(options, BlockOptions)
        super().__init__(options.vocabulary)
        self.enter = nn.ParameterList(nn.Parameter(torch.eye(width)) for _ in config.layers)
        self.blocks = nn.ModuleList(options.new_block(width) for _ in config.layers)
        rank = options.state_rank
        self.maps = nn.ModuleList(
            StateMap(layer, config.n_layers, width, rank) for layer in (config.layers if rank else ())
        )

    def block(self, exit: int) -> Block:
        """The block of one exit."""
        block = self.blocks[exit]
        assert isinstance(block, Block)
        return block

    def state_map(self, exit: int) -> StateMap | None:
        """The learned state update of one exit."""
        found = self.maps[exit] if len(self.maps) else None
        assert found is None or isinstance(found, StateMap)
        return found

    def entered(self, exit: int, h: Tensor) -> Tensor:
        """h (B, T, d) of an exit as its block reads it."""
        return linear(h, self.enter[exit])


@final
class BlockReadout(TrainedReadout):
    """Final norm and LM head of what the exit's block makes of h."""

    Options = BlockOptions
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

    def skip_code(self, exit: int, h: Tensor, moved: Tensor) -> Tensor | None:
        found = self._blocks.state_map(exit)
        return None if found is None else found.code(h, moved)

    def skip_input(self, exit: int, layer: int, h: Tensor, code: Tensor) -> Tensor:
        found = self._blocks.state_map(exit)
        assert found is not None
        return found.entering(layer, h, code)

    def skip_macs(self, exit: int) -> int:
        found = self._blocks.state_map(exit)
        return 0 if found is None else found.macs()

    def transform_macs(self, exit: int) -> int:
        return self._blocks.enter[exit].numel() + self._blocks.block(exit).macs()

    def update_macs(self, exit: int) -> int:
        return self._blocks.enter[exit].numel() + self._blocks.block(exit).update_macs()
