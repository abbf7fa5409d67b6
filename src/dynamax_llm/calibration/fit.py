"""The path of one set of exits on one backbone, learnt on sequences that are used for nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dynamax_llm.calibration.path import Path, learn_path, trace_of
from dynamax_llm.calibration.prompts import Item
from dynamax_llm.calibration.risks import Risk, TextRisk
from dynamax_llm.decoding.generate import DEFAULT_POLICY, EarlyExit
from dynamax_llm.engines.plan import DEFAULT_WINDOW, POLICIES, ExitPlan
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.text.batches import pad
from dynamax_llm.traces.drift import drift_penalty

#: Where a promise is about texts, the share of its limit that tokens may disagree: after its first different token a
#: text differs throughout, so over some tens of tokens a loss of texts takes far fewer of the tokens.
TEXT_SHARE = 0.1


@torch.no_grad()
def fit_path(exits: Exits, risk: Risk, limit: float, how: Mapping[str, Any], parameters: Sequence[float]) -> Path:
    """Learn the path for a mean loss of at most ``limit`` on the sequences of ``risk``; where it generates text, on
    the full model's own text. ``how`` are EarlyExit's policy, window and measure."""
    backbone, estimator = risk.backbone, exits.estimator(how.get("measure"))
    if isinstance(estimator, torch.nn.Module):
        estimator.to(backbone.device)
    if isinstance(risk, TextRisk):
        limit *= TEXT_SHARE
        rows, _ = risk.generate(EarlyExit(exits, **{**how, "threshold": "never"}))
        pairs = zip(risk.items, rows, strict=True)
        items = [Item((*item.ids[: item.prompt], *row), item.prompt) for item, row in pairs]
    else:
        items = risk.items
    items = sorted(items, key=lambda item: item.prompt)  # a batch counts what follows its longest prompt
    groups = [items[start : start + risk.batch] for start in range(0, len(items), risk.batch)]
    batches = [(pad([list(item.ids) for item in group]), max(item.prompt for item in group)) for group in groups]
    plan = ExitPlan(
        exits.config.layers,
        estimator,
        exits.readout(backbone),
        POLICIES.lookup(how.get("policy", DEFAULT_POLICY)),
        how.get("window", DEFAULT_WINDOW),
    )
    trace = trace_of(backbone, plan.readout, estimator, batches)
    return learn_path(replace(trace, drift_penalty=drift_penalty(backbone, plan, batches)), limit, parameters)
