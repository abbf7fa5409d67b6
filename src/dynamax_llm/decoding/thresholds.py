"""Thresholds: how sure an exit must be. One for all exits or one each, fixed or decaying over the generation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dynamax_llm.errors import UsageError

NEVER = "never"
SCHEDULES = ("fixed", "decaying")
#: CALM's decay (arXiv 2207.07061): the threshold falls from 0.9 x + 0.1 towards 0.9 x at this rate.
TEMPERATURE = 4.0

Threshold = float | str


@dataclass(frozen=True)
class Thresholds:
    """Per exit, the least confidence that lets a token leave; None at an exit where none ever may."""

    values: tuple[float | None, ...]
    schedule: str = "fixed"
    temperature: float = TEMPERATURE

    @classmethod
    def parse(
        cls,
        threshold: Threshold | Sequence[Threshold],
        n_exits: int,
        schedule: str = "fixed",
        drift_penalty: Sequence[float] = (),
    ) -> Thresholds:
        """From one value or one per exit, each in [0, 1] or "never". Raises UsageError naming what is allowed.

        ``drift_penalty``: what leaving costs besides, per exit. One value for all exits rises by it, unless it is
        0; an exit where that leaves nothing to be sure enough of is closed.
        """
        common = isinstance(threshold, str | int | float)
        items = [threshold] * n_exits if isinstance(threshold, str | int | float) else list(threshold)
        if len(items) != n_exits:
            raise UsageError(
                f"{len(items)} thresholds for {n_exits} exits: give one for all of them, or exactly {n_exits}."
            )
        if schedule not in SCHEDULES:
            raise UsageError(f"unknown schedule {schedule!r}. Available: {', '.join(SCHEDULES)}.")
        values = tuple(map(_value, items))
        if common and drift_penalty:
            values = tuple(_net(value, cost) for value, cost in zip(values, drift_penalty, strict=True))
        return cls(values, schedule)

    @property
    def active(self) -> int:
        """Exits up to the last one that a token may leave by; later ones are never asked."""
        return max((index + 1 for index, value in enumerate(self.values) if value is not None), default=0)

    def at(self, step: int, horizon: int) -> tuple[float | None, ...]:
        """The thresholds for the ``step``-th of at most ``horizon`` new tokens."""
        if self.schedule == "fixed":
            return self.values
        decay = 0.1 * math.exp(-self.temperature * step / max(horizon, 1))
        return tuple(None if value is None else min(max(0.9 * value + decay, 0.0), 1.0) for value in self.values)


def _net(value: float | None, cost: float) -> float | None:
    """The confidence that leaves ``value`` when ``cost`` is taken off; 0 asks for nothing and stays 0."""
    if value is None or value == 0.0:
        return value
    return value + cost if value + cost <= 1.0 else None


def _value(item: Threshold) -> float | None:
    if item == NEVER:
        return None
    try:
        value = float(item)
    except (TypeError, ValueError):
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise UsageError(f"threshold {item!r}: a confidence threshold lies between 0 and 1, or is {NEVER!r}.")
    return value
