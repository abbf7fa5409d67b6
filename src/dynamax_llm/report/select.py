"""Which parts of a document belong together: cells of one task, settings of one family, examples worth reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamax_llm.evaluation.harness.results import (
    BackboneFacts,
    Cell,
    Evaluation,
    Example,
    Interval,
    Setting,
    TaskFacts,
)
from dynamax_llm.report.numbers import DASH, share
from dynamax_llm.report.palette import BASELINES, CATEGORIES, KNOWN

#: Kinds of settings that figures draw quieter.
QUIET = ("static", "pruned")
#: Agreement that a setting has to keep on every task to count as close to the full model.
CLOSE = 0.98


@dataclass(frozen=True)
class Line:
    """The cells of one family on one task, shallow to deep, and the colour role it is drawn in."""

    family: str
    kind: str
    role: str
    cells: tuple[Cell, ...]

    @property
    def quiet(self) -> bool:
        return self.kind in QUIET


def setting_of(document: Evaluation, part: Cell | Example) -> Setting:
    """The setting that a cell or an example was made under."""
    return next(item for item in document.settings[part.backbone] if item.id == part.setting)


def pairs(document: Evaluation) -> list[tuple[BackboneFacts, TaskFacts, list[Cell]]]:
    """Every backbone and task that has cells; these are in the order of the backbone's settings."""
    result = []
    for backbone in document.backbones:
        order = [item.id for item in document.settings.get(backbone.name, ())]
        for task in document.tasks:
            cells = [cell for cell in document.cells if (cell.backbone, cell.task) == (backbone.name, task.name)]
            if cells:
                result.append((backbone, task, sorted(cells, key=lambda cell: order.index(cell.setting))))
    return result


def lines(document: Evaluation, cells: Sequence[Cell]) -> list[Line]:
    """Families of these cells, baselines last."""
    families: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        setting = setting_of(document, cell)
        if setting.kind != "full":
            families.setdefault((setting.family, setting.kind), []).append(cell)
    roles = colour_roles(document)
    result = [
        Line(*key, roles[key], tuple(sorted(group, key=lambda cell: cell.mean_depth.value)))
        for key, group in families.items()
    ]
    return sorted(result, key=lambda line: line.quiet)


def colour_roles(document: Evaluation) -> dict[tuple[str, str], str]:
    """A colour role for every family and kind: one family has one colour in the whole report."""
    settings = [item for group in document.settings.values() for item in group if item.kind != "full"]
    families = list(dict.fromkeys((item.family, item.kind) for item in settings))
    loud = [key for key in families if key[1] not in QUIET]
    known = {key: KNOWN.get(key[0].removesuffix(" head")) for key in loud}
    roles = {key: role for key, role in known.items() if role}
    spare = [role for role in CATEGORIES if role not in roles.values()] or list(CATEGORIES)
    others = [key for key in loud if key not in roles]
    roles |= {key: spare[index % len(spare)] for index, key in enumerate(others)}
    return roles | {key: BASELINES[QUIET.index(key[1])] for key in families if key[1] in QUIET}


def label(setting: Setting) -> str:
    """A setting in a few words: its promise, or its family and its thresholds."""
    if setting.kind == "full":
        return "full model"
    if setting.promise:
        return f"{setting.family}, {setting.promise}"
    if setting.kind in QUIET:
        return setting.id
    given = [value for value in setting.thresholds if value is not None]
    if not given:
        return f"{setting.family}, never"
    alike = len(set(given)) == 1 and len(given) == len(setting.thresholds)
    values = given[:1] if alike else setting.thresholds
    return f"{setting.family} ≥\u00a0" + " / ".join(DASH if value is None else share(value) for value in values)


def paired(cell: Cell, task: TaskFacts) -> Interval | None:
    """The task's primary metric, with the interval of its paired difference to the full model around it.

    Two settings answer the same questions, so the interval of their difference is much narrower than that of either
    score. None where the cell lacks the metric.
    """
    metric = cell.metrics.get(task.primary)
    if metric is None:
        return None
    delta = metric.delta
    low, high = (None if end is None else metric.value + end - delta.value for end in (delta.low, delta.high))
    return Interval(value=metric.value, low=low, high=high)


def metric_name(name: str) -> str:
    """The harness's name for reading: its filter, unless that is "none", in brackets."""
    metric, _, filter_name = name.partition(",")
    return metric if filter_name in ("", "none") else f"{metric} ({filter_name})"


def first_depth(document: Evaluation, backbone: BackboneFacts) -> int:
    """Where this backbone's depth scale begins: its first exit, or the shallowest token if that is lower."""
    name = backbone.name
    exits = [layer for setting in document.settings.get(name, ()) for layer in setting.layers]
    counted = [depth for cell in document.cells if cell.backbone == name for depth in cell.histogram]
    texts = [token.layers for item in document.examples if item.backbone == name for token in item.tokens]
    return min([*exits, *counted, *texts, backbone.n_layers])


def chosen(document: Evaluation, examples: Sequence[Example]) -> list[Example]:
    """Of every prompt and family of settings one example, in the order given; a grid has hundreds.

    It is the setting of least depth among those close to the full model on that task, or the closest one.
    """
    cells = {(cell.backbone, cell.setting, cell.task): cell for cell in document.cells}
    best: dict[tuple[str, ...], tuple[tuple[float, float], int]] = {}
    for place, item in enumerate(examples):
        cell, setting = cells.get((item.backbone, item.setting, item.task)), setting_of(document, item)
        agreement = cell.agreement.value if cell is not None and cell.agreement is not None else 0.0
        depth = cell.mean_depth.value if cell is not None else 1.0
        rank = (1.0, -depth) if agreement >= CLOSE else (0.0, agreement)
        key = (item.task, item.prompt, item.full_text, setting.family, setting.kind)
        if key not in best or rank > best[key][0]:
            best[key] = (rank, place)
    return [examples[place] for _, place in sorted(best.values(), key=lambda entry: entry[1])]
