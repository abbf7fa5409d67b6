"""The path of one set of exits on one backbone, from sequences that serve nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dynamax_llm.calibration.path import Path, Trace, learn_path, trace_of
from dynamax_llm.calibration.prompts import Item
from dynamax_llm.calibration.risks import AgreementRisk, Risk, TextRisk
from dynamax_llm.decoding.generate import EarlyExit
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.readout import Readout
from dynamax_llm.text.batches import pad

#: The λ that are looked at: two per cent of what could be saved at all apart.
PARAMETERS = tuple(step / 50 for step in range(1, 51))
#: Where a promise speaks of texts, the aim for tokens: a text that differs once goes its own way, so that over some
#: tens of tokens a loss of texts takes far fewer of the tokens.
TEXT_SHARE = 0.1
#: Share of the tokens that leave at one exit alone while its drift penalty is measured.
LEAVING = 0.2


@torch.no_grad()
def fit_path(exits: Exits, risk: Risk, limit: float, how: Mapping[str, Any], parameters: Sequence[float]) -> Path:
    """Learn the path for a mean loss of at most ``limit`` on the sequences of ``risk``; where it generates text, on
    the full model's own text. ``how`` are EarlyExit's policy, window and measure."""
    backbone, estimator = risk.backbone, exits.estimator(how.get("measure"))
    if isinstance(estimator, torch.nn.Module):
        estimator.to(backbone.device)
    items, aim = risk.items, limit
    if isinstance(risk, TextRisk):
        rows, _ = risk.generate(EarlyExit(exits, **{**how, "threshold": "never"}))
        items = [Item((*item.ids[: item.prompt], *row), item.prompt) for item, row in zip(items, rows, strict=True)]
        aim = limit * TEXT_SHARE
    # The trace asks whether this exit's own action agrees, whatever label its head was trained on.
    readout = Readout(backbone, replace(exits.config, label="action"), exits.readout(backbone).lens)
    groups = [items[start : start + risk.batch] for start in range(0, len(items), risk.batch)]
    batches = [pad([list(item.ids) for item in group]) for group in groups]
    trace = trace_of(backbone, readout, estimator, batches, torch.tensor([item.prompt for item in items]))
    read = AgreementRisk(backbone, risk.tokenizer, items, risk.batch)
    drift_penalty = tuple(_drift_penalty(exits, index, trace, read, how) for index in range(len(exits.config.layers)))
    return learn_path(replace(trace, drift_penalty=drift_penalty), aim, parameters)


def _drift_penalty(exits: Exits, index: int, trace: Trace, read: AgreementRisk, how: Mapping[str, Any]) -> float:
    """Disagreements beyond its own that a token causes by leaving at exit ``index``."""
    bar = float(trace.confidence[index].quantile(1.0 - LEAVING))
    bars = [bar if place == index else None for place in range(len(trace.layers))]
    own, _ = trace.outcome(bars)
    found = read.measure(EarlyExit(exits, **{**how, "threshold": ["never" if b is None else b for b in bars]}))
    left = (1.0 - float(found.depth.mean())) / (1.0 - trace.layers[index] / trace.n_layers)
    return max(0.0, float(found.losses.mean()) - own) / left if left > 0 else 0.0
