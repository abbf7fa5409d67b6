"""What a calibration draws and how sure its promise is: defaults, meaning and bounds."""

from __future__ import annotations

from dataclasses import dataclass

from dynamax_llm.exits.promise import METHODS
from dynamax_llm.settings import (
    CHAT_HELP,
    MEASURES,
    SEED,
    STATE_POLICIES,
    SYSTEM_HELP,
    DecodeSettings,
    check_chat,
    check_settings,
    setting,
)

#: Sequences without which a path cannot be learnt.
LEAST_PATH = 4


@dataclass(frozen=True)
class CalibrationSettings:
    """Raises UsageError, naming the setting, for a value out of bounds."""

    prompts: int = setting(500, "Documents drawn, one prompt each.", least=1)
    prompt_tokens: int = setting(64, "Tokens of a prompt, and of a question at most.", least=1)
    new_tokens: int = setting(
        64, "Tokens read after a prompt (agreement), or generated.", flag="--max-new-tokens", least=1
    )
    path_share: float = setting(0.2, "Share of the prompts on which the path is learnt.", above=0, below=1)
    batch: int = setting(
        16, "Prompts at once; of a draft, rows whose costs are measured (1 if left out).", flag="--batch-size", least=1
    )
    seed: int = setting(0, "Seed of the draw.", **SEED)
    chat: bool = setting(False, f"{CHAT_HELP} Agreement is then read on the full model's own answers.")
    system: str | None = setting(None, SYSTEM_HELP, metavar="TEXT")

    def __post_init__(self) -> None:
        check_settings(self, "calibration setting")
        check_chat(self, "calibration setting")

    def split(self, count: int) -> int:
        """How many of ``count`` sequences are the path's."""
        return max(round(self.path_share * count), min(LEAST_PATH, count))

    def prompts_for(self, n: int) -> int:
        """How many sequences in all leave ``n`` to be tested."""
        count = n + LEAST_PATH
        while count - self.split(count) < n:
            count += 1
        return count


@dataclass(frozen=True)
class PromiseSettings:
    """How a promise is proved, and under which decoding."""

    confidence: float = setting(0.95, "How sure to be, over draws of the prompts; not for crc.", above=0, below=1)
    method: str = setting(
        "ltt",
        "ltt: learn then test, p-values by betting; ltt-hb: those of Hoeffding and Bentkus, larger; crc: conformal "
        "risk control, in expectation only.",
        choices=METHODS,
        metavar="NAME",
    )
    policy: str = setting(
        DecodeSettings.policy,
        "State of skipped layers: propagate, copy, stale or defer.",
        choices=STATE_POLICIES,
        metavar="NAME",
    )
    window: int = setting(DecodeSettings.window, "Tokens that may wait (defer).", least=1)
    measure: str | None = setting(
        None, "Decide by a confidence measure, not by the head.", choices=MEASURES, metavar="NAME"
    )
