"""From per-sample records to the figures of a cell, each paired with the full model's on the same samples."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dynamax_llm.evaluation.common.bootstrap import interval, median, weighted
from dynamax_llm.evaluation.harness.results import Bin, Cell, Interval, Metric, Reliability
from dynamax_llm.evaluation.harness.settings import Variant
from dynamax_llm.evaluation.harness.tasks import EvalTask
from dynamax_llm.metrics import first_divergence, is_degenerate, rouge_l

#: Bins of a reliability curve, of equal width.
BINS = 10

Record = Mapping[str, Any]


def cell(
    backbone: str,
    n_layers: int,
    variant: Variant,
    task: EvalTask,
    own: Sequence[Record],
    full: Sequence[Record],
    timings: Sequence[Record],
    seed: int,
) -> Cell:
    """The cell of one setting: ``own`` and ``full`` are its and the full model's records, document by document."""
    layers = [depth for record in own for depth in record["layers"]]
    counts = [len(record["layers"]) for record in own]
    if variant.facts.kind == "full":
        speed_up: Interval | None = Interval(value=1.0)
    else:
        speed_up = interval([item["ratio"] for item in timings], seed, median) if timings else None
    return Cell(
        backbone=backbone,
        setting=variant.facts.id,
        task=task.facts.name,
        samples=len(own),
        tokens=len(layers),
        metrics=_metrics(task, own, full, seed),
        **(_texts(own, full, seed) if task.generates else _NO_TEXTS),
        mean_depth=weighted([sum(record["layers"]) / n_layers for record in own], counts, seed),
        histogram=dict(sorted(Counter(layers).items())),
        counted_reduction=weighted([record["reduction"] * len(record["layers"]) for record in own], counts, seed),
        pass_reduction=_pass_reduction(own),
        speed_up=speed_up,
        timed_samples=len(timings),
    )


_NO_TEXTS: dict[str, Any] = dict.fromkeys(("agreement", "rouge_l", "identical", "first_divergence", "degenerate"))


def _metrics(task: EvalTask, own: Sequence[Record], full: Sequence[Record], seed: int) -> dict[str, Metric]:
    metrics = {}
    for name in own[0]["metrics"]:
        mine, theirs = ([record["metrics"][name] for record in records] for records in (own, full))
        value = task.aggregate(name, mine)
        low = high = None
        delta = Interval(value=value - task.aggregate(name, theirs))
        # A figure that is not a mean of numbers (a tuple per document) has a value and no interval.
        if all(isinstance(item, int | float) for item in (*mine, *theirs)):
            around = interval(mine, seed)
            low, high = around.low, around.high
            delta = interval([a - b for a, b in zip(mine, theirs, strict=True)], seed)
        metrics[name] = Metric(value=value, low=low, high=high, delta=delta)
    return metrics


def _texts(own: Sequence[Record], full: Sequence[Record], seed: int) -> dict[str, Any]:
    pairs = list(zip(own, full, strict=True))
    apart = [first_divergence(mine["tokens"], theirs["tokens"]) for mine, theirs in pairs]
    differing = [index for index in apart if index is not None]
    tokens = [len(record["tokens"]) for record in full]
    agreed = [record["agreement"] * count for record, count in zip(own, tokens, strict=True)]
    return {
        "agreement": weighted(agreed, tokens, seed),
        "rouge_l": interval([rouge_l(mine["text"], theirs["text"]) for mine, theirs in pairs], seed),
        "identical": 1.0 - len(differing) / len(apart),
        "first_divergence": float(statistics.median(differing)) if differing else None,
        "degenerate": interval([float(is_degenerate(record["tokens"], record["text"])) for record in own], seed),
    }


def _pass_reduction(own: Sequence[Record]) -> float | None:
    """Over all steps: an answer's share weighs as much as it has tokens after the first."""
    steps = [max(len(record["layers"]) - 1, 0) for record in own]
    if not sum(steps):
        return None
    return sum(record["passes"] * count for record, count in zip(own, steps, strict=True)) / sum(steps)


def reliability(backbone: str, variant: Variant, records: Sequence[Record]) -> list[Reliability]:
    """Per exit of a head, from records that hold ``confidences``: binned curves and the expected calibration error.

    Expected calibration error after Naeini et al. (2015): |right - confidence| of each bin, weighted by its tokens.
    """
    curves = []
    for exit, layer in enumerate(variant.facts.layers):
        points = [point for record in records for point in record["confidences"][exit]]
        if not points:
            continue
        binned: dict[int, list[tuple[float, bool]]] = {}
        for confidence, right in points:
            binned.setdefault(min(int(confidence * BINS), BINS - 1), []).append((confidence, right))
        bins = tuple(
            Bin(
                confidence=statistics.fmean(confidence for confidence, _ in items),
                right=statistics.fmean(float(right) for _, right in items),
                tokens=len(items),
            )
            for _, items in sorted(binned.items())
        )
        error = sum(abs(item.right - item.confidence) * item.tokens for item in bins) / len(points)
        curves.append(Reliability(backbone=backbone, family=variant.facts.family, layer=layer, bins=bins, error=error))
    return curves
