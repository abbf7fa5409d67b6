"""How exits are trained: every number a user may turn, with its default and its bounds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dynamax_llm.errors import UsageError

SCHEDULE_FREE = "schedule-free"
OPTIMISERS = ("adamw", SCHEDULE_FREE)


@dataclass(frozen=True)
class TrainSettings:
    """Raises UsageError, naming the setting, for a value out of bounds. Shares are between 0 and 1."""

    max_tokens: int = 1_000_000  # the budget; data is repeated in a new order when it is larger than the data
    sequence: int = 512  # tokens of a chunk
    batch_tokens: int = 4096  # tokens of a step, padding included
    documents: int | None = None  # if set, the budget in documents, one a step: the first ``sequence`` tokens of each
    optimiser: str = "adamw"  # or schedule-free, which keeps its learning rate after warm-up
    lr: float = 1e-2  # peak learning rate, after warm-up; AdamW's then falls to 0 by a cosine
    weight_decay: float = 0.01
    warmup: float = 0.05  # share of the budget
    balanced: bool = True  # both classes of a label weigh the same in the loss
    never: float = 1 / 3  # share of rows in which no token leaves early, as in a prompt
    on_policy: float = 0.0  # share of the heads' budget for a second pass, on texts decoded with the heads in charge
    lens_share: float = 0.3  # share of the budget that trains the lens, before the heads
    lens_lr: float = 1e-3
    held_out: float = 0.05  # share of the documents kept for evaluation
    eval_tokens: int = 20_000  # held-out tokens evaluated
    eval_every: int = 100_000  # training tokens between evaluations
    patience: int = 5  # evaluations without a better held-out loss before a head stops
    agreement: float = 0.98  # where mean depth is reported
    checkpoint_seconds: float = 30.0  # at most this much work is lost by a kill
    seed: int = 0
    preset: str | None = None  # a note for the record: the preset that these settings began as
    quiet: bool = False  # no progress bar

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_tokens", "eval_tokens", "eval_every", "patience"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("documents", self.documents is None or self.documents >= 1, "at least 1, or None")
        self._check("optimiser", self.optimiser in OPTIMISERS, f"one of {', '.join(OPTIMISERS)}")
        self._check("sequence", self.sequence >= 2, "at least 2 tokens")
        self._check("batch_tokens", self.batch_tokens >= self.sequence, f"at least one chunk of {self.sequence} tokens")
        for name in ("lr", "lens_lr"):
            self._check(name, 0 < getattr(self, name) <= 1, "above 0 and at most 1")
        for name in ("weight_decay", "checkpoint_seconds"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("warmup", "never", "on_policy"):
            self._check(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        for name in ("lens_share", "held_out", "agreement"):
            self._check(name, 0 < getattr(self, name) < 1, "between 0 and 1, both excluded")

    def _check(self, name: str, fine: bool, allowed: str) -> None:
        if not fine:
            raise UsageError(f"training setting {name} = {getattr(self, name)!r}: give {allowed}.")

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result; the others may change between a kill and the resumption."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in ("checkpoint_seconds", "quiet")}
