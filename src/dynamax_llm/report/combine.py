"""Several evaluations as one, if they do not contradict each other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

from dynamax_llm.errors import DataError, UsageError
from dynamax_llm.evaluation.harness.results import Cell, Evaluation, Example, Setting

T = TypeVar("T")


def combine(evaluations: Sequence[Evaluation]) -> Evaluation:
    """One document of all; what two of them say alike is said once.

    Raises UsageError if there are none, or if two disagree about a backbone, setting, task or cell; DataError if a
    part names a backbone, setting or task that no document describes.
    """
    if not evaluations:
        raise UsageError("no evaluation given: a report needs at least one. Give a folder that dynamax eval wrote.")
    names = unique(name for item in evaluations for name in item.settings)
    merged = Evaluation(
        title=" · ".join(unique(item.title for item in evaluations)),
        notes=tuple(unique(note for item in evaluations for note in item.notes)),
        runs=tuple(unique(run for item in evaluations for run in item.runs)),
        backbones=_agreed(evaluations, "backbone", lambda item: item.backbones, lambda part: part.name),
        settings={name: _settings(evaluations, name) for name in names},
        tasks=_agreed(evaluations, "task", lambda item: item.tasks, lambda part: part.name),
        cells=_agreed(
            evaluations, "cell", lambda item: item.cells, lambda part: (part.backbone, part.setting, part.task)
        ),
        examples=tuple(unique(part for item in evaluations for part in item.examples)),
        reliability=_agreed(
            evaluations,
            "reliability of",
            lambda item: item.reliability,
            lambda part: (part.backbone, part.family, part.layer),
        ),
        promises={
            name: tuple(unique(part for item in evaluations for part in item.promises.get(name, ())))
            for name in unique(name for item in evaluations for name in item.promises)
        },
        shifts=tuple(unique(part for item in evaluations for part in item.shifts)),
    )
    _check_names(merged)
    return merged


def _settings(evaluations: Sequence[Evaluation], backbone: str) -> tuple[Setting, ...]:
    return _agreed(
        evaluations, f"setting of {backbone}", lambda item: item.settings.get(backbone, ()), lambda part: part.id
    )


def unique(items: Iterable[T]) -> list[T]:
    """Items without repetition, in the order of their first appearance; they need not be hashable."""
    found: list[T] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found


def _agreed(
    evaluations: Sequence[Evaluation],
    what: str,
    parts: Callable[[Evaluation], Sequence[Any]],
    key: Callable[[Any], Hashable],
) -> tuple[Any, ...]:
    """Parts of all documents by their key. Raises UsageError naming the first field in which two of a key differ."""
    found: dict[Hashable, Any] = {}
    for part in (part for item in evaluations for part in parts(item)):
        known = found.setdefault(key(part), part)
        if known != part:
            ours, theirs = known.model_dump(), part.model_dump()
            field = next(name for name in ours if ours[name] != theirs[name])
            place = key(part)
            name = " · ".join(map(str, place)) if isinstance(place, tuple) else repr(place)
            raise UsageError(
                f"the evaluations disagree about the {what} {name}: its {field} is {_brief(ours[field])} in one and "
                f"{_brief(theirs[field])} in another. Report them apart, or evaluate both in the same way."
            )
    return tuple(found.values())


def _check_names(document: Evaluation) -> None:
    backbones, tasks = {item.name for item in document.backbones}, {item.name for item in document.tasks}
    settings = {(name, item.id) for name, items in document.settings.items() for item in items}
    parts: list[Cell | Example] = [*document.cells, *document.examples]
    for part in parts:
        for what, known in (
            (f"backbone {part.backbone!r}", part.backbone in backbones),
            (f"task {part.task!r}", part.task in tasks),
            (f"setting {part.setting!r} of {part.backbone!r}", (part.backbone, part.setting) in settings),
        ):
            if not known:
                raise DataError(f"a result speaks of the {what}, which no document describes. Run dynamax eval again.")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
