"""Quality against cost: one plot per backbone, task, quality and kind of cost, a line per family of settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dynamax_llm.evaluation.harness.results import BackboneFacts, Cell, Evaluation, Interval, TaskFacts
from dynamax_llm.report.canvas import Plot, clean
from dynamax_llm.report.markup import slug
from dynamax_llm.report.palette import Palette
from dynamax_llm.report.select import QUIET, Line, full_cell, lines, metric_name, paired

SIZE = (4.8, 3.3)
#: Where the drawing area ends and the lines' names begin, as shares of the figure.
LEFT, RIGHT, BOTTOM, TOP = 0.125, 0.7, 0.155, 0.88
#: Least distance between two names, as a share of the axes' height.
APART = 0.07
_MARKERS = {
    "c0": "o",
    "c1": "s",
    "c2": "^",
    "c3": "D",
    "c4": "v",
    "c5": "P",
    "c6": "X",
    "c7": "p",
    "b0": "o",
    "b1": "s",
}


@dataclass(frozen=True)
class Axis:
    """What one axis shows: its name for files and for reading, and where a cell's value comes from."""

    name: str
    title: str
    value: Callable[[Cell], Interval | None]
    scale: float = 1.0
    neutral: float = 1.0  # where the full model stands
    unit: str = ""
    better: str = "better"


COSTS = (
    Axis("counted", "counted reduction", lambda cell: cell.counted_reduction, 100.0, 0.0, "%", "cheaper"),
    Axis("speed-up", "speed-up", lambda cell: cell.speed_up, 1.0, 1.0, "×", "faster"),
)
AGREEMENT = Axis("agreement", "agreement", lambda cell: cell.agreement)

Point = tuple[Interval, Interval]
Drawn = list[tuple[Line, list[Point]]]


def fronts(document: Evaluation, backbone: BackboneFacts, task: TaskFacts, cells: Sequence[Cell]) -> list[Plot]:
    """The plots of one backbone on one task: those for which there is anything to draw."""
    quality = Axis(slug(task.primary), metric_name(task.primary), lambda cell: paired(cell, task))
    families = lines(document, cells)
    full = full_cell(document, cells)
    found = []
    for y in (quality, AGREEMENT):
        for x in COSTS:
            drawn = [(line, points) for line in families if (points := _points(line, x, y))]
            if drawn:
                found.append(_plot(backbone, task, x, y, drawn, y.value(full) if full else None))
    return found


def _points(line: Line, x: Axis, y: Axis) -> list[Point]:
    both = ((x.value(cell), y.value(cell)) for cell in line.cells)
    return sorted(((a, b) for a, b in both if a and b), key=lambda point: point[0].value)


def _plot(
    backbone: BackboneFacts,
    task: TaskFacts,
    x: Axis,
    y: Axis,
    drawn: Drawn,
    reference: Interval | None,
) -> Plot:
    def draw(figure: Any, palette: Palette) -> None:
        axes = figure.add_axes((LEFT, BOTTOM, RIGHT - LEFT, TOP - BOTTOM))
        for line, points in reversed(drawn):  # what is worth looking at lies on top
            _draw_line(axes, line, points, x, y, palette)
        level = reference.value if reference else y.neutral
        _frame(axes, x, y, drawn, level)
        if level is not None:
            axes.axhline(level * y.scale, color=palette["ink"], linewidth=1, dashes=(1, 2.5), zorder=2)
            star = {"markersize": 12, "markeredgewidth": 0, "clip_on": False, "zorder": 6}
            axes.plot(x.neutral * x.scale, level * y.scale, "*", color=palette["ink"], **star)
        axes.axvline(x.neutral * x.scale, color=palette["muted"], linewidth=0.9, zorder=1.5)
        title = f"{clean(y.title.partition(' (')[0], 24)} against {x.title}"
        figure.text(0.02, 0.935, title, color=palette["ink"], fontsize=10.5, weight="bold")
        _name_lines(axes, drawn, x, y, palette, level)

    says = (
        f"{backbone.name} on {task.name}: {y.title} against {x.title}, one line per family of settings: "
        f"{', '.join(line.family for line, _ in drawn)}. The tables below hold the numbers."
    )
    return Plot(slug("front", backbone.name, task.name, y.name, x.name), SIZE, says, draw)


