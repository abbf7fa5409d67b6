"""What Hugging Face's ``generate`` hands to a decode loop, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList


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
