"""A second look: what exits show, and what stopping there gives, while exits are on and the state is ``propagate``'s.

The frozen forward of ``exit batch`` has every state intact. Decoding has not: a token that leaves early leaves h_e in
the layers above, and later tokens read that. So heads that have learned from the first go on to learn from texts
decoded with themselves in charge (DAgger, arXiv 1011.0686): one teacher-forced pass, in which their own verdicts decide
who leaves, gives the h, the statistics and the token of every exit as decoding would. Labels compare that token with
the full model's, whose state is intact.

Shapes: B rows, T tokens, E exits, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.engines.plan import POLICIES, ExitPlan
from dynamax_llm.exits.features import ConfidenceEstimator, ExitFeatures
from dynamax_llm.exits.readout import Readout
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.collect import ExitBatch, forward
from dynamax_llm.traces.labels import Labels
from dynamax_llm.traces.packing import Packing
from dynamax_llm.traces.simulate import ThresholdSample
from dynamax_llm.traces.teacher_forced import visits


@torch.no_grad()
def collect_on_policy(
    backbone: Backbone, readout: Readout, estimator: ConfidenceEstimator, batch: Batch, draw: ThresholdSample
) -> ExitBatch:
    """What the exits show of a batch that is decoded by ``estimator`` with the thresholds of ``draw``.

    A token that left is shown to later exits as it was when it left, so ``simulate_exits`` with the same estimator and
    draw lets the same tokens leave. Their labels there mean nothing, and nothing reads them.
    """
    real = Packing.of(batch.mask, backbone.device)
    labels = Labels(backbone, readout, forward(backbone, (), batch.ids).final, real)
    plan = ExitPlan(readout.config.layers, estimator, readout, POLICIES.lookup("propagate"))
    threshold, start = draw.threshold.to(backbone.device), draw.start.to(backbone.device)
    hidden: list[Tensor] = []
    shown: list[ExitFeatures] = []
    found: list[tuple[Tensor, Tensor]] = []
    ids = batch.ids.to(backbone.device)
    for exit, visit in enumerate(visits(backbone, plan, ids, [threshold] * len(plan.layers), prompt_length=start)):
        spoken = readout.features(exit, visit.h, visit.h, None)[1] if visit.spoken is None else visit.spoken
        hidden.append(visit.h)
        shown.append(visit.features)
        found.append(labels.of(exit, visit.h, visit.ctx, real.pack(spoken)))
    agree, targets = (torch.stack(part) for part in zip(*found, strict=True))
    return ExitBatch(real.mask, tuple(hidden), tuple(shown), agree, real.unpack(labels.target), targets)
