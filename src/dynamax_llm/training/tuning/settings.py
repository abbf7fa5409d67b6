"""How a backbone is tuned: every number a user may turn, with its default and its bounds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dynamax_llm.errors import UsageError

METHODS = ("lora", "full")
SCHEDULES = ("weighted", "rotating")
TEACHERS = ("original", "current")
#: Peak learning rate where none is given.
RATES = {"lora": 1e-3, "full": 1e-4}


@dataclass(frozen=True)
class TuneSettings:
    """Raises UsageError, naming the setting, for a value out of bounds. Shares are between 0 and 1.

    ``teacher`` "original" (default): exits and last layer learn from the untouched model's last layer, k = k_L =
    ``distil``, so that with distil 1 the full model is asked to stay what it is, whatever the text; costs one more
    forward. "current": exits learn from the model's own last layer as it is now, and the last layer from the text
    alone (k_L = 0), as the reference backbones were trained.
    """

    method: str = "lora"
    rank: int = 16  # of LoRA
    alpha: float = 32.0  # LoRA's products are scaled by alpha / rank
    schedule: str = "weighted"  # every exit at every step, or "rotating": some of them
    rotating: int = 1  # exits of a step when rotating
    distil: float = 1.0  # share of a loss that is KL to the teacher; the rest is cross-entropy on the text
    teacher: str = "original"
    exit_weight: float = 1.0  # of all exits together, beside the last layer's 1
    max_tokens: int = 1_000_000  # the budget; data is repeated in a new order when it is larger than the data
    sequence: int = 512  # tokens of a chunk
    batch_tokens: int = 4096  # tokens of a step, padding included
    lr: float | None = None  # peak learning rate of AdamW; None: RATES[method]
    weight_decay: float = 0.0
    warmup: float = 0.05  # share of the budget; then cosine down to 0
    held_out: float = 0.05  # share of the documents kept for the figures
    eval_tokens: int = 20_000  # held-out tokens measured, before and after
    agreement: float = 0.98  # where the margin rule's mean depth is reported
    checkpointing: bool = False  # run layers again in the backward pass instead of keeping what they made
    autocast: bool = True  # on a GPU: products in bfloat16
    checkpoint_seconds: float = 60.0  # at most about this much work is lost by a kill
    seed: int = 0
    quiet: bool = False  # no progress bar

    def __post_init__(self) -> None:
        for name, allowed in (("method", METHODS), ("schedule", SCHEDULES), ("teacher", TEACHERS)):
            self._check(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        for name in ("rank", "rotating", "max_tokens", "batch_tokens", "eval_tokens"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("sequence", self.sequence >= 2, "at least 2 tokens")
        self._check("batch_tokens", self.batch_tokens >= self.sequence, f"at least one chunk of {self.sequence} tokens")
        self._check("lr", self.lr is None or 0 < self.lr <= 1, "above 0 and at most 1")
        for name in ("alpha", "exit_weight"):
            self._check(name, getattr(self, name) > 0, "above 0")
        for name in ("weight_decay", "checkpoint_seconds"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("warmup", "distil"):
            self._check(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        for name in ("held_out", "agreement"):
            self._check(name, 0 < getattr(self, name) < 1, "between 0 and 1, both excluded")

    def _check(self, name: str, fine: bool, allowed: str) -> None:
        if not fine:
            raise UsageError(f"tuning setting {name} = {getattr(self, name)!r}: give {allowed}.")

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        return RATES[self.method] if self.lr is None else self.lr

    @property
    def last_distil(self) -> float:
        """The last layer's share of distillation: its own current output would teach it nothing."""
        return self.distil if self.teacher == "original" else 0.0

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result; the others may change between a kill and the resumption."""
        left_out = ("checkpoint_seconds", "quiet", "checkpointing")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}
