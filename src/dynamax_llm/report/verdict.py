"""What an evaluation comes to, computed: for every backbone the best setting that stays close, and whether it pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from dynamax_llm.evaluation.harness.results import BackboneFacts, Cell, Evaluation, Interval, Setting
from dynamax_llm.report.numbers import listed, number, percent, times
from dynamax_llm.report.select import QUIET, label

#: Agreement that a setting has to keep on every task to count as close to the full model.
CLOSE = 0.98


@dataclass(frozen=True)
class Verdict:
    """A backbone's best setting over the tasks it was evaluated on. All means weigh tasks equally.

    ``agreement`` is the lowest over tasks, ``close`` whether it reaches ``CLOSE``. ``faster`` and ``slower`` count the
    tasks whose whole interval of the speed-up lies above or below 1. Ranges are over tasks; one task shows its own
    interval. ``rivals`` are other timed settings as close. ``worse`` names tasks whose primary metric fell by more
    than chance, ``better`` those where it rose.
    """

    backbone: BackboneFacts
    setting: Setting
    tasks: int
    agreement: float
    close: bool
    depth: float
    reduction: float
    reductions: tuple[float, float]
    speed_up: float | None
    speed_ups: tuple[float, float] | None
    timed: int
    faster: int
    slower: int
    worse: tuple[str, ...]
    better: tuple[str, ...]
    rivals: int = 0

    @property
    def pays(self) -> bool:
        """Counted work falls, and wall clock falls on at least one task and rises on none."""
        return self.close and self.reduction > 0 and self.faster > 0 and self.slower == 0


def verdicts(document: Evaluation) -> list[Verdict]:
    """One per backbone that has anything to judge, in the document's order."""
    return [found for backbone in document.backbones if (found := _best(document, backbone))]


def _best(document: Evaluation, backbone: BackboneFacts) -> Verdict | None:
    """Among close settings the fastest that pays, or without one the largest mean counted reduction; without any
    close setting, the highest agreement.

    Only settings that decide token by token are candidates, and only those measured on as many tasks as any.
    """
    candidates = [
        found
        for setting in document.settings.get(backbone.name, ())
        if setting.kind != "full" and setting.kind not in QUIET and (found := _estimator(document, backbone, setting))
    ]
    widest = max((item.tasks for item in candidates), default=0)
    candidates = [item for item in candidates if item.tasks == widest]
    close = [item for item in candidates if item.close]
    if close:
        paying = [item for item in close if item.pays]
        found = max(paying, key=_speed) if paying else max(close, key=lambda item: (item.reduction, item.agreement))
        return replace(found, rivals=sum(item.timed > 0 and item is not found for item in close))
    return max(candidates, key=lambda item: (item.agreement, item.reduction), default=None)


def _estimator(document: Evaluation, backbone: BackboneFacts, setting: Setting) -> Verdict | None:
    cells = [
        cell
        for cell in document.cells
        if (cell.backbone, cell.setting) == (backbone.name, setting.id) and cell.agreement is not None
    ]
    if not cells:
        return None
    agreement = min(cell.agreement.value for cell in cells if cell.agreement)
    reductions = [cell.counted_reduction.value for cell in cells]
    clocks = [cell.speed_up for cell in cells if cell.speed_up is not None]
    changes = {cell.task: change for cell in cells if (change := _change(document, cell)) is not None}
    return Verdict(
        backbone=backbone,
        setting=setting,
        tasks=len(cells),
        agreement=agreement,
        close=agreement >= CLOSE,
        depth=fmean(cell.mean_depth.value for cell in cells),
        reduction=fmean(reductions),
        reductions=_range([cell.counted_reduction for cell in cells]),
        speed_up=fmean(clock.value for clock in clocks) if clocks else None,
        speed_ups=_range(clocks) if clocks else None,
        timed=len(clocks),
        faster=sum(clock.low is not None and clock.low > 1 for clock in clocks),
        slower=sum(clock.high is not None and clock.high < 1 for clock in clocks),
        worse=tuple(task for task, change in changes.items() if change.high is not None and change.high < 0),
        better=tuple(task for task, change in changes.items() if change.low is not None and change.low > 0),
    )


