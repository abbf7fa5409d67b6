"""One table per backbone and task: every setting with every figure, sortable, none left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynamax_llm.evaluation.harness.results import BackboneFacts, Cell, Evaluation, Interval, Setting, TaskFacts
from dynamax_llm.report.markup import Markup, scrolling, tag
from dynamax_llm.report.numbers import DASH, difference, number, percent, share, spread, times
from dynamax_llm.report.select import QUIET, colour_roles, label, metric_name, setting_of


@dataclass(frozen=True)
class Value:
    """One cell of a table: what is shown, a smaller line under it, and the number it sorts by."""

    shown: str
    under: str = ""
    key: float | None = None
    tone: str = ""


def table(document: Evaluation, backbone: BackboneFacts, task: TaskFacts, cells: Sequence[Cell]) -> Markup:
    """All settings of a backbone on a task."""
    metrics = sorted({name for cell in cells for name in cell.metrics}, key=lambda name: (name != task.primary, name))
    heads = [
        *(item for name in metrics for item in (metric_name(name), "Δ to full")),
        "agree­ment", "ROUGE-L", "identical", "first diver­gence", "degen­erate", "mean depth", "counted reduction",
        "pass reduction", "speed-up",
    ]  # fmt: skip
    roles = colour_roles(document)
    rows = []
    for cell in cells:
        setting = setting_of(document, cell)
        role = roles.get((setting.family, setting.kind), "ink")
        name = tag(
            "th",
            tag("i", class_="dot", style=f"background:var(--{role})"),
            label(setting),
            tag("small", _describe(setting, cell, task)),
            scope="row",
        )
        values = [*(item for metric in metrics for item in _metric(cell, metric)), *_figures(cell, backbone.n_layers)]
        quiet = "quiet" if setting.kind in QUIET else "reference" if setting.kind == "full" else None
        rows.append(tag("tr", name, [_data(value) for value in values], class_=quiet))
    caption = f"{task.samples} samples, {_shots(task)}"
    return scrolling(
        f"{backbone.name} on {task.name}",
        tag(
            "table",
            tag("caption", tag("span", caption)),
            tag("thead", tag("tr", tag("th", "setting", scope="col"), [_head(text) for text in heads])),
            tag("tbody", rows),
            class_="results",
        ),
    )


def _head(text: str) -> Markup:
    return tag("th", tag("button", text, type="button", class_="sort"), scope="col", aria_sort="none")


def _data(value: Value) -> Markup:
    under = tag("small", value.under) if value.under else None
    return tag("td", value.shown, under, data_v=value.key, class_=value.tone or None)


def _describe(setting: Setting, cell: Cell, task: TaskFacts) -> str:
    """What the label leaves out: kind, policy if it matters, and how many samples if not the task's."""
    decides = setting.kind not in ("full", "pruned")
    own = (
        [setting.kind, setting.policy]
        if decides
        else ["stock, every layer"]
        if setting.kind == "full"
        else ["no exits"]
    )
    if cell.samples != task.samples:
        own.append(f"{cell.samples} samples")
    return " · ".join(own)


def _shots(task: TaskFacts) -> str:
    limit = f", at most {task.max_new_tokens} new tokens" if task.max_new_tokens else ""
    return f"{task.shots}-shot {task.kind}{limit}; primary metric {metric_name(task.primary)}"


def _metric(cell: Cell, name: str) -> tuple[Value, Value]:
    """A metric and its paired difference; a change beyond chance is marked by colour and by an arrow."""
    metric = cell.metrics.get(name)
    if metric is None:
        return Value(DASH), Value(DASH)
    interval = Interval(value=metric.value, low=metric.low, high=metric.high)
    delta, tone, arrow = metric.delta, "", ""
    if delta.high is not None and delta.high < 0:
        tone, arrow = "bad", " ▾"
    elif delta.low is not None and delta.low > 0:
        tone, arrow = "good", " ▴"
    return _interval(interval), Value(difference(delta.value) + arrow, spread(delta, difference), delta.value, tone)


def _figures(cell: Cell, n_layers: int) -> list[Value]:
    depth = cell.mean_depth
    return [
        _interval(cell.agreement),
        _interval(cell.rouge_l),
        _plain(cell.identical, percent),
        _plain(cell.first_divergence, share),
        _interval(cell.degenerate, percent),
        Value(percent(depth.value), f"{depth.value * n_layers:.1f} of {n_layers}", depth.value),
        _interval(cell.counted_reduction, percent),
        _plain(cell.pass_reduction, percent),
        _interval(cell.speed_up, times, f"{cell.timed_samples} timed"),
    ]


def _plain(value: float | None, shown: Any) -> Value:
    return Value(shown(value), "", value)


def _interval(interval: Interval | None, shown: Any = number, note: str = "") -> Value:
    if interval is None:
        return Value(DASH)
    under = " · ".join(part for part in (spread(interval, shown), note) if part)
    return Value(shown(interval.value), under, interval.value)
