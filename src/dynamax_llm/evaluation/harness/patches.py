"""The two changes to other packages that lm-eval 0.4.13 needs, each in force only within a ``with``.

``squad_metrics``: its task ``coqa`` imports ``transformers.data.metrics.squad_metrics``, which transformers 5 removed.
``single_scores``: its task ``truthfulqa_gen`` draws a thousand bootstrap samples of every single ROUGE score.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from dynamax_llm.metrics import exact_match, f1, normalise

_PACKAGE = "transformers.data.metrics"


@contextmanager
def squad_metrics() -> Iterator[None]:
    """The missing module, its scores those of ``dynamax_llm.metrics``; nothing is replaced where it exists."""
    names = (_PACKAGE, f"{_PACKAGE}.squad_metrics")
    try:
        exists = any(name in sys.modules for name in names) or importlib.util.find_spec(names[1]) is not None
    except ModuleNotFoundError:
        exists = False
    if exists:
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


@contextmanager
def single_scores() -> Iterator[None]:
    """One draw instead of a thousand: whatever is drawn from a single number is that number, so no figure changes."""
    from rouge_score import scoring

    aggregator = scoring.BootstrapAggregator
    scoring.BootstrapAggregator = functools.partial(aggregator, n_samples=1)
    try:
        yield
    finally:
        scoring.BootstrapAggregator = aggregator
