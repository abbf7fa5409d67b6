"""How exits are trained: every number a user may turn, with its default, its meaning and its bounds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dynamax_llm.errors import UsageError
from dynamax_llm.settings import SEED, check_settings, setting

SCHEDULE_FREE = "schedule-free"
OPTIMISERS = ("adamw", SCHEDULE_FREE)

_SHARE = {"least": 0, "most": 1}
_INNER_SHARE = {"above": 0, "below": 1}


@dataclass(frozen=True)
class TrainSettings:
    """Raises UsageError, naming the setting, for a value out of bounds. Shares are between 0 and 1."""

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
    documents: int | None = setting(
        None, "A budget in documents instead: one a step, cut to --seq-length. Default: none.", least=1
    )
    optimiser: str = setting(
        "adamw",
        "adamw, or schedule-free, which keeps its learning rate after warm-up.",
        choices=OPTIMISERS,
        metavar="NAME",
    )
    lr: float = setting(
        1e-2, "Peak learning rate, after warm-up; AdamW's then falls to 0 by a cosine.", above=0, most=1
    )
    weight_decay: float = setting(0.01, "Weight decay.", flag="", least=0)
    warmup: float = setting(0.05, "Share of the budget.", flag="", **_SHARE)
    balanced: bool = setting(True, "Both classes of a label weigh the same in the loss.", flag="")
    never: float = setting(1 / 3, "Share of rows in which no token leaves early, as in a prompt.", flag="", **_SHARE)
    on_policy: float = setting(
        0.0, "Share of the heads' budget for a second pass, on text decoded with the heads' exits on.", **_SHARE
    )
    lens_share: float = setting(
        0.3, "Share of the budget that trains the lens, before the heads.", flag="", **_INNER_SHARE
    )
    lens_lr: float = setting(1e-3, "Peak learning rate of the lens.", flag="", above=0, most=1)
    held_out: float = setting(0.05, "Share of the documents kept for evaluation.", flag="--heldout", **_INNER_SHARE)
    eval_tokens: int = setting(20_000, "Held-out tokens evaluated.", flag="", least=1)
    eval_every: int = setting(100_000, "Training tokens between evaluations.", flag="", least=1)
    patience: int = setting(5, "Evaluations without a better held-out loss before a head stops.", least=1)
    agreement: float = setting(0.98, "Where mean depth is reported.", flag="", **_INNER_SHARE)
    checkpoint_seconds: float = setting(30.0, "Seconds of work lost by a kill, at most.", flag="", least=0)
    seed: int = setting(0, "Seed of weights, data order and draws.", **SEED)
    preset: str | None = None  # for the record: the preset that these settings began as
    quiet: bool = False  # no progress bar

    def __post_init__(self) -> None:
        check_settings(self, "training setting")
        check_chunk(self, "training setting")

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result; the others may change between a kill and the resumption."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in ("checkpoint_seconds", "quiet")}


def check_chunk(settings: Any, label: str) -> None:
    """Raise UsageError unless ``batch_tokens`` holds one chunk of ``sequence`` tokens."""
    if settings.batch_tokens < settings.sequence:
        raise UsageError(
            f"{label} batch_tokens = {settings.batch_tokens!r}: give at least one chunk of {settings.sequence} tokens."
        )
