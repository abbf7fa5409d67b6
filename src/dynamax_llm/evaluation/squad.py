"""SQuAD's exact match and F1, and a stand-in for the module in which lm-eval's CoQA looks for them.

lm-eval 0.4.13 imports ``transformers.data.metrics.squad_metrics``, which transformers 5 no longer has, so that the
task ``coqa`` cannot be loaded. The two scores are defined in Rajpurkar et al. (2016, arXiv 1606.05250): answers are
compared in lower case, without punctuation and articles, as bags of words for F1.
"""

from __future__ import annotations

import importlib.util
import re
import string
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_HOME = "transformers.data.metrics"
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(answer: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    plain = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def exact(gold: str, answer: str) -> int:
    """1 if the two answers are the same after normalisation, else 0."""
    return int(normalise(gold) == normalise(answer))


def f1(gold: str, answer: str) -> float:
    """Harmonic mean of precision and recall of words; without words on either side, 1 if neither has any, else 0."""
    wanted, given = normalise(gold).split(), normalise(answer).split()
    if not wanted or not given:
        return float(wanted == given)
    common = sum((Counter(wanted) & Counter(given)).values())
    return 2.0 * common / (len(wanted) + len(given))


@contextmanager
def stand_in() -> Iterator[None]:
    """While this lasts, the module that lm-eval looks for can be imported; nothing is replaced if it exists."""
    names = (_HOME, f"{_HOME}.squad_metrics")
    if any(name in sys.modules for name in names) or _exists():
        yield
        return
    package, module = ModuleType(names[0]), ModuleType(names[1])
    vars(module).update(compute_exact=exact, compute_f1=f1, normalize_answer=normalise)
    vars(package)["squad_metrics"] = module
    sys.modules.update(zip(names, (package, module), strict=True))
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)


def _exists() -> bool:
    try:
        return importlib.util.find_spec(f"{_HOME}.squad_metrics") is not None
    except ModuleNotFoundError:
        return False
