"""What an evaluation covers and how it is carried out: defaults, meaning and bounds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dynamax_llm.errors import UsageError
from dynamax_llm.settings import CHAT_HELP, SEED, SYSTEM_HELP, DecodeSettings, check_chat, check_settings, setting

MARGIN = "softmax_margin"


@dataclass(frozen=True)
class Plan:
    """How an evaluation is carried out; what it covers is in ``EvalSettings`` and the tasks. Raises UsageError."""

    batch: int = setting(16, "Rows at a time; the texts do not depend on it.", flag="--batch-size", least=1)
    timed: int = setting(4, "Documents per task whose decoding is timed, at batch 1; 0: none.", least=0)
    seed: int = setting(0, "Seed of the choice of documents and of the bootstrap.", **SEED)
    examples: int = setting(2, "Documents per generation task that are kept token by token.", flag="", least=0)

    def __post_init__(self) -> None:
        check_settings(self, "evaluation setting")


@dataclass(frozen=True)
class EvalSettings:
    """What is evaluated: tasks, their documents, and the settings of exits. Raises UsageError."""

    tasks: tuple[str, ...] = setting(
        ("triviaqa", "coqa", "truthfulqa_gen"),
        "Comma list: triviaqa, coqa, truthfulqa_gen, truthfulqa_mc1, truthfulqa_mc2; online also every other single "
        "task of lm-evaluation-harness.",
    )
    thresholds: tuple[str, ...] = setting(
        (str(DecodeSettings.threshold),),
        "Comma list of settings, each for all exits: 0.8,0.9,never.",
        flag="--threshold",
    )
    measures: tuple[str, ...] | None = setting(
        None,
        "Comma list of confidence measures to evaluate beside the heads; default with --baselines: softmax_margin.",
        flag="--measure",
        metavar="NAMES",
    )
    baselines: bool = setting(
        True, "Margin rule, static depth at every exit, pruned layers.", flag="--baselines/--no-baselines"
    )
    limit: int = setting(32, "Documents per task.", least=1)
    shots: int | None = setting(
        None, "Worked examples in a prompt. Default: 2 triviaqa, 0 coqa, 1 truthfulqa.", least=0
    )
    max_new_tokens: int = setting(32, "Tokens to generate at most.", least=1)
    data_dir: Path | None = setting(None, "Folder of local task files (triviaqa_dev.jsonl …), for use offline.")
    chat: bool = setting(False, f"{CHAT_HELP} Worked examples become messages of their own.")
    system: str | None = setting(None, SYSTEM_HELP, metavar="TEXT")

    def __post_init__(self) -> None:
        check_settings(self, "evaluation setting")
        check_chat(self, "evaluation setting")
        for name in ("tasks", "thresholds"):
            if not getattr(self, name):
                raise UsageError(f"evaluation setting {name} = (): give at least one.")

    @property
    def compared_measures(self) -> tuple[str, ...]:
        """The confidence measures evaluated beside the heads."""
        return self.measures or ((MARGIN,) if self.baselines else ())
