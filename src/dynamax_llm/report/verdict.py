"""What an evaluation comes to: for every backbone the best setting that stays close, and whether it saves time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from dynamax_llm.evaluation.harness.results import BackboneFacts, Cell, Evaluation, Interval, Setting
from dynamax_llm.report.numbers import listed, number, percent, times
from dynamax_llm.report.select import CLOSE, QUIET, label


@dataclass(frozen=True)
class Verdict:
    """A backbone's best setting over the tasks it was evaluated on. All means weigh tasks equally.

    ``agreement`` is the lowest over tasks. ``faster`` and ``slower`` count the tasks whose whole interval of the
    speed-up lies above or below 1. Ranges are over tasks; for one task they are its own interval. ``rivals`` are other
    timed settings as close. ``worse`` names tasks whose primary metric fell by more than chance, ``better`` those where
    it rose.
    """

    backbone: BackboneFacts
    setting: Setting
    tasks: int
    agreement: float
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
    def close(self) -> bool:
        """Whether the agreement reaches ``CLOSE`` on every task."""
        return self.agreement >= CLOSE

    @property
    def pays(self) -> bool:
        """Counted work falls, and wall clock falls on at least one task and rises on none."""
        return self.close and self.reduction > 0 and self.faster > 0 and self.slower == 0


def verdicts(document: Evaluation) -> list[Verdict]:
    """One per backbone with a setting whose agreement was measured, in the document's order."""
    return [verdict for backbone in document.backbones if (verdict := _best(document, backbone))]


def _best(document: Evaluation, backbone: BackboneFacts) -> Verdict | None:
    """Among close settings the fastest that pays, or without one the largest mean counted reduction; without any
    close setting, the highest agreement.

    Only settings that decide token by token are candidates, and only those measured on as many tasks as any.
    """
    settings = document.settings.get(backbone.name, ())
    candidates = [
        verdict
        for setting in settings
        if setting.kind not in ("full", *QUIET) and (verdict := _verdict(document, backbone, setting))
    ]
    widest = max((item.tasks for item in candidates), default=0)
    candidates = [item for item in candidates if item.tasks == widest]
    close = [item for item in candidates if item.close]
    if not close:
        return max(candidates, key=lambda item: (item.agreement, item.reduction), default=None)
    paying = [item for item in close if item.pays]
    if paying:
        best = max(paying, key=lambda item: item.speed_up or 0.0)
    else:
        best = max(close, key=lambda item: (item.reduction, item.agreement))
    return replace(best, rivals=sum(item.timed > 0 and item is not best for item in close))


def _verdict(document: Evaluation, backbone: BackboneFacts, setting: Setting) -> Verdict | None:
    """One setting's figures over its tasks; None if its agreement was not measured."""
    own = [cell for cell in document.cells if (cell.backbone, cell.setting) == (backbone.name, setting.id)]
    cells = [cell for cell in own if cell.agreement is not None]
    if not cells:
        return None
    speed_ups = [cell.speed_up for cell in cells if cell.speed_up is not None]
    changes = {cell.task: change for cell in cells if (change := _change(document, cell)) is not None}
    return Verdict(
        backbone=backbone,
        setting=setting,
        tasks=len(cells),
        agreement=min(cell.agreement.value for cell in cells if cell.agreement),
        depth=fmean(cell.mean_depth.value for cell in cells),
        reduction=fmean(cell.counted_reduction.value for cell in cells),
        reductions=_range([cell.counted_reduction for cell in cells]),
        speed_up=fmean(interval.value for interval in speed_ups) if speed_ups else None,
        speed_ups=_range(speed_ups) if speed_ups else None,
        timed=len(speed_ups),
        faster=sum(_above(interval, 1) for interval in speed_ups),
        slower=sum(_below(interval, 1) for interval in speed_ups),
        worse=tuple(task for task, change in changes.items() if _below(change, 0)),
        better=tuple(task for task, change in changes.items() if _above(change, 0)),
    )


def _above(interval: Interval, value: float) -> bool:
    return interval.low is not None and interval.low > value


def _below(interval: Interval, value: float) -> bool:
    return interval.high is not None and interval.high < value


def _range(intervals: Sequence[Interval]) -> tuple[float, float]:
    """From the lowest to the highest value; of a single one, its own ends."""
    values = [interval.value for interval in intervals]
    if len(intervals) == 1 and intervals[0].low is not None and intervals[0].high is not None:
        values = [intervals[0].low, intervals[0].high]
    return min(values), max(values)


def _change(document: Evaluation, cell: Cell) -> Interval | None:
    """Difference of the task's primary metric to the full model."""
    metrics = [cell.metrics.get(task.primary) for task in document.tasks if task.name == cell.task]
    return metrics[0].delta if metrics and metrics[0] else None


def sentences(verdict: Verdict) -> list[str]:
    """A verdict in plain sentences; counted reduction and wall clock always side by side."""
    tasks = "the task" if verdict.tasks == 1 else f"{verdict.tasks} tasks"
    lowest = number(verdict.agreement)
    if verdict.close:
        what = "the fastest setting that pays" if verdict.pays else "the most work saved"
        verb = "is" if verdict.pays else "is with"
        opening = f"{what} at an agreement of at least {CLOSE:g} on {tasks} {verb} {label(verdict.setting)}"
        opening += f" (lowest agreement {lowest})."
    else:
        opening = f"no setting keeps an agreement of {CLOSE:g} on {tasks}; nearest is {label(verdict.setting)}, with "
        opening += f"{lowest} where it is lowest."
    more = "fewer" if verdict.reduction >= 0 else "more"
    cost = f"It counts {percent(abs(verdict.reduction))} {more} multiply-accumulates; "
    if verdict.speed_up is None:
        cost += "nothing was timed, so whether it saves time is not known."
    else:
        cost += f"wall clock gives {times(verdict.speed_up)} the full model's speed. {_pays(verdict)}"
    return [f"{verdict.backbone.name}: {opening}", cost, _quality(verdict)]


def _pays(verdict: Verdict) -> str:
    """Whether wall clock confirms the counted saving, no more strongly than its intervals allow."""

    def of(count: int) -> str:
        return "the timed task" if verdict.timed == 1 else f"{count} of {verdict.timed} timed tasks"

    if verdict.pays:
        return f"It pays: faster on {of(verdict.faster)}, slower on none."
    others = f", nor do the {verdict.rivals} other timed settings at this agreement" if verdict.rivals > 1 else ""
    if not verdict.faster and not verdict.slower:
        return f"No task shows a difference in time beyond chance: it does not pay here{others}."
    if not verdict.faster:
        return f"Slower on {of(verdict.slower)}: it does not pay here{others}."
    timing = f"In time it is faster on {of(verdict.faster)}, slower on {verdict.slower}"
    return timing + ("." if verdict.close else ", at an agreement below the mark.")


def _quality(verdict: Verdict) -> str:
    changed = [f"falls on {listed(verdict.worse)}"] if verdict.worse else []
    changed += [f"rises on {listed(verdict.better)}"] if verdict.better else []
    if not changed:
        return "The primary metric differs from the full model's beyond chance on no task."
    return f"Beyond chance, the primary metric {' and '.join(changed)}."
