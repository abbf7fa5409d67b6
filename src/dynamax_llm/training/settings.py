"""How exits are trained: every number a user may turn, with its default and its bounds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from dynamax_llm.errors import UsageError
from dynamax_llm.exits.config import LABELS

SCHEDULE_FREE = "schedule-free"
OPTIMISERS = ("adamw", SCHEDULE_FREE)


@dataclass(frozen=True)
class RunSettings:
    """What every run over text has. Raises UsageError, naming the setting, for a value out of bounds."""

    max_tokens: int = 1_000_000  # the budget; data is repeated in a new order when it is larger than the data
    sequence: int = 512  # tokens of a chunk
    batch_tokens: int = 4096  # tokens of a step, padding included
    warmup: float = 0.05  # share of the budget in which the learning rate rises
    held_out: float = 0.05  # share of the documents kept for evaluation
    eval_tokens: int = 20_000  # held-out tokens evaluated
    agreement: float = 0.98  # where mean depth is reported
    seed: int = 0
    checkpoint_seconds: float = 30.0  # at most about this much work is lost by a kill
    quiet: bool = False  # no progress bar

    KIND: ClassVar[str] = "training"
    #: Settings that do not affect the result, and may change between a kill and the resumption.
    INCIDENTAL: ClassVar[tuple[str, ...]] = ("checkpoint_seconds", "quiet")

    def __post_init__(self) -> None:
        self.check_counts("max_tokens", "batch_tokens", "eval_tokens")
        self.check("sequence", self.sequence >= 2, "at least 2 tokens")
        self.check("batch_tokens", self.batch_tokens >= self.sequence, f"at least one chunk of {self.sequence} tokens")
        self.check("checkpoint_seconds", self.checkpoint_seconds >= 0, "0 or more")
        self.check("warmup", 0 <= self.warmup <= 1, "between 0 and 1")
        for name in ("held_out", "agreement"):
            self.check(name, 0 < getattr(self, name) < 1, "between 0 and 1, both excluded")

    def check(self, name: str, fine: bool, allowed: str) -> None:
        """Raise UsageError for the setting ``name`` unless it is ``fine``."""
        if not fine:
            raise UsageError(f"{self.KIND} setting {name} = {getattr(self, name)!r}: give {allowed}.")

    def check_counts(self, *names: str) -> None:
        """Raise UsageError for a setting below 1."""
        for name in names:
            self.check(name, getattr(self, name) >= 1, "at least 1")

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in self.INCIDENTAL}


@dataclass(frozen=True)
class TrainSettings(RunSettings):
    """Raises UsageError, naming the setting, for a value out of bounds. Shares are between 0 and 1."""

    documents: int | None = None  # if set, the budget in documents, one a step: the first ``sequence`` tokens of each
    label: str = "action"  # what heads learn: one of ``traces.labels.LABELS``
    label_k: int = 15  # k of the label "topk"
    optimiser: str = "adamw"  # or schedule-free, which keeps its learning rate after warm-up
    lr: float = 1e-2  # peak learning rate, after warm-up; AdamW's then falls to 0 by a cosine
    weight_decay: float = 0.01
    balanced: bool = True  # both classes of a label weigh the same in the loss
    no_exit_share: float = 1 / 3  # share of rows in which no token leaves early, as in a prompt
    on_policy: float = 0.0  # share of the heads' budget for a phase on texts decoded by the heads themselves
    lens_share: float = 0.3  # share of the budget that trains a learned readout, before the heads
    lens_lr: float = 1e-3
    eval_every: int = 100_000  # training tokens between evaluations
    patience: int = 5  # evaluations without a better held-out loss before a head stops
    preset: str | None = None  # a note for the record: the preset that these settings began as

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("eval_every", "patience", "label_k")
        self.check("documents", self.documents is None or self.documents >= 1, "at least 1, or None")
        self.check("optimiser", self.optimiser in OPTIMISERS, f"one of {', '.join(OPTIMISERS)}")
        self.check("label", self.label in LABELS, f"one of {', '.join(LABELS)}")
        for name in ("lr", "lens_lr"):
            self.check(name, 0 < getattr(self, name) <= 1, "above 0 and at most 1")
        self.check("weight_decay", self.weight_decay >= 0, "0 or more")
        for name in ("no_exit_share", "on_policy"):
            self.check(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        self.check("lens_share", 0 < self.lens_share < 1, "between 0 and 1, both excluded")
