"""How exits are trained: every number a user may turn, with its default, its meaning and its bounds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from dynamax_llm.errors import UsageError
from dynamax_llm.settings import SEED, check_settings, setting

SCHEDULE_FREE = "schedule-free"
OPTIMISERS = ("adamw", SCHEDULE_FREE)
#: What heads may learn; described in ``traces.labels``.
LABELS = ("action", "topk", "probability", "overlap")

SHARE = {"least": 0, "most": 1}
INNER_SHARE = {"above": 0, "below": 1}

_SHARE = {"least": 0, "most": 1}
_INNER_SHARE = {"above": 0, "below": 1}


@dataclass(frozen=True)
class RunSettings:
    """What every run over text has. Raises UsageError, naming the setting, for a value out of bounds."""

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
    warmup: float = setting(0.05, "Share of the budget in which the learning rate rises.", flag="", **SHARE)
    held_out: float = setting(0.05, "Share of the documents kept for evaluation.", flag="--heldout", **INNER_SHARE)
    eval_tokens: int = setting(20_000, "Held-out tokens evaluated.", flag="", least=1)
    agreement: float = setting(0.98, "Where mean depth is reported.", flag="", **INNER_SHARE)
    seed: int = setting(0, "Seed of weights, data order and draws.", **SEED)
    checkpoint_seconds: float = setting(30.0, "Seconds of work lost by a kill, about, at most.", flag="", least=0)
    quiet: bool = False  # no progress bar

    KIND: ClassVar[str] = "training setting"
    #: Settings that do not affect the result, and may change between a kill and the resumption.
    INCIDENTAL: ClassVar[tuple[str, ...]] = ("checkpoint_seconds", "quiet")

    def __post_init__(self) -> None:
        check_settings(self, self.KIND)
        check_chunk(self, self.KIND)

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in self.INCIDENTAL}


@dataclass(frozen=True)
class TrainSettings(RunSettings):
    """Raises UsageError, naming the setting, for a value out of bounds. Shares are between 0 and 1."""

    documents: int | None = setting(
        None, "A budget in documents instead: one a step, cut to --seq-length. Default: none.", least=1
    )
    label: str = setting(
        "action",
        "action: the exit gives the full model's token; probability, overlap: soft; topk: the paper's.",
        choices=LABELS,
        metavar="NAME",
    )
    label_k: int = setting(15, "k of the topk label.", least=1)
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
    balanced: bool = setting(True, "Both classes of a label weigh the same in the loss.", flag="")
    no_exit_share: float = setting(
        1 / 3, "Share of rows in which no token leaves early, as in a prompt.", flag="", **SHARE
    )
    on_policy: float = setting(
        0.0, "Share of the heads' budget for a second phase, on text decoded with the heads' exits on.", **SHARE
    )
    lens_share: float = setting(
        0.3, "Share of the budget that trains a learned readout, before the heads.", flag="", **INNER_SHARE
    )
    lens_lr: float = setting(1e-3, "Peak learning rate of the lens.", flag="", above=0, most=1)
    block_share: float = setting(
        0.8, "Share of the budget that trains blocks or a draft, before the heads.", **INNER_SHARE
    )
    block_lr: float = setting(1e-3, "Peak learning rate of blocks and drafts.", above=0, most=1)
    draft_steps: int = setting(3, "Own steps over which a draft is trained.", least=1)
    warm_start: bool = setting(True, "A block starts as a copy of the last layer if both have one form.", flag="")
    every: int = setting(4, "Blocks and drafts learn at one token in this many.", flag="", least=1)
    eval_every: int = setting(100_000, "Training tokens between evaluations.", flag="", least=1)
    patience: int = setting(5, "Evaluations without a better held-out loss before a head stops.", least=1)
    preset: str | None = None  # for the record: the preset that these settings began as


def check_chunk(settings: Any, label: str) -> None:
    """Raise UsageError unless ``batch_tokens`` holds one chunk of ``sequence`` tokens."""
    if settings.batch_tokens < settings.sequence:
        raise UsageError(
            f"{label} batch_tokens = {settings.batch_tokens!r}: give at least one chunk of {settings.sequence} tokens."
        )
