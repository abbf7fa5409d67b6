"""What a draft proposes: chains of tokens from positions of whole texts, and the lengths that pay.

A chain starts after a token that ran at full depth. It goes on over its own proposals; where a proposal is not the
text's token, what follows is not what decoding would do and is not counted.

Shapes: B rows, T tokens, F forks, J steps, d width, N chains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynamax_llm.backbones import Backbone
from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.features import ExitFeatures
from dynamax_llm.exits.readouts.base import Readout
from dynamax_llm.exits.readouts.draft import DraftReadout, DraftWeights
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.collect import ExitBatch, hidden_at
from dynamax_llm.traces.labels import argmax

#: Steps of the chains that are collected, and how many tokens lie between their starts, about.
STEPS, EVERY = 8, 4


def chain(
    weights: DraftWeights, taps: Sequence[int], hidden: Mapping[int, Tensor], forks: Tensor, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """A draft's outputs (B, F, d) over ``steps`` tokens from each fork of whole texts, and the positions (F,) of those
    tokens; ``hidden`` is h (B, T, d) by depth. The tokens read are the text's own."""
    mixed = weights.mixed([hidden[tap] for tap in taps])
    features = nn.functional.pad(mixed, (0, 0, 1, 0))[:, :-1]
    outputs, fork = weights.block.fork(weights.joined(hidden[0], features), forks)
    for step in range(steps):
        if step:
            outputs = fork.step(weights.joined(hidden[0][:, forks + step], outputs))
        yield outputs, forks + step


@torch.no_grad()
def collect_chains(
    backbone: Backbone, readout: Readout, batch: Batch, steps: int = STEPS, every: int = EVERY
) -> ExitBatch:
    """The chains of a batch as an ExitBatch of one exit: (B, F J), a fork's steps side by side; about one fork in
    ``every`` tokens, where the block can fork.

    ``mask``: the steps that decoding would reach, each proposal before them having been the text's token; ``labels``:
    whether the proposal is the full model's token.
    """
    assert isinstance(readout, DraftReadout) and isinstance(readout.weights, DraftWeights)
    count = batch.ids.shape[1]
    steps = min(steps, count)
    hidden = hidden_at(backbone, (0, *readout.taps), batch.ids)
    device = hidden[0].device
    generator = torch.Generator().manual_seed(0)
    forks = readout.weights.block.forks(count - steps + 1, every, generator).to(device)
    final = hidden[backbone.n_layers]
    full = argmax(backbone, final.flatten(0, 1)).view(final.shape[:2])  # (B, T)
    ids = batch.ids.to(device)
    counted = (batch.mask if batch.answers is None else batch.answers).to(device)
    reached = counted[:, forks]
    parts: list[tuple[Tensor, ExitFeatures, Tensor, Tensor, Tensor]] = []
    for outputs, positions in chain(readout.weights, readout.taps, hidden, forks, steps):
        embedded = hidden[0][:, positions]
        features, tokens = readout.features(0, embedded, embedded, None, outputs)
        agrees = tokens == full[:, positions]
        parts.append((outputs, features, agrees, full[:, positions], reached & counted[:, positions]))
        following = (positions + 1).clamp(max=count - 1)
        reached = parts[-1][4] & (tokens == ids[:, following]) & (positions + 1 < count)

    def side_by_side(values: Sequence[Any]) -> Tensor:
        return torch.stack(tuple(values), dim=2).flatten(1, 2)  # (B, F J, ...)

    moved, agreed, target, masks = (side_by_side([each[place] for each in parts]) for place in (0, 2, 3, 4))
    rows = [each[1].rows for each in parts if each[1].rows is not None]
    features = ExitFeatures(
        side_by_side([each[1].values for each in parts]), None, rows=side_by_side(rows) if rows else None
    )
    return ExitBatch(masks, (moved,), (features,), agreed[None], target, agreed[None].float())


@dataclass(frozen=True)
class ChainTrace:
    """Chains of held-out text: per step the confidence (N, J), and whether the proposal was accepted, (N, J); a step
    after a refused one is not accepted."""

    confidence: Tensor
    accepted: Tensor

    @classmethod
    def of(cls, batches: Sequence[ExitBatch], estimator: ConfidenceEstimator, steps: int) -> ChainTrace:
        """From collected chains of ``steps`` steps each; those whose first step does not count are left out."""
        confidences, accepted = [], []
        for batch in batches:
            confidence, _ = estimator.confidence(0, batch.hidden[0], batch.features[0], None)
            rows = [part.unflatten(1, (-1, steps)).flatten(0, 1) for part in (confidence, batch.labels[0], batch.mask)]
            first = rows[2][:, 0]
            holds = (rows[1] & rows[2])[first].long().cumprod(1).bool()
            confidences.append(rows[0][first].float().cpu())
            accepted.append(holds.cpu())
        return cls(torch.cat(confidences), torch.cat(accepted))

    @property
    def match(self) -> list[float]:
        """Per step, the share of proposals accepted where all before were."""
        reached = torch.cat((torch.ones_like(self.accepted[:, :1]), self.accepted[:, :-1]), dim=1)
        hits, tries = self.accepted.sum(0).double(), reached.sum(0).double()
        return (hits / tries.clamp(min=1)).tolist()

    def lengths(self, threshold: float, most: int) -> Tensor:
        """Proposals (N,) of a chain that goes on while the product of confidences is at least ``threshold``."""
        goes_on = (self.confidence.cumprod(1) >= threshold)[:, : most - 1].long().cumprod(1)
        return 1 + goes_on.sum(1)

    def outcome(self, threshold: float, most: int) -> tuple[float, Tensor]:
        """Mean tokens per verification, and the shares (most,) of chains with 1, 2, … ``most`` proposals."""
        lengths = self.lengths(threshold, most)
        within = torch.arange(self.accepted.shape[1]) < lengths.unsqueeze(1)
        tokens = 1.0 + float((self.accepted & within).sum(1).double().mean())
        return tokens, torch.bincount(lengths - 1, minlength=most).double() / len(lengths)


@dataclass(frozen=True)
class ChainCosts:
    """Costs in units of a full step over one token: of a draft step, and of passes over 1, 2, … tokens."""

    draft: float
    passes: tuple[float, ...]

    def window(self, proposals: int) -> float:
        """The cost of so many proposals and their verification."""
        return proposals * self.draft + self.passes[min(proposals, len(self.passes) - 1)]


#: Thresholds from which the best is chosen.
GRID = tuple(index / 40 for index in range(41))


@dataclass(frozen=True)
class ChainChoice:
    """The threshold that gives most tokens for their cost, and what it gives by the trace."""

    threshold: float
    tokens: float  # a verification
    proposals: float  # a verification
    speed_up: float  # over full steps; below 1 the draft does not pay


def best_threshold(trace: ChainTrace, costs: ChainCosts, most: int) -> ChainChoice:
    """The expected-gain rule: of thresholds in GRID, the one with most tokens per cost; chains of 1 to ``most``."""
    most = min(most, trace.confidence.shape[1], len(costs.passes) - 1)
    windows = torch.tensor([costs.window(count) for count in range(1, most + 1)], dtype=torch.float64)
    found = []
    for threshold in GRID:
        tokens, shares = trace.outcome(threshold, most)
        proposals = float((shares * torch.arange(1, most + 1)).sum())
        found.append(ChainChoice(threshold, tokens, proposals, tokens / float((shares * windows).sum())))
    return max(found, key=lambda choice: choice.speed_up)
