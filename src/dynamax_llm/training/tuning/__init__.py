"""Tuning a backbone so that its exits pay: multi-exit fine-tuning of an ordinary checkpoint.

settings        every number a user may turn; the loss itself is ``training.multi_exit``
student         what is trained, LoRA adapters or a copy of all weights, and the teacher beside it
learner         one step: layers run once, logits in slices, AdamW
measure         what a model's layers are worth on held-out text
folder          a plain Hugging Face folder, which appears whole or not at all
run             the run itself, resumable
"""

from typing import TYPE_CHECKING

from dynamax_llm.lazy import lazy
from dynamax_llm.training.tuning.settings import TuneSettings

if TYPE_CHECKING:
    from dynamax_llm.training.tuning.run import Tuned, tune

__all__ = ["TuneSettings", "Tuned", "tune"]

__getattr__ = lazy(__name__, {"Tuned": "run", "tune": "run"})
