"""What happened, per token: where it left, what that cost, and what full depth would have cost.

Costs are counted in multiply-accumulates of weights. A counted reduction is not a speed-up: clocks are for benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax_llm.backbones import Costs
from dynamax_llm.engines.base import DecodeStats
from dynamax_llm.engines.plan import ExitPlan


@dataclass(frozen=True)
class TokenCosts:
    """Multiply-accumulates of one token by where it leaves: entry e for exit e, the last entry for full depth."""

    by_exit: tuple[int, ...]
    checks: tuple[int, ...]  # the part of ``by_exit`` that is not in layers: checks and readouts
    depths: tuple[int, ...]
    full: int
    readout: int  # one complete readout

    @classmethod
    def of(cls, costs: Costs, plan: ExitPlan) -> TokenCosts:
        """Every cost is in: layers, skipped states, each exit's check, state of recurrent heads at exits the token
        never reached, every readout."""
        exits, active, estimator, policy, readout = plan.layers, plan.active, plan.estimator, plan.policy, plan.readout
        n_layers, tail = len(costs.layers), readout.tail_layers
        by_exit, overhead = [], []
        for index, depth in enumerate((*exits, n_layers)):
            leaves = index < len(exits)
            # A draft is not asked of a token that goes deep: the chain has ended before it.
            asked = min(index + 1, active) if leaves or not readout.drafts else 0
            checks = sum(estimator.macs(e) for e in range(asked))
            if estimator.recurrent:
                checks += sum(estimator.update_macs(e) for e in range(asked, active))
            if readout.drafts:  # tokens that were checked are read again, with the backbone's features
                checks += readout.update_macs(0) if active else 0
            elif readout.recurrent:
                checks += sum(readout.update_macs(e) for e in range(asked, active))
            # An exit's own readout serves as the token's if it was complete, unless a tail runs between the two.
            looked = sum(readout.read_macs(e) for e in range(asked)) if estimator.needs_logits else 0
            reused = leaves and tail == 0 and estimator.needs_logits and readout.reads_all(index)
            own = readout.macs(index) if leaves and tail == 0 else costs.readout
            layers = costs.depth(depth)
            if leaves:
                resumed = n_layers - tail
                layers += costs.skipped(depth, resumed) + readout.skip_macs(index) if policy.updates_state else 0
                layers += costs.depth(n_layers) - costs.depth(resumed)
            overhead.append(checks + looked + (0 if reused else own))
            by_exit.append(layers + overhead[-1])
        depths = (*(depth + tail for depth in exits), n_layers)
        return cls(tuple(by_exit), tuple(overhead), depths, costs.total, costs.readout)

    def layers(self, exit_index: Tensor) -> Tensor:
        """Layers run by tokens that left where ``exit_index`` says: 1..L, 0 for a draft's own and where it is -1."""
        return torch.tensor((*self.depths, 0), device=exit_index.device)[exit_index]


@dataclass(frozen=True)
class Trace:
    """Where each new token left: ``exit_index`` (B, T), len(exits) for full depth, -1 after a row's end."""

    exit_index: Tensor
    costs: TokenCosts
    policy: str
    stats: DecodeStats

    @property
    def exit_layers(self) -> Tensor:
        """Layers run per token until it was decided (B, T): 1..L, 0 for a draft's own, and 0 after a row's end."""
        return self.costs.layers(self.exit_index)

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

        Counted, not timed; negative when the checks cost more than the exits saved. Under ``defer`` and ``verify``
        nearly every layer runs for every token sooner or later: what they save is passes, not multiplications.
        """
        if self.stats.layer_macs is None or self.stats.left_at is None:
            spent = _total(self.exit_index, self.costs.by_exit)
        else:
            spent = len(self.exit_index) * self.costs.by_exit[-1]  # the first tokens, from the prompt's own pass
            spent += self.stats.layer_macs + _total(self.stats.left_at, self.costs.checks)
            spent += self.stats.readouts * self.costs.readout
        return 1.0 - spent / (max(self.n_tokens, 1) * self.costs.full)

    @property
    def pass_reduction(self) -> float:
        """Share of the layer passes of full-depth decoding that were not made; the prompt is apart.

        A pass reads one layer's weights once, for all rows and all tokens that go through. Counted, not timed; state
        updates of skipped layers are not passes, though for Mamba layers they read a good third of the weights.
        """
        steps = self.exit_index.shape[1] - 1
        return 1.0 - self.stats.passes / (steps * self.costs.depths[-1]) if steps else 0.0


def _total(exit_index: Tensor, costs: Sequence[int]) -> int:
    return sum(int((exit_index == index).sum()) * cost for index, cost in enumerate(costs))
