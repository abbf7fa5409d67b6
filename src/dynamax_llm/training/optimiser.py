"""The optimisers of training, and what each needs: its learning rate, its averaged weights, its state on disk.

``adamw`` warms up and then falls by a cosine. ``schedule-free`` is AdamW without a schedule (Defazio et al.,
arXiv 2405.15682; the package schedulefree): it warms up and stays, and what it learns is an average of its iterates, so
weights are evaluated and kept in ``averaged``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import AdamW, Optimizer

from dynamax_llm.errors import UsageError
from dynamax_llm.training.objective import learning_rate
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


def set_rate(optimiser: Optimizer, settings: TrainSettings, progress: float) -> None:
    """The learning rate at ``progress`` in [0, 1] of the budget."""
    if settings.optimiser == SCHEDULE_FREE:
        progress = min(progress, settings.warmup)  # where the cosine has not begun
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(progress, settings.lr, settings.warmup)


@contextmanager
def averaged(optimiser: Optimizer) -> Iterator[None]:
    """Inside, parameters are those to evaluate and to keep; outside, those to make gradients at."""
    switches = hasattr(optimiser, "eval")
    if switches:
        optimiser.eval()
    try:
        yield
    finally:
        if switches:
            optimiser.train()


def tensors(optimiser: Optimizer) -> dict[str, Tensor]:
    """Moments and the like, by parameter number."""
    states = optimiser.state_dict()["state"]
    return {f"optimiser.{index}.{name}": value for index, state in states.items() for name, value in state.items()}


def numbers(optimiser: Optimizer) -> dict[str, Any]:
    """What the optimiser counts for all its parameters together, as JSON types: nothing, in AdamW."""
    group = optimiser.state_dict()["param_groups"][0]
    return {name: group[name] for name in ("k", "weight_sum", "lr_max", "train_mode") if name in group}


def restore(optimiser: Optimizer, found: dict[str, Tensor], counted: dict[str, Any] | None = None) -> None:
    """Inverse of ``tensors``, and of ``numbers`` where they are given; keys of ``found`` begin with "optimiser."."""
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in found.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".")
            states.setdefault(int(index), {})[name] = value
    groups = [{**group, **(counted or {})} for group in optimiser.state_dict()["param_groups"]]
    optimiser.load_state_dict({"state": states, "param_groups": groups})
