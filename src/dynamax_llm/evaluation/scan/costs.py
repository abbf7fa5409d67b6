"""What a draft's steps and passes over several tokens cost here, timed: the ratio decides whether a draft pays."""

from __future__ import annotations

import functools
import statistics
from typing import Any

import torch

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.draft_choice import ChainCosts
from dynamax_llm.evaluation.common.timing import seconds
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.readouts.draft import DraftOptions
from dynamax_llm.exits.registries import READOUTS

#: Tokens before the timed ones; passes that are timed, by tokens; calls of each, in turns.
CONTEXT, WIDTHS, REPEATS = 64, (1, 2, 3, 4, 6, 8, 9), 5


def draft_taps(backbone: Backbone) -> tuple[int, ...]:
    """The depths whose h such a draft reads."""
    options = draft_config(backbone).readout_options
    assert isinstance(options, DraftOptions)
    return options.taps


def draft_config(backbone: Backbone) -> ExitConfig:
    """A draft as training makes it by default."""
    config = ExitConfig.from_options(
        (0,), backbone.n_layers, readout="draft", vocabulary=min(16384, backbone.vocab_size)
    )
    return READOUTS.lookup("draft").fitted(config, backbone)


@torch.no_grad()
def measure_chain_costs(backbone: Backbone) -> tuple[ChainCosts, float]:
    """Costs over a pass of one token, and the seconds of that pass. Passes run layer by layer after CONTEXT tokens,
    steps are those of an untrained draft; medians over rounds, so that a slow moment touches every width alike."""
    device = backbone.device
    config = draft_config(backbone)
    kind: Any = READOUTS.lookup("draft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        readout = kind(backbone, config, kind.new_weights(config, backbone.width).to(device))
    state = readout.initial_state(1, device)[0]
    passes = _Passes(backbone)
    passes.run(CONTEXT)
    embedded = backbone.embed(torch.ones(1, 1, dtype=torch.int64, device=device))
    times: dict[int, list[float]] = {width: [] for width in WIDTHS}
    drafts: list[float] = []
    for turn in range(REPEATS + 1):  # the first turn warms up
        for width in WIDTHS:
            spent = seconds(functools.partial(passes.run, width), device)
            times[width] += [spent] if turn else []
        spent = seconds(lambda: readout.scores(0, readout.transform(0, embedded, state)[0]).argmax(-1), device)
        drafts += [spent] if turn else []
    medians = {width: statistics.median(found) for width, found in times.items()}
    one = medians[1]
    costs = tuple(_between(medians, width) / one for width in range(1, max(WIDTHS) + 1))
    return ChainCosts(draft=statistics.median(drafts) / one, passes=costs), one


class _Passes:
    """Passes over one row whose cache grows."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.cache, self.past = backbone, backbone.new_cache(1), 0

    def run(self, count: int) -> torch.Tensor:
        """A pass over ``count`` more tokens, and their argmax."""
        backbone = self.backbone
        h = backbone.embed(torch.arange(count, device=backbone.device)[None] % backbone.vocab_size)
        ctx = backbone.context(h, past=self.past)
        for index in range(backbone.n_layers):
            h = backbone.layer(index, h, self.cache, ctx)
        self.past += count
        return backbone.readout(h).argmax(-1)


def _between(medians: dict[int, float], width: int) -> float:
    """The median at a width, or on the line between its neighbours."""
    if width in medians:
        return medians[width]
    below, above = max(w for w in medians if w < width), min(w for w in medians if w > width)
    share = (width - below) / (above - below)
    return medians[below] * (1 - share) + medians[above] * share
