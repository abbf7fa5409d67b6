"""What a benchmark of saved exits measures: every field has its option of ``dynamax bench``, those of ``BenchSettings``
under the same name."""

from __future__ import annotations

from dataclasses import dataclass

from dynamax_llm.errors import UsageError
from dynamax_llm.settings import ENGINES, MEASURES, STATE_POLICIES, DecodeSettings, check_settings, setting


@dataclass(frozen=True)
class ExitBenchSettings:
    """Which modes are timed, on how many prompts. Raises UsageError for values that are not allowed.

    Every threshold of ``thresholds`` is timed under every one of ``policies``, and every one of ``windows`` where
    tokens wait; besides, always, full depth and the promises that are recorded with the exits. ``new``: new tokens of a
    prompt at most; every mode writes as many as plain generate does. ``quiet``: no progress on stderr.
    """

    thresholds: tuple[float, ...] = setting(
        (DecodeSettings.threshold,), "With --data: least confidence to leave with; several are timed one by one.",
        flag="--threshold", least=0, most=1,
    )  # fmt: skip
    measure: str | None = setting(
        None, "With --data: decide by this measure, not by the trained heads.", choices=MEASURES, metavar="NAME"
    )
    prompts: int = setting(16, "With --data: prompts that are timed, of all kinds alike.", least=1)
    chat: bool = setting(False, "With --data: put prompts through the tokenizer's chat template.")
    system: str | None = setting(None, "With --chat: system message of a chat.", metavar="TEXT")
    threads: int | None = setting(None, "With --data: threads of the processor. Default: torch's own.", least=1)
    new: int = setting(128, "New tokens of a prompt at most.", flag="--max-new-tokens", least=1)
    repeats: int = setting(3, "Times everything is measured.", least=1)
    batches: tuple[int, ...] = setting((1,), "Batch sizes.", flag="--batch-size", least=1)
    policies: tuple[str, ...] = setting(
        ("propagate", "defer", "verify"), "State policies.", flag="--policy", choices=STATE_POLICIES
    )
    windows: tuple[int, ...] = setting(
        (DecodeSettings.window,), "Tokens that wait under defer and verify.", flag="--window", least=1
    )
    engine: str | None = setting(None, "cuda or eager. Default: the fastest that can.", choices=ENGINES, metavar="NAME")
    quiet: bool = False

    def __post_init__(self) -> None:
        check_settings(self, "bench setting")
        if self.system is not None and not self.chat:
            raise UsageError(
                f"bench setting system = {self.system!r}: only a chat has a system message. Give `chat` too."
            )
        for name in ("thresholds", "batches", "policies", "windows"):
            if not getattr(self, name):
                raise UsageError(f"bench setting {name} = (): give at least one.")
