"""Numbers as the report shows them: every kind in one way, and a dash where there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dynamax_llm.evaluation.harness.results import Interval

DASH, MINUS = "–", "−"
#: Never at the beginning of a line.
PERCENT = "\u00a0%"


def number(value: Any, digits: int = 3) -> str:
    """``0.981``; scores on a scale of 0 to 100 get fewer digits; a dash for None and for what is no number."""
    if not is_number(value):
        return DASH
    return _signed(f"{value:.{digits if abs(value) < 10 else 2}f}")


def difference(value: Any) -> str:
    """``+0.012``, ``−0.003``, and ``0.000`` where nothing is left of it."""
    shown = number(value)
    return f"+{shown}" if is_number(value) and shown.strip("0.") and not shown.startswith(MINUS) else shown


def percent(value: Any) -> str:
    """A share as ``14.2 %``."""
    return f"{_signed(f'{100 * value:.1f}')}{PERCENT}" if is_number(value) else DASH


def times(value: Any) -> str:
    """A ratio as ``1.04×``."""
    return f"{value:.2f}×" if is_number(value) else DASH


def share(value: Any) -> str:
    """Layers or shares that need no more than three digits: ``0.5``, ``0.125``."""
    return _signed(f"{value:.3g}") if is_number(value) else DASH


def spread(interval: Interval | None, shown: Any = number) -> str:
    """The two ends of an interval, ``0.97 to 0.99`` written short; empty where there are none."""
    if interval is None or interval.low is None or interval.high is None:
        return ""
    low, high = shown(interval.low), shown(interval.high)
    low = low.removesuffix(PERCENT).removesuffix("×") if low != DASH else low
    return f"{low} … {high}"


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def is_number(value: Any) -> bool:
    """A finite number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _signed(text: str) -> str:
    """A real minus sign, and none before a zero."""
    return text.lstrip("-") if not text.strip("-0.") else text.replace("-", MINUS)
