"""What exits show, and what stopping there gives, while exits are on and the states are those of ``propagate``.

``collect_exits`` has every state intact. Decoding has not: a token that leaves early leaves h_e in the layers above,
and later tokens read that. So heads that have learned from intact states go on to learn from texts decoded with
themselves in charge (DAgger, arXiv 1011.0686): one teacher-forced pass gives the h, features and token of every exit
as decoding would. Labels compare that token with the full model's, whose states are intact.
"""

from __future__ import annotations

import torch

from dynamax_llm.backbones import Backbone
from dynamax_llm.engines.plan import POLICIES, ExitPlan
from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.readouts.base import Readout
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.collect import Collector, ExitBatch, forward
from dynamax_llm.traces.labels import ACTION, Label
from dynamax_llm.traces.simulate import ThresholdSample
from dynamax_llm.traces.teacher_forced import visits


@torch.no_grad()
def collect_on_policy(
    backbone: Backbone,
    readout: Readout,
    estimator: ConfidenceEstimator,
    batch: Batch,
    sample: ThresholdSample,
    label: Label = ACTION,
) -> ExitBatch:
    """What the exits show of a batch that is decoded by ``estimator`` with the thresholds of ``sample``.

    Later exits read a token that left as it was when it left, so ``simulate_exits`` with the same estimator and sample
    lets the same tokens leave. Their labels at later exits are undefined, and no loss reads them.
    """
    collector = Collector(backbone, readout, batch, forward(backbone, (), batch.ids).final, label)
    plan = ExitPlan(readout.config.layers, estimator, readout, POLICIES.lookup("propagate"))
    threshold, start = sample.threshold.to(backbone.device), sample.start.to(backbone.device)
    ids = batch.ids.to(backbone.device)
    for exit, visit in enumerate(visits(backbone, plan, ids, [threshold] * len(plan.layers), prompt_length=start)):
        tokens = visit.tokens
        if tokens is None:
            tokens = readout.features(exit, visit.h, visit.h, None, visit.moved)[1]
        collector.add(visit.h, visit.moved, visit.features, collector.packing.pack(tokens))
    return collector.finish()
