"""How much text a scan reads, and how it is cut."""

from __future__ import annotations

from dataclasses import dataclass

from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.settings import SEED, check_settings, setting
from dynamax_llm.training.settings import check_chunk


@dataclass(frozen=True)
class ScanSettings:
    """Raises UsageError, naming the setting, for a value out of bounds."""

    tokens: int = setting(20_000, "Tokens of text to look at: 20k, 100k …", count=True, least=1)
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
