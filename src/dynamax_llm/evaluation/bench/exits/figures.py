"""Samples of a mode to its figures: speed over plain generate with an interval, then counts."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from dynamax_llm.evaluation.bench.exits.document import ALL, Figures, ModeRow, Plain, Sample
from dynamax_llm.evaluation.common.bootstrap import interval, median
from dynamax_llm.evaluation.common.documents import Interval


def figures(samples: Sequence[Sample]) -> Figures:
    """Of at least one sample."""
    tokens = sum(sample.tokens for sample in samples)

    def mean(name: str) -> float:
        return sum(getattr(sample, name) * sample.tokens for sample in samples) / tokens

    def total(name: str) -> int:
        return sum(getattr(sample, name) or 0 for sample in samples)

    windows, checked = total("verifications"), total("checked")
    return Figures(
        prompts=sum(len(sample.prompts) for sample in samples),
        tokens=tokens,
        tokens_per_second=rate(samples, "seconds"),
        plain_tokens_per_second=rate(samples, "plain_seconds"),
        ratio=speed(samples),
        mean_depth=mean("mean_depth"),
        tokens_per_verification=checked / windows if windows else None,
        acceptance=total("accepted") / checked if checked else None,
        equal=mean("equal"),
        same=total("same"),
        counted_reduction=mean("counted_reduction"),
        pass_reduction=mean("pass_reduction"),
    )


def rate(samples: Sequence[Sample], times: str) -> float:
    """New tokens per second, each batch with the median of its ``times``: "seconds" or "plain_seconds"."""
    return sum(sample.tokens for sample in samples) / sum(statistics.median(getattr(one, times)) for one in samples)


def speed(samples: Sequence[Sample]) -> Interval:
    """Speed over plain generate's; see ``document.Figures``."""
    ratios = [_ratios(sample) for sample in samples]
    if len(ratios) == 1:
        return Interval(value=statistics.median(ratios[0]), low=min(ratios[0]), high=max(ratios[0]))
    return interval([statistics.median(values) for values in ratios], statistic=median)


def by_kind(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples of every kind; empty where prompts have none."""
    kinds: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.kind is not None:
            kinds.setdefault(sample.kind, []).append(sample)
    return kinds


def plain(rows: Sequence[ModeRow]) -> tuple[Plain, ...]:
    """Plain generate's speed at every batch size, from its runs beside all modes."""
    found = []
    for batch in sorted({row.batch for row in rows}):
        samples = [row.samples for row in rows if row.batch == batch]
        pooled = [_pooled(alike) for alike in zip(*samples, strict=True)]
        groups = {ALL: pooled, **by_kind(pooled)}
        rates = {kind: rate(group, "plain_seconds") for kind, group in groups.items()}
        found.append(Plain(batch=batch, tokens_per_second=rates))
    return tuple(found)


def _pooled(samples: Sequence[Sample]) -> Sample:
    """One batch of prompts with the plain times of all modes."""
    seconds = tuple(value for sample in samples for value in sample.plain_seconds)
    return samples[0].model_copy(update={"plain_seconds": seconds})


def _ratios(sample: Sample) -> list[float]:
    return [whole / own for whole, own in zip(sample.plain_seconds, sample.seconds, strict=True)]
