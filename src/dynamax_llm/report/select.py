"""What belongs together in a document: cells of one task, settings of one family, and how they are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamax_llm.evaluation.harness.results import BackboneFacts, Cell, Evaluation, Interval, Setting, TaskFacts
from dynamax_llm.report.numbers import DASH, share
from dynamax_llm.report.palette import BASELINES, CATEGORIES, KNOWN

#: Kinds of settings that a figure draws quieter.
QUIET = ("static", "pruned")


@dataclass(frozen=True)
class Line:
    """The cells of one family on one task, shallow to deep, and the colour role it is drawn in."""

    family: str
    kind: str
    role: str
    cells: tuple[Cell, ...]


def setting_of(document: Evaluation, cell: Cell) -> Setting:
    """The setting that a cell was measured under."""
    return next(item for item in document.settings[cell.backbone] if item.id == cell.setting)


def cells_of(document: Evaluation, backbone: str, task: str) -> list[Cell]:
    """All cells of a backbone on a task, in the order of the backbone's settings."""
    order = [item.id for item in document.settings.get(backbone, ())]
    found = [cell for cell in document.cells if (cell.backbone, cell.task) == (backbone, task)]
    return sorted(found, key=lambda cell: order.index(cell.setting))


def pairs(document: Evaluation) -> list[tuple[BackboneFacts, TaskFacts, list[Cell]]]:
    """Every backbone and task that has cells."""
    all_pairs = (
        (one, task, cells_of(document, one.name, task.name)) for one in document.backbones for task in document.tasks
    )
    return [(backbone, task, cells) for backbone, task, cells in all_pairs if cells]


def full_cell(document: Evaluation, cells: Sequence[Cell]) -> Cell | None:
    """The stock model's own cell among these."""
    return next((cell for cell in cells if setting_of(document, cell).kind == "full"), None)


def lines(document: Evaluation, cells: Sequence[Cell]) -> list[Line]:
    """Families of these cells; what is worth looking at first, baselines last."""
    families: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        setting = setting_of(document, cell)
        if setting.kind != "full":
            families.setdefault((setting.family, setting.kind), []).append(cell)
    roles = colour_roles(document)
    found = [
        Line(family, kind, roles[family, kind], tuple(sorted(group, key=lambda cell: cell.mean_depth.value)))
        for (family, kind), group in families.items()
    ]
    return sorted(found, key=lambda line: line.kind in QUIET)


def colour_roles(document: Evaluation) -> dict[tuple[str, str], str]:
    """A colour role for every family and kind: one family has one colour in the whole report."""
    found = {
        (setting.family, setting.kind): ""
        for settings in document.settings.values()
        for setting in settings
        if setting.kind != "full"
    }
    known = {key: KNOWN.get(key[0].removesuffix(" head")) for key in found if key[1] not in QUIET}
    named = {key: role for key, role in known.items() if role}
    spare = [role for role in CATEGORIES if role not in named.values()] or list(CATEGORIES)
    loud = [key for key in found if key[1] not in QUIET and key not in named]
    quiet = [key for key in found if key[1] in QUIET]
    given = {key: spare[index % len(spare)] for index, key in enumerate(loud)}
    return named | given | {key: BASELINES[QUIET.index(key[1])] for key in quiet}


def label(setting: Setting) -> str:
    """A setting in a few words: its promise, or its family and what sets it apart within it."""
    if setting.kind == "full":
        return "full model"
    if setting.promise:
        return f"{setting.family}, {setting.promise}"
    if setting.kind in QUIET:
        return setting.id
    given = [value for value in setting.thresholds if value is not None]
    if not given:
        return f"{setting.family}, never"
    if len(set(given)) == 1 and len(given) == len(setting.thresholds):
        return f"{setting.family} ≥\u00a0{share(given[0])}"
    each = " / ".join(DASH if value is None else share(value) for value in setting.thresholds)
    return f"{setting.family} ≥\u00a0{each}"


def paired(cell: Cell, task: TaskFacts) -> Interval | None:
    """The task's primary metric, with the interval of its paired difference to the full model around it.

    Two settings answer the same questions: what tells them apart is the difference, whose interval is much narrower
    than that of either score. None where the cell has no such metric.
    """
    metric = cell.metrics.get(task.primary)
    if metric is None:
        return None
    ends = (
        None if end is None else metric.value + end - metric.delta.value
        for end in (metric.delta.low, metric.delta.high)
    )
    return Interval(value=metric.value, low=next(ends), high=next(ends))


def metric_name(name: str) -> str:
    """The harness's name for reading: its filter, if it says anything, in brackets."""
    metric, _, chosen = name.partition(",")
    return metric if chosen in ("", "none") else f"{metric} ({chosen})"
