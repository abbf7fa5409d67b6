"""Prompts run once for many settings: every setting's prompt runs at full depth, so its cache can be used again.

In the tasks of the harness a prompt has hundreds of tokens and an answer a few dozen; without this nearly all of an
evaluation's time would go into running the same prompts again. A decoder gets a copy, so what it writes is its own.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from dynamax_llm.decoding import EarlyExit
from dynamax_llm.engines.base import EngineSession
from dynamax_llm.engines.eager.session import PromptState

#: Prompts kept at a time: the plain one, and those of the settings whose heads read the prompt too.
KEPT = 3


class SharedPrompts:
    """The prompts of the latest batches, by model, tokens and what the exits remember of them."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Any, ...], tuple[Tensor, PromptState]] = OrderedDict()

    def prefill(self, engine: EngineSession, ids: Tensor, padding: Tensor | None) -> Tensor:
        """What ``engine.prefill`` does and returns, without running a prompt that was run before."""
        key = _key(engine, ids, padding)
        if key not in self._kept:
            logits = engine.prefill(ids, padding)
            self._kept[key] = (logits, engine.prompt_state())
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return logits
        self._kept.move_to_end(key)
        logits, prompt = self._kept[key]
        engine.adopt(prompt)
        return logits


class PromptSharing(EarlyExit):
    """An EarlyExit that takes its prompts from ``prompts``; the same tokens come out."""

    def __init__(self, *arguments: Any, prompts: SharedPrompts, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.prompts = prompts

    def _prefill(self, engine: EngineSession, ids: Tensor, padding: Tensor | None) -> Tensor:
        return self.prompts.prefill(engine, ids, padding)


def _key(engine: EngineSession, ids: Tensor, padding: Tensor | None) -> tuple[Any, ...]:
    plan = engine.plan
    # An estimator that remembers nothing leaves nothing of the prompt behind, so all such settings share one.
    remembers = plan.active and plan.estimator.initial_state(1) is not None
    own = (id(plan.estimator), plan.layers, plan.active) if remembers else None
    pads = None if padding is None or bool(padding.all()) else padding.cpu().to(torch.uint8).numpy().tobytes()
    return id(plan.readout.backbone.model), tuple(ids.shape), ids.cpu().numpy().tobytes(), pads, own
