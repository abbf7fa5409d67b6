"""What Hugging Face's ``generate`` hands to a decode loop, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
)

#: Processors that only postpone the end.
_LENGTHS = (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)


@dataclass
class Request:
    """Prompt ids (B, T), the processors and criteria ``generate`` prepared, and what the config asks for."""

    ids: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    pad: Tensor = field(init=False)
    eos: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        pad = getattr(self.config, "_pad_token_tensor", None)
        self.pad = torch.tensor(0 if pad is None else int(pad), device=self.ids.device)  # set whenever a row can end
        found: set[int] = set()
        for criterion in self.criteria:
            ids = getattr(criterion, "eos_token_id", None)
            if ids is not None:
                found |= set(torch.as_tensor(ids).flatten().tolist())
        self.eos = frozenset(found)

    @property
    def has_eos(self) -> bool:
        """Whether a row can end before the others."""
        return any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)

    @property
    def sample(self) -> bool:
        """Whether tokens are drawn instead of taking the likeliest."""
        return bool(self.config.do_sample)

    @property
    def plain_criteria(self) -> bool:
        """Whether rows end by an end-of-text token or by their length, and by nothing else."""
        return all(type(item) in (MaxLengthCriteria, EosTokenCriteria) for item in self.criteria)

    @property
    def is_plain(self) -> bool:
        """Whether every token is the likeliest one, but for ends that are too early, and only it is asked for."""
        wanted = self.wants_scores or self.wants_logits
        return is_greedy(self.processors) and self.plain_criteria and not self.sample and not wanted

    def banned(self, length: int) -> tuple[int, ...]:
        """Tokens that a plain request does not allow after ``length`` tokens: ends that are too early."""
        return banned_by(self.processors, length)

    @property
    def max_length(self) -> int:
        """Tokens of the longest text that ``generate`` allows, prompt included."""
        limit = self.criteria.max_length
        return int(limit) if limit is not None else int(self.config.max_length)

    @property
    def wants_scores(self) -> bool:
        return bool(self.config.return_dict_in_generate and self.config.output_scores)

    @property
    def wants_logits(self) -> bool:
        return bool(self.config.return_dict_in_generate and self.config.output_logits)


def is_greedy(processors: LogitsProcessorList) -> bool:
    """Whether these processors do nothing but forbid an end that is too early."""
    return all(type(item) in _LENGTHS for item in processors)


def banned_by(processors: LogitsProcessorList, length: int) -> tuple[int, ...]:
    """Tokens that such processors do not allow after ``length`` tokens."""
    found: set[int] = set()
    for item in processors:
        assert isinstance(item, MinLengthLogitsProcessor | MinNewTokensLengthLogitsProcessor)
        fresh = isinstance(item, MinNewTokensLengthLogitsProcessor)
        short = length - item.prompt_length_to_skip < item.min_new_tokens if fresh else length < item.min_length
        if short:
            found |= set(torch.as_tensor(item.eos_token_id).flatten().tolist())
    return tuple(sorted(found))
