"""The grid of arXiv 2504.20922 as one resumable run: backbones x heads x tasks, thresholds swept, baselines beside."""

from dynamax_llm.paper.grid import HEADS, MODELS, TASKS, THRESHOLDS, PaperPlan, run

__all__ = ["HEADS", "MODELS", "TASKS", "THRESHOLDS", "PaperPlan", "run"]
