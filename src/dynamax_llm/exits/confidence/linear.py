"""The linear exit head."""

from __future__ import annotations

from torch import Tensor

from dynamax_llm.exits.confidence.bank import Bank, project
from dynamax_llm.exits.state import State


class LinearBank(Bank):
    """One logit, straight from the inputs."""

    def __init__(self, n_exits: int, inputs: int, width: int) -> None:
        super().__init__(n_exits, inputs, width)
        self.weight, self.bias = self.constant(inputs, 1), self.constant(1, 1)

    def forward(self, exits: slice, x: Tensor, state: State | None, padding: Tensor | None) -> tuple[Tensor, State]:
        return project(x, self.weight[exits], self.bias[exits]).squeeze(-1), ()

    def macs(self) -> int:
        return self.inputs
