"""Several evaluations as one document, if they do not contradict each other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dynamax_llm.errors import DataError, UsageError
from dynamax_llm.evaluation.harness.results import Cell, Evaluation, Example

T = TypeVar("T")

#: Fields that follow from others.
_DIGESTS = ("asked", "sha256", "weights", "fingerprint", "id")
#: What callers call a recorded field.
_OPTIONS = {"samples": "limit"}


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
        backbones=_agreed("backbone", parts("backbones"), _name),
        settings={name: _agreed(f"setting of {name}", group, _name) for name, group in by_backbone("settings").items()},
        tasks=_agreed("task", parts("tasks"), _name),
        cells=_agreed("cell", parts("cells"), _place),
        examples=tuple(unique(parts("examples"))),
        reliability=_agreed(
            "reliability of", parts("reliability"), lambda part: (part.backbone, part.family, part.layer)
        ),
        promises={name: tuple(unique(group)) for name, group in by_backbone("promises").items()},
        shifts=tuple(unique(parts("shifts"))),
    )
    _check_names(merged)
    return merged


def check_addition(folder: Path, new: Evaluation) -> Evaluation | None:
    """The document in ``folder``, if there is one and ``new`` can be added to it.

    Raises UsageError naming the first figure of a backbone, task or setting that is not the same; DataError.
    """
    if not Evaluation.path(folder).exists():
        return None
    old = Evaluation.read(folder)
    settings = [(f"setting of {name}", old.settings.get(name, ()), items) for name, items in new.settings.items()]
    for what, before, now in (("backbone", old.backbones, new.backbones), ("task", old.tasks, new.tasks), *settings):
        known: dict[str, Any] = {_name(item): item.model_dump() for item in before}
        for item in now:
            change = difference(known.get(_name(item), item.model_dump()), item.model_dump())
            if change:
                raise UsageError(
                    f"{Evaluation.path(folder)} holds an evaluation with another {what} {_name(item)!r}: {change}. "
                    "Give another folder, or the options of that evaluation."
                )
    return old


def add_to(folder: str | Path, new: Evaluation) -> Evaluation:
    """Save ``new`` in ``folder``, with everything the document there holds of other tasks and settings.

    A cell that both have is the new one's, made from the same records; of two reliability curves of an exit the one
    over more tokens is kept. Returns the whole document. Raises UsageError if the two contradict each other, DataError
    for a damaged document; nothing is written then.
    """
    old = check_addition(Path(folder), new)
    if old is not None:
        cells = {_place(item) for item in new.cells}
        curves: dict[Hashable, Any] = {}
        for item in (*old.reliability, *new.reliability):
            key = (item.backbone, item.family, item.layer)
            curves[key] = max(curves.get(key, item), item, key=lambda curve: sum(part.tokens for part in curve.bins))
        kept = {
            "cells": tuple(item for item in old.cells if _place(item) not in cells),
            "examples": tuple(item for item in old.examples if _place(item) not in cells),
            "reliability": (),
        }
        order = [item.name for item in (*old.tasks, *new.tasks)]
        widened = {item.name for item in old.backbones} <= {item.name for item in new.backbones}
        title = new.title if widened else old.title
        new = combine([old.model_copy(update=kept), new], title=title)
        ordered = sorted(new.cells, key=lambda item: order.index(item.task))
        new = new.model_copy(update={"cells": tuple(ordered), "reliability": tuple(curves.values())})
    new.save(folder)
    return new


def difference(old: Any, new: Any, name: str = "") -> str:
    """The first field in which two records differ, as ``limit 4, now 6``; empty if they are equal.

    Digests are named only if nothing else differs.
    """
    if old == new:
        return ""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys(), key=lambda key: (key in _DIGESTS, key))
        return next(filter(None, (difference(old.get(key), new.get(key), key) for key in keys)), "")
    return f"{_OPTIONS.get(name, name)} {_brief(old)}, now {_brief(new)}"


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
    parts: list[Cell | Example] = [*document.cells, *document.examples]
    for part in parts:
        for what, known in (
            (f"backbone {part.backbone!r}", part.backbone in backbones),
            (f"task {part.task!r}", part.task in tasks),
            (f"setting {part.setting!r} of {part.backbone!r}", (part.backbone, part.setting) in settings),
        ):
            if not known:
                raise DataError(f"a result refers to the {what}, which no document describes. Run dynamax eval again.")


def _place(part: Any) -> tuple[str, str, str]:
    return part.backbone, part.setting, part.task


def _name(part: Any) -> str:
    return str(getattr(part, "name", None) or part.id)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