def _speed(found: Verdict) -> float:
    return found.speed_up or 0.0


def _range(intervals: Sequence[Interval]) -> tuple[float, float]:
    """From the lowest to the highest value; of a single one, its own ends."""
    values = [interval.value for interval in intervals]
    if len(intervals) == 1 and intervals[0].low is not None and intervals[0].high is not None:
        values = [intervals[0].low, intervals[0].high]
    return min(values), max(values)


def _change(document: Evaluation, cell: Cell) -> Interval | None:
    """Difference of the task's primary metric to the full model."""
    names = [task.primary for task in document.tasks if task.name == cell.task and task.primary in cell.metrics]
    return cell.metrics[names[0]].delta if names else None


def sentences(found: Verdict) -> list[str]:
    """A verdict in plain sentences; counted reduction and wall clock always side by side."""
    tasks = _tasks(found.tasks)
    name, setting = found.backbone.name, label(found.setting)
    if found.pays:
        opening = (
            f"{name}: the fastest setting that pays at an agreement of at least {CLOSE:g} on {tasks} is {setting} "
            f"(lowest agreement {number(found.agreement)})."
        )
    elif found.close:
        opening = (
            f"{name}: the most work saved at an agreement of at least {CLOSE:g} on {tasks} is with {setting} "
            f"(lowest agreement {number(found.agreement)})."
        )
    else:
        opening = (
            f"{name}: no setting keeps an agreement of {CLOSE:g} on {tasks}; nearest is {setting}, "
            f"with {number(found.agreement)} where it is lowest."
        )
    counted = f"It counts {_counted(found.reduction)}"
    if found.speed_up is None:
        return [opening, f"{counted}; nothing was timed, so whether it saves time is not known.", _quality(found)]
    clock = f"wall clock gives {times(found.speed_up)} the full model's speed"
    return [opening, f"{counted}; {clock}. {_pays(found)}", _quality(found)]


def _counted(reduction: float) -> str:
    more = "fewer" if reduction >= 0 else "more"
    return f"{percent(abs(reduction))} {more} multiply-accumulates"


def _pays(found: Verdict) -> str:
    """Whether wall clock bears the counted saving out, said no more strongly than its intervals allow."""
    if found.pays:
        return f"It pays: faster on {_of(found.faster, found.timed)}, slower on none."
    others = f", nor do the {found.rivals} other timed settings at this agreement" if found.rivals > 1 else ""
    others = ", nor does the other timed setting at this agreement" if found.rivals == 1 else others
    if not found.faster and not found.slower:
        return f"No task shows a difference in time beyond chance: it does not pay here{others}."
    if not found.faster:
        return f"Slower on {_of(found.slower, found.timed)}: it does not pay here{others}."
    timing = f"faster on {_of(found.faster, found.timed)}, slower on {found.slower}"
    return f"In time it is {timing}" + ("." if found.close else ", at an agreement below the mark.")


def _quality(found: Verdict) -> str:
    changed = [
        *([f"falls on {listed(found.worse)}"] if found.worse else []),
        *([f"rises on {listed(found.better)}"] if found.better else []),
    ]
    if not changed:
        return "The primary metric differs from the full model's beyond chance on no task."
    return f"Beyond chance, the primary metric {' and '.join(changed)}."


def _tasks(count: int, kind: str = "") -> str:
    return f"the {kind}task" if count == 1 else f"{count} {kind}tasks"


def _of(count: int, timed: int) -> str:
    return "the timed task" if timed == 1 else f"{count} of {timed} timed tasks"


def caution(found: Sequence[Verdict]) -> str:
    """What to keep in mind when reading verdicts: they are chosen after the fact."""
    return (
        "Means weigh tasks equally. The setting was chosen on the samples it is judged on, so this describes them and "
        "promises nothing for other text; promises stand in a section of their own."
        if found
        else "No setting with exits has an agreement in this document, so there is no verdict."
    )
