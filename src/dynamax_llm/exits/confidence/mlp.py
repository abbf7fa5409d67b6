"""The MLP exit head."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dynamax_llm.exits.confidence.bank import Bank, project
from dynamax_llm.exits.state import State


class MlpBank(Bank):
    """Down-projection to w, GELU layer of 2 w, logit."""

    default_width = 96

    def __init__(self, n_exits: int, inputs: int, width: int) -> None:
        super().__init__(n_exits, inputs, width)
        self.embed, self.embed_bias = self.matrix(inputs, width), self.constant(1, width)
        self.up, self.up_bias = self.matrix(width, 2 * width), self.constant(1, 2 * width)
        self.out, self.out_bias = self.constant(2 * width, 1), self.constant(1, 1)

    def forward(self, exits: slice, x: Tensor, state: State | None, padding: Tensor | None) -> tuple[Tensor, State]:
        x = project(x, self.embed[exits], self.embed_bias[exits])
        x = F.gelu(project(x, self.up[exits], self.up_bias[exits]))
        return project(x, self.out[exits], self.out_bias[exits]).squeeze(-1), ()

    def macs(self) -> int:
        return self.inputs * self.width + 2 * self.width * self.width + 2 * self.width
