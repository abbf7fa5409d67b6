"""How a model answers prompts: every number a user may turn, with its default, its meaning and its bounds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dynamax_llm.settings import SEED, check_settings, setting

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
    chat: bool = setting(True, "Put prompts through the tokenizer's chat template.", flag="--chat/--no-chat")
    seed: int = setting(0, "Seed of the sampling.", flag="", **SEED)

    def __post_init__(self) -> None:
        check_settings(self, "answer setting")

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the answers; rows are among them, because rounding depends on them."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "max_prompts"}
