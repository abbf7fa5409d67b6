"""The rows of a session: each row's text so far, where its tokens left, and whether it has ended."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from dynamax_llm.decoding.thresholds import Thresholds
from dynamax_llm.engines.plan import RowThresholds


@dataclass
class RowSettings:
    """What one row of a session asks for.

    ``max_new_tokens`` at least 1; ``thresholds``: the session's own if None; ``eos``: ids that end the row;
    ``processors`` and ``criteria``: Hugging Face's, called with this row alone, (1, T); ``seed``: of a generator of
    the row's own, where it samples.
    """

    max_new_tokens: int
    thresholds: Thresholds | None = None
    eos: frozenset[int] = frozenset()
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    sample: bool = False
    seed: int | None = None


@dataclass(frozen=True)
class Event:
    """One new token of one row: ``exit_index`` says where it left (len(exits) for full depth)."""

    slot: int
    token: int
    exit_index: int
    ended: bool


class Row:
    """One sequence: prompt (1, T) with left pads, new tokens, and the exit index of each."""

    def __init__(
        self, prompt: Tensor, thresholds: Thresholds, max_new_tokens: int, settings: RowSettings | None = None
    ) -> None:
        self.prompt, self.thresholds, self.max_new_tokens, self.settings = prompt, thresholds, max_new_tokens, settings
        self.tokens: list[int] = []
        self.exits: list[int] = []
        self.scores: list[Tensor] = []  # (V,) each, where they are kept
        self.logits: list[Tensor] = []
        self.ended_at: int | None = None  # new tokens when the row ended
        self._ids, self._known = prompt, 0
        self.generator: torch.Generator | None = None
        if settings is not None and settings.seed is not None:
            self.generator = torch.Generator(prompt.device).manual_seed(settings.seed)

    @property
    def ended(self) -> bool:
        """Whether the row has ended; where ended rows are not padded it may still get tokens."""
        return self.ended_at is not None

    def __len__(self) -> int:
        return self.prompt.shape[1] + len(self.tokens)

    @property
    def ids(self) -> Tensor:
        """Prompt and new tokens (1, T)."""
        if self._known < len(self.tokens):
            fresh = torch.tensor([self.tokens[self._known :]], device=self.prompt.device)
            self._ids, self._known = torch.cat((self._ids, fresh), dim=1), len(self.tokens)
        return self._ids

    def limits(self, ahead: int = 0) -> RowThresholds:
        """The thresholds of the next token, ``ahead`` tokens after the ones there are."""
        return self.thresholds.at(len(self.tokens) + ahead, self.max_new_tokens)
