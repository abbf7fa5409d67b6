"""How a backbone is tuned: every number a user may turn, with its default and its bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dynamax_llm.training.settings import RunSettings

METHODS = ("lora", "full")
SCHEDULES = ("weighted", "rotating")
TEACHERS = ("original", "current")
#: Peak learning rate where none is given.
RATES = {"lora": 1e-3, "full": 1e-4}


@dataclass(frozen=True)
class TuneSettings(RunSettings):
    """Raises UsageError, naming the setting, for a value out of bounds. Shares are between 0 and 1.

    ``teacher`` "original" (default): exits and last layer learn from the untouched model's last layer, k = k_L =
    ``distil``, so that with distil 1 the full model is trained to stay as it is, whatever the text; costs one more
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
    lr: float | None = None  # peak learning rate of AdamW; None: RATES[method]
    weight_decay: float = 0.0
    checkpointing: bool = False  # run layers again in the backward pass instead of keeping what they made
    autocast: bool = True  # on a GPU: products in bfloat16
    checkpoint_seconds: float = 60.0  # at most about this much work is lost by a kill

    KIND: ClassVar[str] = "tuning"
    INCIDENTAL: ClassVar[tuple[str, ...]] = (*RunSettings.INCIDENTAL, "checkpointing")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("method", METHODS), ("schedule", SCHEDULES), ("teacher", TEACHERS)):
            self.check(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        self.check_counts("rank", "rotating")
        self.check("lr", self.lr is None or 0 < self.lr <= 1, "above 0 and at most 1")
        for name in ("alpha", "exit_weight"):
            self.check(name, getattr(self, name) > 0, "above 0")
        self.check("weight_decay", self.weight_decay >= 0, "0 or more")
        self.check("distil", 0 <= self.distil <= 1, "between 0 and 1")

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        return RATES[self.method] if self.lr is None else self.lr

    @property
    def last_distil(self) -> float:
        """The last layer's share of distillation: its own current output would teach it nothing."""
        return self.distil if self.teacher == "original" else 0.0
