"""The Transformer exit head, recurrent over the tokens of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamax_llm.exits.blocks import windowed_attention
from dynamax_llm.exits.confidence.bank import Bank, project, unit_rms
from dynamax_llm.exits.state import State


class TransformerBank(Bank):
    """One pre-norm block: causal attention over the last WINDOW tokens and feed-forward, then the logit."""

    recurrent = True
    default_width = 66
    WINDOW = 64
    HEADS = 2

    def __init__(self, n_exits: int, inputs: int, width: int) -> None:
        super().__init__(n_exits, inputs, width)
        self.embed, self.embed_bias = self.matrix(inputs, width), self.constant(1, width)
        self.qkv, self.distance = self.matrix(width, 3 * width), self.constant(self.HEADS, self.WINDOW)
        self.mix = self.matrix(width, width)
        self.up, self.up_bias = self.matrix(width, 2 * width), self.constant(1, 2 * width)
        self.down = self.matrix(2 * width, width)
        self.out, self.out_bias = self.constant(width, 1), self.constant(1, 1)

    def forward(self, exits: slice, x: Tensor, state: State | None, padding: Tensor | None) -> tuple[Tensor, State]:
        x = project(x, self.embed[exits], self.embed_bias[exits])
        q, k, v = project(unit_rms(x), self.qkv[exits]).unflatten(-1, (3 * self.HEADS, -1)).chunk(3, dim=3)
        past, valid = self.past(exits, x, state), self._valid(x, padding)
        y, after = windowed_attention(q, k, v, valid, self.distance[exits], past)
        x = x + project(y.flatten(-2), self.mix[exits])
        x = x + project(F.gelu(project(unit_rms(x), self.up[exits], self.up_bias[exits])), self.down[exits])
        return project(unit_rms(x), self.out[exits], self.out_bias[exits]).squeeze(-1), after

    def advance(self, exits: slice, x: Tensor, state: State, padding: Tensor | None) -> State:
        x = project(x, self.embed[exits], self.embed_bias[exits])
        kv = project(unit_rms(x), self.qkv[exits][..., self.width :]).unflatten(-1, (2 * self.HEADS, -1))
        fresh = (*kv.chunk(2, dim=3), self._valid(x, padding))
        keep = self.WINDOW - 1
        return tuple(torch.cat(pair, dim=2)[:, :, -keep:] for pair in zip(state, fresh, strict=True))

    def _valid(self, x: Tensor, padding: Tensor | None) -> Tensor:
        return x.new_ones(x.shape[:3]) if padding is None else padding.to(x.dtype).expand(x.shape[0], -1, -1)

    def initial_state(self, batch: int, device: torch.device | str) -> State:
        kv = (self.n_exits, batch, self.WINDOW - 1, self.HEADS, self.width // self.HEADS)
        return tuple(torch.zeros(shape, device=device) for shape in (kv, kv, kv[:3]))

    def macs(self) -> int:
        block = (3 + 1 + 2 + 2) * self.width**2 + 2 * self.WINDOW * self.width
        return self.inputs * self.width + block + self.width

    def update_macs(self) -> int:
        return self.inputs * self.width + 2 * self.width**2