def _draw_line(axes: Any, line: Line, points: list[Point], x: Axis, y: Axis, palette: Palette) -> None:
    quiet = line.kind in QUIET
    colour = palette[line.role]
    xs = [point[0].value * x.scale for point in points]
    ys = [point[1].value * y.scale for point in points]
    across, upward = [_ends(point[0]) for point in points], [_ends(point[1]) for point in points]
    whisker = {"colors": colour, "linewidth": 0.7 if quiet else 1.0, "alpha": 0.22 if quiet else 0.32, "zorder": 2.5}
    axes.hlines(ys, [x.scale * low for low, _ in across], [x.scale * high for _, high in across], **whisker)
    axes.vlines(xs, [y.scale * low for low, _ in upward], [y.scale * high for _, high in upward], **whisker)
    axes.plot(
        xs,
        ys,
        color=colour,
        linewidth=1.0 if quiet else 1.9,
        linestyle=(0, (4, 2.5)) if line.kind == "pruned" else (0, (1.2, 1.8)) if quiet else "-",
        marker=_MARKERS[line.role],
        markersize=3.4 if quiet else 5.2,
        markeredgewidth=0.9 if quiet else 0,
        markerfacecolor="none" if quiet else colour,
        zorder=3 if quiet else 4,
    )


def _ends(interval: Interval) -> tuple[float, float]:
    """Both ends, the value itself where there are none or where an end lies on its wrong side."""
    value = interval.value
    return (
        min(value if interval.low is None else interval.low, value),
        max(value if interval.high is None else interval.high, value),
    )


def _frame(axes: Any, x: Axis, y: Axis, drawn: Drawn, level: float | None) -> None:
    """Limits around the lines worth looking at (baselines may leave them), and what stands along the axes."""
    loud = [points for line, points in drawn if line.kind not in QUIET] or [points for _, points in drawn]
    shown = [point for points in loud for point in points]
    across = [x.neutral, *(point[0].value for point in shown)]
    upward = [end for point in shown for end in _ends(point[1])] + ([level] if level is not None else [])
    for axis, values, set_limits, below in ((x, across, axes.set_xlim, 0.05), (y, upward, axes.set_ylim, 0.14)):
        low, high = min(values), max(values)
        short = max(0.02 - (high - low), 0.0) / 2  # equal values get a frame too
        low, high = low - short, high + short
        room = high - low
        set_limits((low - below * room) * axis.scale, (high + 0.06 * room) * axis.scale)
    axes.set_xlabel(f"{x.title}{', %' if x.unit == '%' else ''}  → {x.better}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}{'×' if x.unit == '×' else ''}".replace("-", "−"))
    axes.locator_params(axis="both", nbins=6)


def _name_lines(axes: Any, drawn: Drawn, x: Axis, y: Axis, palette: Palette, level: float | None) -> None:
    """Every line's name at the right edge, moved apart where they would overlap, and led to the line's last point.

    A line that leaves the frame is led to its last point inside and carries an arrow.
    """
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    wanted: list[tuple[tuple[float, float], str, str, bool]] = []
    for line, points in drawn:
        places = [
            ((a.value * x.scale - left) / (right - left), (b.value * y.scale - low) / (high - low)) for a, b in points
        ]
        inside = [place for place in places if place[0] <= 1 and 0 <= place[1] <= 1]
        arrow = " ↓" if min(place[1] for place in places) < 0 else " →" if places[-1][0] > 1 else ""
        end = inside[-1] if inside else (1.0, 0.0 if arrow == " ↓" else min(max(places[-1][1], 0.0), 1.0))
        wanted.append((end, clean(line.family, 16) + arrow, line.role, line.kind in QUIET))
    if level is not None:
        wanted.append(((1.0, (level * y.scale - low) / (high - low)), "full model", "ink", True))
    wanted.sort(key=lambda item: item[0][1])
    heights = spaced([place[1] for place, *_ in wanted], APART)
    for (place, name, role, quiet), height in zip(wanted, heights, strict=True):
        leader = {"color": palette[role], "linewidth": 0.7, "alpha": 0.5, "clip_on": False, "zorder": 2}
        axes.plot((place[0] + 0.012, 1.03), (place[1], height), transform=axes.transAxes, **leader)
        size, weight = (8.5, "normal") if quiet else (9, "bold")
        name_at = {"transform": axes.transAxes, "va": "center", "color": palette[role]}
        axes.text(1.045, height, name, fontsize=size, weight=weight, **name_at)


def spaced(heights: Sequence[float], apart: float) -> list[float]:
    """Ascending heights in 0..1 moved as little as needed so that neighbours are ``apart`` (one pass up, one down)."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + apart) if placed else max(height, 0.0))
    ceiling = 1.0
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - apart
    return placed
