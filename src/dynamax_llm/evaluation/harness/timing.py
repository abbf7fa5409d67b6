"""Wall clock: seconds per decoded token at batch 1, each sample once under a setting and once at full depth.

The two runs of a pair follow each other in the same engine on the same prompt, in alternating order, so that a slow
moment of the machine affects both. The prompt's own pass, which is the same for both, is not timed; the number of new
tokens is fixed, so that both decode equally many.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamax_llm.evaluation.common.timing import in_turns, wait
from dynamax_llm.evaluation.harness.prompts import PromptSharing, SharedPrompts
from dynamax_llm.evaluation.harness.settings import Variant


def pair(full: Variant, variant: Variant, prompts: SharedPrompts, ids: Tensor, count: int, turn: int) -> dict[str, Any]:
    """Seconds per token after the first of ``count`` new ones, at full depth and under ``variant``, and their ratio.

    ``ids`` (1, T); the full model is first in even turns.
    """

    def side(item: Variant) -> float:
        return per_token(item.model, item.early_exit(prompts), ids, count)

    whole, own = in_turns(lambda: side(full), lambda: side(variant), turn)
    return {"full": whole, "own": own, "ratio": whole / own}


def per_token(model: PreTrainedModel, early: PromptSharing, ids: Tensor, count: int) -> float:
    """Seconds per new token after the first, of ``count`` >= 2."""
    moments: list[float] = []

    def note(tokens: Tensor, depths: Tensor) -> None:
        wait(tokens.device)
        moments.append(time.perf_counter())

    early.on_token = note
    options: dict[str, Any] = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), custom_generate=early, **options)
    return (moments[-1] - moments[0]) / (len(moments) - 1)
