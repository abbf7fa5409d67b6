"""The drift penalty: disagreements among later tokens caused by the approximate state of a token that left.

An exit's confidence estimates the probability that its own token agrees. Under ``propagate``, ``copy`` and ``stale``
later tokens also read the states that a skipped layer got from h_e, and the earlier the exit, the worse. Measured per
exit, this cost is taken off a token's confidence before it is compared with a threshold.

Shapes: E exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from dynamax_llm.backbones import Backbone
from dynamax_llm.engines.plan import ExitPlan
from dynamax_llm.progress import Advance, unwatched
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.collect import collect_exits
from dynamax_llm.traces.simulate import simulate_no_exit
from dynamax_llm.traces.teacher_forced import force_text

#: Share of the tokens, those of highest confidence, that leave at one exit alone while its drift penalty is measured.
LEAVING = 0.2


@torch.no_grad()
def drift_penalty(
    backbone: Backbone,
    plan: ExitPlan,
    batches: Sequence[tuple[Batch, int]],
    most_tokens: float = float("inf"),
    advance: Advance = unwatched,
) -> tuple[float, ...]:
    """Per exit of ``plan`` (E,), later disagreements that one token causes by leaving there under the plan's policy.

    ``batches`` come with the number of tokens that each row's prompt has; measuring stops after ``most_tokens``. Each
    exit is opened alone, for about ``LEAVING`` of the tokens. What those get wrong with every state intact is not
    counted. ``advance`` counts passes over a batch.
    """
    count = len(plan.layers)
    left, caused = [0] * count, [0] * count
    ends = accumulate(batch.tokens for batch, _ in batches)
    measured = [item for item, end in zip(batches, ends, strict=True) if end - item[0].tokens < most_tokens]
    for number, (batch, prompt) in enumerate(measured):
        done, total = number * (count + 1) + 1, len(measured) * (count + 1)
        shown = collect_exits(backbone, plan.readout, batch)
        advance(done, total)
        counted = shown.mask.clone()
        counted[:, :prompt] = False
        if not bool(counted.any()):
            continue
        confidence = simulate_no_exit(plan.estimator, shown).confidence
        for exit in range(count):
            threshold = float(confidence[exit][counted].quantile(1.0 - LEAVING))
            alone = [threshold if index == exit else None for index in range(count)]
            forced = force_text(backbone, plan, batch.ids.to(backbone.device), alone, prompt_length=prompt)
            leaving = (forced.exit_index == exit) & counted
            left[exit] += int(leaving.sum())
            caused[exit] += int(((forced.tokens != shown.target) & counted).sum())
            caused[exit] -= int((leaving & ~shown.labels[exit]).sum())
            advance(done + exit + 1, total)
    return tuple(max(0.0, extra / max(number, 1)) for extra, number in zip(caused, left, strict=True))
