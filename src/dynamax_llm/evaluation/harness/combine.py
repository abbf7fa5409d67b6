"""Several evaluations as one, if they do not contradict each other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

from dynamax_llm.errors import DataError, UsageError
from dynamax_llm.evaluation.harness.results import Evaluation

T = TypeVar("T")


def combine(evaluations: Sequence[Evaluation], *, title: str | None = None) -> Evaluation:
    """One document of all of them; parts that several have alike appear once.

    Raises UsageError if there are none, or if two disagree about a backbone, setting, task or cell; DataError if a
    part names a backbone, setting or task that no document describes.
    """
    if not evaluations:
        raise UsageError("no evaluation given: a report needs at least one. Give a folder that dynamax eval wrote.")

    def parts(name: str) -> list[Any]:
        return [part for item in evaluations for part in getattr(item, name)]

    def by_backbone(name: str) -> dict[str, list[Any]]:
        groups: dict[str, list[Any]] = {}
        for item in evaluations:
            for backbone, group in getattr(item, name).items():
                groups.setdefault(backbone, []).extend(group)
        return groups

    merged = Evaluation(
        title=title or " · ".join(unique(item.title for item in evaluations)),
        notes=tuple(unique(parts("notes"))),
        runs=tuple(unique(parts("runs"))),
        backbones=_agreed("backbone", parts("backbones"), lambda part: part.name),
        settings={
            name: _agreed(f"setting of {name}", group, lambda part: part.id)
            for name, group in by_backbone("settings").items()
        },
        tasks=_agreed("task", parts("tasks"), lambda part: part.name),
        cells=_agreed("cell", parts("cells"), lambda part: (part.backbone, part.setting, part.task)),
        examples=tuple(unique(parts("examples"))),
        reliability=_agreed(
            "reliability of", parts("reliability"), lambda part: (part.backbone, part.family, part.layer)
        ),
        promises={name: tuple(unique(group)) for name, group in by_backbone("promises").items()},
        shifts=tuple(unique(parts("shifts"))),
    )
    _check_names(merged)
    return merged


def unique(items: Iterable[T]) -> list[T]:
    """Items without repetition, in the order of their first appearance; they need not be hashable."""
    kept: list[T] = []
    for item in items:
        if item not in kept:
            kept.append(item)
    return kept


def _agreed(what: str, parts: Sequence[Any], key: Callable[[Any], Hashable]) -> tuple[Any, ...]:
    """The parts by their key. Raises UsageError naming the first field in which two of one key differ."""
    kept: dict[Hashable, Any] = {}
    for part in parts:
        first = kept.setdefault(key(part), part)
        if first != part:
            field = next(name for name in type(part).model_fields if getattr(first, name) != getattr(part, name))
            place = key(part)
            name = " · ".join(map(str, place)) if isinstance(place, tuple) else repr(place)
            raise UsageError(
                f"the evaluations disagree about the {what} {name}: its {field} is {_brief(getattr(first, field))} in "
                f"one and {_brief(getattr(part, field))} in another. Report them apart, or evaluate both in the same "
                "way."
            )
    return tuple(kept.values())


def _check_names(document: Evaluation) -> None:
    backbones, tasks = {item.name for item in document.backbones}, {item.name for item in document.tasks}
    settings = {(name, item.id) for name, items in document.settings.items() for item in items}
    for part in (*document.cells, *document.examples):
        for what, known in (
            (f"backbone {part.backbone!r}", part.backbone in backbones),
            (f"task {part.task!r}", part.task in tasks),
            (f"setting {part.setting!r} of {part.backbone!r}", (part.backbone, part.setting) in settings),
        ):
            if not known:
                raise DataError(f"a result refers to the {what}, which no document describes. Run dynamax eval again.")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
