"""What exits learn from, and how a model answers prompts: defaults, meaning and bounds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamax_llm.errors import UsageError
from dynamax_llm.settings import CHAT_HELP, SEED, check_settings, setting

#: Where answers come from: the model itself.
ANSWERS = ("own",)


@dataclass(frozen=True)
class AnswerSettings:
    """Raises UsageError, naming the setting, for a value out of bounds."""

    max_new_tokens: int = setting(224, "Tokens of an answer at most.", flag="--answer-tokens", least=1)
    sampled: float = setting(
        0.5, "Share of the prompts answered by sampling; the others greedily.", flag="--answer-sampled", least=0, most=1
    )
    temperature: float = setting(0.8, "Temperature of sampled answers.", flag="--answer-temperature", above=0)
    rows: int = setting(64, "Prompts answered at once.", flag="--answer-rows", least=1)
    prompt_tokens: int = setting(256, "Longer prompts are left out, and counted.", flag="--prompt-tokens", least=1)
    max_prompts: int | None = setting(None, "Read no more prompts than this. Default: all.", least=1)
    system: str | None = setting(None, "System message of prompts that bring none.", metavar="TEXT")
    chat: bool = setting(True, CHAT_HELP, flag="--chat/--no-chat")
    seed: int = setting(0, "Seed of sampled answers.", flag="--answer-seed", **SEED)

    def __post_init__(self) -> None:
        check_settings(self, "answer setting")

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the answers; rows are among them, because rounding depends on them."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "max_prompts"}


@dataclass(frozen=True)
class LearnSettings:
    """What exits learn from: text, or answers, or both. Raises UsageError for values that do not go together."""

    answers: str | None = setting(
        None,
        "own: learn from the model's own answers to the prompts in --data. Default: from the text there.",
        choices=ANSWERS,
        metavar="NAME",
    )
    answers_dir: Path | None = setting(
        None, "Folder for the answers, made or completed there. Default: OUT/answers.", metavar="DIR"
    )
    mix_text: str | None = setting(
        None, "Plain text to mix with the answers: as --data without --answers.", metavar="PATH|ID"
    )
    mix_share: float = setting(0.25, "Share of the batches that are --mix-text.", above=0, below=1)

    def __post_init__(self) -> None:
        check_settings(self, "text setting")
        if self.answers is None:
            for name in ("answers_dir", "mix_text"):
                if (value := getattr(self, name)) is not None:
                    raise UsageError(
                        f"{name} = {str(value)!r}: it goes with answers. Give `answers` own, or leave it out."
                    )
