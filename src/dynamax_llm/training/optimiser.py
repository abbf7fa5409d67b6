"""The optimisers of training: their learning rate, their averaged weights, their state on disk.

``adamw`` warms up and then falls by a cosine. ``schedule-free`` is AdamW without a schedule (Defazio et al.,
arXiv 2405.15682; the package schedulefree): its rate stays after warm-up, and what it learns is an average of its
iterates, so weights are evaluated and kept in ``averaged``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import AdamW, Optimizer

from dynamax_llm.errors import UsageError
from dynamax_llm.training.settings import SCHEDULE_FREE, TrainSettings


def build(settings: TrainSettings, parameters: Sequence[Tensor]) -> Optimizer:
    """The optimiser that ``settings`` name. Raises UsageError where its package is not installed."""
    if settings.optimiser == SCHEDULE_FREE:
        try:
            from schedulefree import AdamWScheduleFree
        except ImportError:
            raise UsageError(
                f"optimiser {SCHEDULE_FREE!r} needs the package schedulefree: pip install 'dynamax-llm[train]', or "
                "take optimiser 'adamw'."
            ) from None
        optimiser = AdamWScheduleFree(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        optimiser.train()
        return optimiser
    fused = parameters[0].device.type == "cuda"
    return AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused)


def learning_rate(progress: float, peak: float, warmup: float) -> float:
    """Linear warm-up to ``peak``, then cosine to 0, at ``progress`` in [0, 1] of the budget."""
    if progress < warmup:
        return peak * max(progress, 1e-3) / warmup
    through = (progress - warmup) / max(1.0 - warmup, 1e-9)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(through, 1.0)))


def set_rate(optimiser: Optimizer, progress: float, peak: float, warmup: float) -> None:
    """Set the learning rate at ``progress`` in [0, 1] of the budget."""
    if _averages(optimiser):
        progress = min(progress, warmup)  # the cosine does not begin
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(progress, peak, warmup)


def _averages(optimiser: Optimizer) -> bool:
    """Whether it is schedule-free."""
    return hasattr(optimiser, "eval")


@contextmanager
def averaged(optimiser: Optimizer) -> Iterator[None]:
    """Inside, parameters are those to evaluate and to keep; outside, those at which gradients are taken."""
    if _averages(optimiser):
        optimiser.eval()
    try:
        yield
    finally:
        if _averages(optimiser):
            optimiser.train()


def tensors(optimiser: Optimizer) -> dict[str, Tensor]:
    """Moments and the like, by parameter number."""
    states = optimiser.state_dict()["state"]
    return {f"optimiser.{index}.{name}": value for index, state in states.items() for name, value in state.items()}


def numbers(optimiser: Optimizer) -> dict[str, Any]:
    """What the optimiser counts for all its parameters together, as JSON types: nothing, in AdamW."""
    group = optimiser.state_dict()["param_groups"][0]
    return {name: group[name] for name in ("k", "weight_sum", "lr_max", "train_mode") if name in group}


def restore(optimiser: Optimizer, saved: dict[str, Tensor], counts: dict[str, Any] | None = None) -> None:
    """Inverse of ``tensors``, and of ``numbers`` where they are given; keys of ``saved`` begin with "optimiser."."""
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in saved.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".")
            states.setdefault(int(index), {})[name] = value
    groups = [{**group, **(counts or {})} for group in optimiser.state_dict()["param_groups"]]
    optimiser.load_state_dict({"state": states, "param_groups": groups})
