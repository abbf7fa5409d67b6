"""What happened, per token: where it left, what that cost, and what full depth would have cost.

Costs are counted in multiply-accumulates of weights. A counted reduction is not a speed-up: clocks are for benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax_llm.backbones import Costs
from dynamax_llm.decoding.state import StatePolicy
from dynamax_llm.exits.confidence import Judge
from dynamax_llm.exits.readout import Readout


@dataclass(frozen=True)
class TokenCosts:
    """Multiply-accumulates of one token by where it leaves: entry e for exit e, the last entry for full depth."""

    by_exit: tuple[int, ...]
    depths: tuple[int, ...]
    full: int

    @classmethod
    def of(
        cls, costs: Costs, exits: Sequence[int], active: int, judge: Judge, policy: StatePolicy, readout: Readout
    ) -> TokenCosts:
        """``exits`` are depths; the first ``active`` of them are asked. Every cost is in: layers, skipped states,
        each exit's check, state of recurrent heads at exits the token never reached, every readout."""
        n_layers, tail = len(costs.layers), readout.tail_layers
        by_exit = []
        for index, depth in enumerate((*exits, n_layers)):
            leaves = index < len(exits)
            asked = min(index + 1, active)
            checks = sum(judge.macs(e) for e in range(asked))
            if judge.recurrent:
                checks += sum(judge.update_macs(e) for e in range(asked, active))
            # An exit's own readout serves as the token's if it was complete, unless a tail runs between the two.
            looked = sum(readout.look_macs(e) for e in range(asked)) if judge.needs_logits else 0
            reused = leaves and tail == 0 and judge.needs_logits and readout.reads_all(index)
            own = readout.macs(index) if leaves and tail == 0 else costs.readout
            layers = costs.depth(depth)
            if leaves:
                resumed = n_layers - tail
                layers += costs.skipped(depth, resumed) if policy.updates_state else 0
                layers += costs.depth(n_layers) - costs.depth(resumed)
            by_exit.append(layers + checks + looked + (0 if reused else own))
        depths = (*(depth + tail for depth in exits), n_layers)
        return cls(tuple(by_exit), depths, costs.total)


@dataclass(frozen=True)
class Trace:
    """Where each new token left: ``exit_index`` (B, T), len(exits) for full depth, -1 after a row's end."""

    exit_index: Tensor
    costs: TokenCosts
    policy: str

    @property
    def exit_layers(self) -> Tensor:
        """Layers run per token (B, T): 1..L, and 0 after a row's end."""
        table = torch.tensor((*self.costs.depths, 0), device=self.exit_index.device)
        return table[self.exit_index]

    @property
    def n_tokens(self) -> int:
        """New tokens, ends of rows not counted."""
        return int((self.exit_index >= 0).sum())

    @property
    def mean_depth(self) -> float:
        """Mean share of the layers run, 0..1, over all new tokens (the first comes from the full-depth prompt)."""
        return float(self.exit_layers.sum()) / max(self.n_tokens, 1) / self.costs.depths[-1]

    @property
    def histogram(self) -> dict[int, int]:
        """Tokens by layers run."""
        return {d: int((self.exit_index == i).sum()) for i, d in enumerate(self.costs.depths)}

    @property
    def counted_reduction(self) -> float:
        """Share of the full model's multiply-accumulates not spent, every check, readout and state update included.

        Counted, not timed; negative when the checks cost more than the exits saved.
        """
        spent = sum(int((self.exit_index == i).sum()) * cost for i, cost in enumerate(self.costs.by_exit))
        return 1.0 - spent / (max(self.n_tokens, 1) * self.costs.full)
