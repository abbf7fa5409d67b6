"""The grid of arXiv 2504.20922 as one resumable run: backbones x heads x tasks, thresholds swept, baselines beside."""

from typing import TYPE_CHECKING

from dynamax_llm.lazy import lazy
from dynamax_llm.paper.plan import HEADS, MODELS, TASKS, THRESHOLDS, PaperPlan

if TYPE_CHECKING:
    from dynamax_llm.paper.grid import run

__all__ = ["HEADS", "MODELS", "TASKS", "THRESHOLDS", "PaperPlan", "run"]

__getattr__ = lazy(__name__, {"run": "grid"})
