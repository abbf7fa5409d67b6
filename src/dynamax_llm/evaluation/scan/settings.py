"""How much text a scan reads, and how it is cut."""

from __future__ import annotations

from dataclasses import dataclass

from dynamax_llm.errors import UsageError
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.settings import CHAT_HELP, SEED, check_settings, setting
from dynamax_llm.text.settings import ANSWERS, AnswerSettings
from dynamax_llm.training.settings import check_chunk


@dataclass(frozen=True)
class ScanSettings:
    """Raises UsageError, naming the setting, for a value out of bounds."""

    tokens: int = setting(4_000, "Tokens of text to look at: 4k, 20k …", count=True, least=1)
    layer_tokens: int = setting(
        600, "Of these, about how many are read out at every layer; exits read all.", flag="", least=1
    )
    answers: str | None = setting(
        None,
        "own: look at the model's own greedy answers to the prompts in --data. Default: at the text there.",
        choices=ANSWERS,
        metavar="NAME",
    )
    prompts: int = setting(32, "Prompts answered.", least=2)
    max_new_tokens: int = setting(
        AnswerSettings.max_new_tokens, "Tokens of an answer at most.", flag="--answer-tokens", least=2
    )
    chat: bool = setting(True, CHAT_HELP, flag="--chat/--no-chat")
    system: str | None = setting(None, "System message of prompts that bring none.", metavar="TEXT")
    sequence: int = setting(512, "Tokens of a chunk of text, at most.", flag="--seq-length", least=2)
    batch_tokens: int = setting(
        4096, "Tokens of a pass, padding included; at least one chunk.", flag="--tokens-per-step", least=1
    )
    candidates: int = setting(
        ExitConfig.candidates,
        "Later exits read only this many of the first one's likeliest tokens; 0: the whole vocabulary.",
        least=0,
    )
    held_out: float = setting(
        1.0, "Share of the documents read: those that training with this share holds out.", flag="", above=0, most=1
    )
    seed: int = setting(0, "Seed of the choice of documents.", **SEED)
    quiet: bool = False  # no progress bar

    def __post_init__(self) -> None:
        check_settings(self, "scan setting")
        check_chunk(self, "scan setting")
        if self.answers is None and self.system is not None:
            raise UsageError(f"scan setting system = {self.system!r}: it goes with answers. Give `answers` own.")
