"""What the paper's grid runs, on what, and how: defaults, meaning and bounds.

From the paper and its author's public code (arXiv 2504.20922): the pair of backbones, the three heads, the tasks, 32
new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dynamax_llm.decoding.thresholds import Thresholds
from dynamax_llm.errors import UsageError
from dynamax_llm.evaluation.harness.plan import EvalSettings, Plan
from dynamax_llm.exits.config import HEADS as HEAD_KINDS
from dynamax_llm.settings import STATE_POLICIES, DecodeSettings, check_settings, setting
from dynamax_llm.training.settings import TrainSettings

MODELS = ("mistralai/Mistral-7B-v0.3", "mistralai/Mamba-Codestral-7B-v0.1")
HEADS = ("linear", "transformer", "mamba")
TASKS = EvalSettings.tasks
#: The author's code swept 0.25 to 0.7; our heads' confidences estimate agreement, so higher ones are of interest too.
THRESHOLDS = (0.25, 0.4, 0.55, 0.7, 0.85, 0.95)


@dataclass(frozen=True)
class PaperPlan:
    """What is run, on what, and how. ``train_data`` is needed only where trained exits are missing.

    ``limit``: documents per task. ``data_dir``: local task files, for use offline. Raises UsageError.
    """

    models: tuple[str, ...] = MODELS
    heads: tuple[str, ...] = setting(HEADS, "Comma list: linear, mlp, transformer, mamba.", choices=HEAD_KINDS)
    tasks: tuple[str, ...] = setting(TASKS, "Comma list of lm-evaluation-harness tasks.")
    thresholds: tuple[float, ...] = setting(
        THRESHOLDS,
        "Comma list; each is one setting of every head and of the margin rule.",
        flag="--threshold",
        note=" The full model is always run: leave never out.",
        least=0,
        most=1,
    )
    limit: int = setting(100, "Documents per task.", least=1)
    max_new_tokens: int = setting(EvalSettings.max_new_tokens, "Tokens to generate at most.", least=1)
    data_dir: Path | None = setting(None, "Folder of local task files (triviaqa_dev.jsonl …), for use offline.")
    train_data: str | None = None
    training: TrainSettings = field(default_factory=TrainSettings)
    how: Plan = field(default_factory=Plan)
    policy: str = setting(DecodeSettings.policy, "State of skipped layers.", choices=STATE_POLICIES, metavar="NAME")
    engine: str | None = None
    dtype: str = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        check_settings(self, "grid setting")
        for name in ("models", "heads", "tasks", "thresholds"):
            values = getattr(self, name)
            if not values:
                raise UsageError(f"no {name}: give at least one.")
            twice = sorted({str(value) for value in values if values.count(value) > 1})
            if twice:
                raise UsageError(f"{name} {', '.join(twice)} given twice: name each once.")
        for value in self.thresholds:
            Thresholds.parse(value, 1)

    @property
    def names(self) -> dict[str, str]:
        """What each model is called in the document: the end of its path, or all of it where two ends are the same."""
        ends = [Path(model).name for model in self.models]
        short = len(set(ends)) == len(ends)
        return {model: end if short else model.replace("/", "--") for model, end in zip(self.models, ends, strict=True)}
