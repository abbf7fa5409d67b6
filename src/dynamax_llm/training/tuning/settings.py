"""How a backbone is tuned: every number a user may turn, with its default and its bounds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dynamax_llm.settings import SEED, check_settings, setting
from dynamax_llm.training.settings import check_chunk

METHODS = ("lora", "full")
SCHEDULES = ("weighted", "rotating")
TEACHERS = ("original", "current")
#: Peak learning rate where none is given.
RATES = {"lora": 1e-3, "full": 1e-4}


@dataclass(frozen=True)
class TuneSettings:
    """Raises UsageError, naming the setting, for a value out of bounds. Shares are between 0 and 1.

    ``teacher`` "original" (default): exits and last layer learn from the untouched model's last layer, k = k_L =
    ``distil``, so that with distil 1 the full model is trained to stay what it is, whatever the text; costs one more
    forward. "current": exits learn from the model's own last layer as it is now, and the last layer from the text
    alone (k_L = 0), as the reference backbones were trained.
    """

    method: str = setting(
        "lora",
        "lora: adapters, merged into the saved weights; full: all weights.",
        choices=METHODS,
        metavar="NAME",
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
        least=0,
        most=1,
    )
    teacher: str = setting(
        "original",
        "original: exits and last layer learn from the untouched model, so that it stays what it is; current: exits "
        "from the last layer as it is, the last layer from the text.",
        choices=TEACHERS,
        metavar="NAME",
    )
    exit_weight: float = setting(1.0, "Weight of all exits together, beside the last layer's 1.", flag="", above=0)
    max_tokens: int = setting(
        1_000_000,
        "Training tokens: 300k, 1M, 2.5M … Data repeats, in a new order, if it is shorter.",
        flag="--tokens",
        count=True,
        least=1,
    )
    sequence: int = setting(512, "Tokens of a chunk of text, at most.", flag="--seq-length", least=2)
    batch_tokens: int = setting(
        4096, "Tokens of a step, padding included; at least one chunk.", flag="--tokens-per-step", least=1
    )
    lr: float | None = setting(
        None, "Peak learning rate of AdamW. Default: 1e-3 for lora, 1e-4 for full.", above=0, most=1
    )
    weight_decay: float = setting(0.0, "Weight decay.", flag="", least=0)
    warmup: float = setting(0.05, "Share of the budget; then cosine down to 0.", flag="", least=0, most=1)
    held_out: float = setting(0.05, "Share of the documents kept for the figures.", flag="--heldout", above=0, below=1)
    eval_tokens: int = setting(20_000, "Held-out tokens measured, before and after.", count=True, least=1)
    agreement: float = setting(0.98, "Where the margin rule's mean depth is reported.", flag="", above=0, below=1)
    checkpointing: bool = setting(False, "Less memory: layers run again in the backward pass.")
    autocast: bool = setting(True, "On a GPU: products in bfloat16.", flag="")
    checkpoint_seconds: float = setting(60.0, "Seconds of work lost by a kill, about, at most.", flag="", least=0)
    seed: int = setting(0, "Seed of adapters, data order and draws.", **SEED)
    quiet: bool = False  # no progress bar

    def __post_init__(self) -> None:
        check_settings(self, "tuning setting")
        check_chunk(self, "tuning setting")

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
