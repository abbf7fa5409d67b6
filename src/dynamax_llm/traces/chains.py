"""What a draft proposes: chains of tokens from positions of whole texts, from which its heads learn.

A chain starts after a token that ran at full depth. It goes on over its own proposals; where a proposal is not the
text's token, what follows is not what decoding would do and is not counted.

Shapes: B rows, T tokens, F forks, J steps, d width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynamax_llm.backbones import Backbone
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
    values, tokens = side_by_side([each[1].values for each in parts]), side_by_side([each[1].token for each in parts])
    rows = [each[1].rows for each in parts if each[1].rows is not None]
    features = ExitFeatures(values, tokens, rows=side_by_side(rows) if rows else None)
    return ExitBatch(masks, (moved,), (features,), agreed[None], target, agreed[None].float())
