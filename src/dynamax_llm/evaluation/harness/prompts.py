"""Prompts run once for many settings: every setting's prompt runs at full depth, so its cache can be used again.

In the tasks of the harness a prompt has hundreds of tokens and an answer a few dozen; without this nearly all of an
evaluation's time would go into running the same prompts again. A decoder gets a copy, so what it writes is its own.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynamax_llm.backbones.cache import SSMLayer, StackedCache
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.decoding.decoder import Decoder
from dynamax_llm.exits.state import State

#: Prompts kept at a time: the plain one, and those of the settings whose heads read the prompt too.
KEPT = 3


@dataclass(frozen=True)
class _Prompt:
    """What a prompt leaves behind. Estimators' states are never changed in place; the cache is."""

    logits: Tensor
    cache: StackedCache
    length: int
    states: list[State] | None


class SharedPrompts:
    """The prompts of the latest batches, by model, tokens and what the estimator remembers of them."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Any, ...], _Prompt] = OrderedDict()

    def prefill(self, decoder: Decoder, ids: Tensor) -> Tensor:
        """What ``decoder.prefill(ids)`` does and returns, without running a prompt that was run before."""
        key = _key(decoder, ids)
        if key not in self._kept:
            logits = decoder.prefill(ids)
            engine = decoder.engine
            self._kept[key] = _Prompt(logits, _copied(engine.cache), engine.length, decoder.states)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return logits
        self._kept.move_to_end(key)
        prompt = self._kept[key]
        decoder.engine.cache, decoder.engine.length = _copied(prompt.cache), prompt.length
        decoder.states = prompt.states
        return prompt.logits


class PromptSharing(EarlyExit):
    """An EarlyExit that takes its prompts from ``prompts``; the same tokens come out."""

    def __init__(self, *arguments: Any, prompts: SharedPrompts, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.prompts = prompts

    def _prefill(self, decoder: Decoder, ids: Tensor) -> Tensor:
        return self.prompts.prefill(decoder, ids)


def _key(decoder: Decoder, ids: Tensor) -> tuple[Any, ...]:
    padding, plan = decoder.engine.padding, decoder.plan
    # An estimator that remembers nothing leaves nothing of the prompt behind, so all such settings share one.
    own = (id(plan.estimator), plan.layers) if decoder.n_exits and plan.estimator.initial_state(1) is not None else None
    pads = None if padding is None else padding.cpu().to(torch.uint8).numpy().tobytes()
    return id(decoder.backbone.model), tuple(ids.shape), ids.cpu().numpy().tobytes(), pads, own


def _copied(cache: StackedCache) -> StackedCache:
    twin = copy.deepcopy(cache)
    for layer in twin.layers:
        if isinstance(layer, SSMLayer):
            layer.rebind()
    return twin
