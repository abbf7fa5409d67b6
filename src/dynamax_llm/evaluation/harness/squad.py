"""A stand-in for the module in which lm-eval's CoQA looks for SQuAD's exact match and F1.

lm-eval 0.4.13 imports ``transformers.data.metrics.squad_metrics``, which transformers 5 no longer has, so that the
task ``coqa`` could not be loaded. The scores are those of ``dynamax_llm.metrics``; there the answer comes first.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from dynamax_llm.metrics import exact_match, f1, normalise

_HOME = "transformers.data.metrics"


@contextmanager
def stand_in() -> Iterator[None]:
    """While this lasts, the module that lm-eval looks for can be imported; nothing is replaced if it exists."""
    names = (_HOME, f"{_HOME}.squad_metrics")
    if any(name in sys.modules for name in names) or _exists():
        yield
        return
    package, module = ModuleType(names[0]), ModuleType(names[1])
    vars(module).update(
        compute_exact=lambda gold, answer: int(exact_match(answer, gold)),
        compute_f1=lambda gold, answer: f1(answer, gold),
        normalize_answer=normalise,
    )
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
