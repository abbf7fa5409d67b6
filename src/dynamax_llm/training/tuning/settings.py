"""How a backbone is tuned: every number a user may turn, with its default, its meaning and its bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dynamax_llm.settings import SEED, setting
from dynamax_llm.training.settings import INNER_SHARE, SHARE, RunSettings

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

    method: str = setting(
        "lora", "lora: adapters, merged into the saved weights; full: all weights.", choices=METHODS, metavar="NAME"
    )
    rank: int = setting(16, "Rank of LoRA's adapters.", least=1)
    alpha: float = setting(32.0, "LoRA's products are scaled by alpha / rank.", flag="", above=0)
    schedule: str = setting(
        "weighted",
        "weighted: every exit at every step; rotating: a few, drawn anew each step.",
        flag="--exit-schedule",
        choices=SCHEDULES,
        metavar="NAME",
    )
    rotating: int = setting(1, "Exits of a step when rotating.", least=1)
    distil: float = setting(
        1.0,
        "Share of the loss that is distillation (KL to the teacher); the rest is cross-entropy on the text.",
        flag="--distill",
        **SHARE,
    )
    teacher: str = setting(
        "original",
        "original: exits and last layer learn from the untouched model, so that it stays what it is; current: exits "
        "from the last layer as it is, the last layer from the text.",
        choices=TEACHERS,
        metavar="NAME",
    )
    exit_weight: float = setting(1.0, "Weight of all exits together, beside the last layer's 1.", flag="", above=0)
    lr: float | None = setting(
        None, "Peak learning rate of AdamW. Default: 1e-3 for lora, 1e-4 for full.", above=0, most=1
    )
    weight_decay: float = setting(0.0, "Weight decay.", flag="", least=0)
    held_out: float = setting(0.05, "Share of the documents kept for the figures.", flag="--heldout", **INNER_SHARE)
    eval_tokens: int = setting(20_000, "Held-out tokens measured, before and after.", count=True, least=1)
    checkpointing: bool = setting(False, "Less memory: layers run again in the backward pass.")
    autocast: bool = setting(True, "On a GPU: products in bfloat16.", flag="")
    seed: int = setting(0, "Seed of adapters, data order and draws.", **SEED)
    checkpoint_seconds: float = setting(60.0, "Seconds of work lost by a kill, about, at most.", flag="", least=0)

    KIND: ClassVar[str] = "tuning setting"
    INCIDENTAL: ClassVar[tuple[str, ...]] = (*RunSettings.INCIDENTAL, "checkpointing")

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        return RATES[self.method] if self.lr is None else self.lr

    @property
    def last_distil(self) -> float:
        """The last layer's share of distillation: its own current output would teach it nothing."""
        return self.distil if self.teacher == "original" else 0.0
