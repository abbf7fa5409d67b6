"""What a token that leaves does to later ones: disagreements caused through the approximate state it leaves behind.

An exit's confidence is the probability that its own token agrees. Under ``propagate`` that is not all: later tokens
read what a skipped layer made of h_e, and the earlier the exit, the worse. So it is measured, exit by exit, and one
threshold then bounds what a token costs altogether: it leaves if its confidence, less what leaving there disturbs, is
high enough.

Shapes: E exits.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dynamax_llm.backbones import Backbone
from dynamax_llm.engines.plan import POLICIES, ExitPlan
from dynamax_llm.exits.features import ConfidenceEstimator
from dynamax_llm.exits.readout import Readout
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.collect import collect_exits
from dynamax_llm.traces.simulate import simulate_no_exit
from dynamax_llm.traces.teacher_forced import teacher_forced

#: Share of the tokens, its surest, that leave at one exit alone while its drift penalty is measured.
LEAVING = 0.2
#: Held-out tokens that it is measured on.
TOKENS = 4_000


@torch.no_grad()
def drift_penalty(
    backbone: Backbone, readout: Readout, estimator: ConfidenceEstimator, batches: Iterable[Batch]
) -> tuple[float, ...]:
    """Per exit (E,), later disagreements that one token causes by leaving there under ``propagate``.

    Every exit is opened alone, for about ``LEAVING`` of the tokens. What those get wrong by themselves, with every
    state intact, is not counted.
    """
    count = len(readout.config.layers)
    plan = ExitPlan(readout.config.layers, estimator, readout, POLICIES.lookup("propagate"))
    left, caused = [0] * count, [0] * count
    tokens = 0
    for batch in batches:
        seen = collect_exits(backbone, readout, batch)
        confidence = simulate_no_exit(estimator, seen).confidence
        for exit in range(count):
            bar = float(confidence[exit][seen.mask].quantile(1.0 - LEAVING))
            only = [bar if place == exit else None for place in range(count)]
            found = teacher_forced(backbone, plan, batch.ids.to(backbone.device), only, prompt_length=0)
            leaving = (found.exit_index == exit) & seen.mask
            own = leaving & ~(seen.labels[exit])
            left[exit] += int(leaving.sum())
            caused[exit] += int(((found.tokens != seen.target) & seen.mask).sum()) - int(own.sum())
        tokens += batch.tokens
        if tokens >= TOKENS:
            break
    return tuple(max(0.0, extra / max(gone, 1)) for extra, gone in zip(caused, left, strict=True))
