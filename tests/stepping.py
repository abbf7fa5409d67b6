"""An engine session driven step by step, for laws about single steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.decoder import Decoder
from dynamax_llm.engines.base import Engine
from dynamax_llm.engines.eager import EagerEngine
from dynamax_llm.engines.plan import ExitPlan


class Step(NamedTuple):
    """Logits (B, V) and exit indices (B,) of one step, and whether every layer has read its token."""

    logits: Tensor
    exit_index: Tensor
    deep: bool


class Stepper:
    """``prefill``, then ``step`` with one token (B, 1) per row."""

    def __init__(
        self,
        backbone: Backbone,
        plan: ExitPlan,
        padding: Tensor | None = None,
        batch: int = 1,
        engine: Engine | None = None,
    ) -> None:
        self.plan, self.padding = plan, padding
        self.batch = batch if padding is None else len(padding)
        self.engine = (engine or EagerEngine()).open(backbone, plan, self.batch)
        self.decoder = Decoder(self.engine)

    def prefill(self, ids: Tensor) -> Tensor:
        return self.engine.prefill(ids, self.padding)

    def step(self, ids: Tensor, thresholds: Sequence[float | None], idle: Tensor | None = None) -> Step:
        deep = self.decoder.step(ids[:, 0], [tuple(thresholds)] * self.batch, idle)
        if deep and self.plan.policy.exact_output:
            return Step(self.engine.window_logits()[:, -1], torch.full((self.batch,), self.plan.full), deep)
        return Step(self.engine.logits(), self.engine.exits(), deep)
