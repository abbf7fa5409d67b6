"""What a ``generate`` call may ask of early exits, and what is refused."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from dynamax_llm.backbones import Backbone
from dynamax_llm.engines.plan import StatePolicy
from dynamax_llm.errors import UsageError

#: Options of ``generate`` that choose another decoding method, or ask for what early exits do not compute.
_UNSUPPORTED = {
    "output_hidden_states": "skipped layers have no hidden states",
    "output_attentions": "skipped layers have no attentions",
    "prompt_lookup_num_tokens": "it is another way of drafting; policy='verify' drafts with the exits",
    "penalty_alpha": "contrastive search needs the hidden states of the last layer",
    "dola_layers": "it contrasts layers that early exits skip",
    "token_healing": "it changes the prompt with the tokenizer, which a callable does not get",
    "assistant_early_exit": "policy='verify' drafts with the exits",
    "constraints": "early exits decode greedily or by sampling",
    "force_words_ids": "early exits decode greedily or by sampling",
}
#: Processors of transformers that keep a state between calls: under ``verify`` they are called for drafts and for
#: checks, so the text would not be the full model's.
_STATEFUL = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")


def caller_arguments() -> dict[str, Any]:
    """``streamer``, ``assistant_model`` and the keyword arguments of the ``generate`` call under way.

    transformers (5.23) hands neither ``streamer`` nor ``assistant_model`` to a ``custom_generate`` callable, though it
    accepts both beside one; they are read from the calling frame. Empty where the caller is not ``generate``.
    """
    frame = sys._getframe(2)
    if frame.f_code.co_name != "generate" or "streamer" not in frame.f_locals:
        return {}
    found = frame.f_locals
    return {"streamer": found["streamer"], "assistant_model": found.get("assistant_model"), **found.get("kwargs", {})}


def check_request(config: GenerationConfig, model_kwargs: dict[str, Any], policy: StatePolicy, processors: Any) -> None:
    """Raise UsageError naming an option that early exits cannot honour."""
    if (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
        raise UsageError(
            f"num_beams={config.num_beams}, num_return_sequences={config.num_return_sequences}: early exit decodes "
            "greedily or by sampling, one sequence per row. Set both to 1; for several samples repeat the prompt."
        )
    for name, reason in _UNSUPPORTED.items():
        if getattr(config, name, None):
            raise UsageError(f"{name}={getattr(config, name)!r}: {reason}. Leave it out.")
    if getattr(config, "cache_implementation", None) is not None or config.use_cache is False:
        warnings.warn(
            "use_cache and cache_implementation have no effect: early exits keep their own cache.", stacklevel=3
        )
    if model_kwargs.get("inputs_embeds") is not None:
        raise UsageError("inputs_embeds: early exit starts from token ids. Pass input_ids instead.")
    for name in ("past_key_values", "cache_params"):
        cache = model_kwargs.get(name)
        if cache is not None and getattr(cache, "is_initialized", False):
            raise UsageError(f"{name} already holds tokens: early exit keeps its own cache. Pass the whole prompt.")
    for item in processors if policy.exact_output else ():
        if type(item).__name__ in _STATEFUL:
            raise UsageError(
                f"{type(item).__name__} keeps a state between calls, and policy 'verify' calls processors for drafts "
                "and for checks. Use policy 'defer' or 'propagate', or leave the option out."
            )


def check_prompt(backbone: Backbone, ids: Tensor, padding: Tensor | None, positions: Tensor | None, new: int) -> None:
    """Raise UsageError unless the prompts (B, T) can be continued by ``new`` tokens within the model's context."""
    if ids.shape[1] == 0:
        raise UsageError("the prompt has no tokens: give at least one.")
    if padding is not None and not bool(padding[:, -1].all()):
        rows = (padding[:, -1] == 0).nonzero().flatten().tolist()
        raise UsageError(
            f"prompts {rows} are padded on the right: new tokens would follow padding. Pad on the left: "
            'tokenizer.padding_side = "left".'
        )
    if positions is not None and not _usual(positions, padding):
        raise UsageError(
            "position_ids: early exit counts every token's position from the attention mask, and these differ. "
            "Leave position_ids out."
        )
    limit = backbone.max_positions()
    length = ids.shape[1] if padding is None else int(padding.sum(1).max())
    if limit is not None and length + new > limit:
        warnings.warn(
            f"{length} prompt tokens and up to {new} new ones exceed the context of {limit} tokens that "
            f"{backbone.model_type} was built for: the text may degrade after it.",
            stacklevel=3,
        )


def _usual(positions: Tensor, padding: Tensor | None) -> bool:
    """Whether positions (B, T) are those that the attention mask gives."""
    counted = positions.new_ones(positions.shape) if padding is None else padding.to(positions.dtype)
    expected = (counted.cumsum(1) - 1).clamp(min=0)
    return bool(((positions == expected) | (counted == 0)).all())
