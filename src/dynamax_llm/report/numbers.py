"""Numbers as the report shows them: one form for every kind of figure, and a dash where there is none."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

DASH, MINUS = "–", "−"
#: No-break space: the sign never begins a line.
PERCENT = "\u00a0%"


def number(value: Any, digits: int = 3) -> str:
    """``0.981``; values from 10 get two digits; a dash for None and whatever else is not a finite number."""
    if not is_number(value):
        return DASH
    return _signed(f"{value:.{digits if abs(value) < 10 else 2}f}")


def difference(value: Any) -> str:
    """``+0.012``, ``−0.003``, and ``0.000`` where rounding leaves nothing."""
    text = number(value)
    return f"+{text}" if is_number(value) and text.strip("0.") and not text.startswith(MINUS) else text


def percent(value: Any) -> str:
    """A share as ``14.2 %``."""
    return f"{_signed(f'{100 * value:.1f}')}{PERCENT}" if is_number(value) else DASH


def times(value: Any) -> str:
    """A ratio as ``1.04×``."""
    return f"{value:.2f}×" if is_number(value) else DASH


def share(value: Any) -> str:
    """At most three significant digits: ``0.5``, ``0.125``."""
    return _signed(f"{value:.3g}") if is_number(value) else DASH


def spread(interval: Any, form: Any = number) -> str:
    """The ends of an interval with ``low`` and ``high``, as ``0.97 … 0.99``; empty where it has none."""
    if interval is None or interval.low is None or interval.high is None:
        return ""
    low = form(interval.low)
    return f"{low if low == DASH else low.removesuffix(PERCENT).removesuffix('×')} … {form(interval.high)}"


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def slug(*words: str) -> str:
    """Words as one name for ids and files: ``Mamba 7B``, ``f1`` is ``mamba-7b-f1``."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-") or "x"


def is_number(value: Any) -> bool:
    """Whether the value is a finite number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _signed(text: str) -> str:
    """With the typographic minus sign, and no sign before a zero."""
    return text.lstrip("-") if not text.strip("-0.") else text.replace("-", MINUS)
