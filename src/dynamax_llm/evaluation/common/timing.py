"""Wall clock, alone and in pairs: two sides take turns, so that a slow moment of the machine affects both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")


def wait(device: torch.device | str) -> None:
    """Wait until the device has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], T], device: torch.device | str = "cpu") -> tuple[float, T]:
    """Seconds of one call, the device's work included, and what it returned."""
    wait(device)
    start = time.perf_counter()
    out = call()
    wait(device)
    return time.perf_counter() - start, out


def seconds(call: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds of one call, the device's work included."""
    return timed(call, device)[0]


class Ratio(NamedTuple):
    """Median, least and greatest of ratios of neighbouring runs."""

    median: float
    least: float
    greatest: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.least:.3f} to {self.greatest:.3f})"


def in_turns(one: Callable[[], T], other: Callable[[], T], turn: int) -> tuple[T, T]:
    """What both return, ``one`` called first in even turns and ``other`` first in odd ones."""
    if turn % 2:
        second, first = other(), one()
    else:
        first, second = one(), other()
    return first, second


def paired(one: Callable[[], float], other: Callable[[], float], repeats: int) -> Ratio:
    """one() / other() over neighbouring runs in alternating order, after one run of each that is not counted.

    Ratios of neighbours stay right on a machine whose speed drifts.
    """
    one(), other()
    pairs = [in_turns(one, other, turn) for turn in range(repeats)]
    ratios = [top / bottom for top, bottom in pairs]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))
