"""Quality against cost: one plot per backbone, task, quality and kind of cost, a line per family of settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dynamax_llm.evaluation.results import BackboneFacts, Cell, Evaluation, Interval, TaskFacts
from dynamax_llm.report.canvas import Plot, clean
from dynamax_llm.report.markup import slug
from dynamax_llm.report.palette import Palette
from dynamax_llm.report.select import QUIET, Line, full_cell, lines, metric_name, primary

SIZE = (5.4, 3.75)
#: Where the drawing area ends and the lines' names begin, as shares of the figure.
LEFT, RIGHT, BOTTOM, TOP = 0.115, 0.76, 0.135, 0.895
#: Least distance between two names, as a share of the axes' height.
APART = 0.062
_MARKERS = {"c0": "o", "c1": "s", "c2": "^", "c3": "D", "c4": "v", "c5": "P", "c6": "X", "c7": "p", "b0": "o", "b1": "s"}


@dataclass(frozen=True)
class Axis:
    """What one axis shows: its name for files and for reading, and where a cell's value comes from."""

    name: str
    title: str
    value: Callable[[Cell], Interval | None]
    scale: float = 1.0
    neutral: float | None = None  # where the full model stands
    unit: str = ""


COSTS = (
    Axis("counted", "counted reduction", lambda cell: cell.counted_reduction, 100.0, 0.0, " %"),
    Axis("speed-up", "speed-up (wall clock)", lambda cell: cell.speed_up, 1.0, 1.0, "×"),
)
AGREEMENT = Axis("agreement", "agreement with the full model", lambda cell: cell.agreement, neutral=1.0)

Point = tuple[Interval, Interval]


def fronts(document: Evaluation, backbone: BackboneFacts, task: TaskFacts, cells: Sequence[Cell]) -> list[Plot]:
    """The plots of one backbone on one task: those for which there is anything to draw."""
    quality = Axis(metric_name(task.primary), metric_name(task.primary), lambda cell: primary(cell, task))
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
    drawn: list[tuple[Line, list[Point]]],
    reference: Interval | None,
) -> Plot:
    def draw(figure: Any, palette: Palette) -> None:
        axes = figure.add_axes((LEFT, BOTTOM, RIGHT - LEFT, TOP - BOTTOM))
        for line, points in reversed(drawn):  # what is worth looking at lies on top
            _draw_line(axes, line, points, x, y, palette)
        level = reference.value if reference else y.neutral
        if level is not None:
            axes.axhline(level * y.scale, color=palette["ink"], linewidth=1, dashes=(1, 2.5), zorder=2)
        if x.neutral is not None:
            axes.axvline(x.neutral * x.scale, color=palette["muted"], linewidth=0.9, zorder=1.5)
            if level is not None:
                axes.plot(x.neutral * x.scale, level * y.scale, "*", color=palette["ink"], markersize=11, zorder=6)
        _dress(axes, x, y)
        figure.text(LEFT, 0.945, f"{clean(y.title, 34)} × {x.title}", color=palette["ink"], fontsize=10.5, weight="bold")
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
    errors = {
        "xerr": [_whisker(point[0], x.scale) for point in points],
        "yerr": [_whisker(point[1], y.scale) for point in points],
    }
    axes.errorbar(
        xs,
        ys,
        fmt="none",
        ecolor=colour,
        elinewidth=0.7 if quiet else 1.0,
        alpha=0.35 if quiet else 0.5,
        zorder=2.5,
        **{key: list(zip(*value, strict=True)) for key, value in errors.items()},
    )
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


def _whisker(interval: Interval, scale: float) -> tuple[float, float]:
    """How far an interval reaches below and above its value; nothing where it has no ends."""
    if interval.low is None or interval.high is None:
        return (0.0, 0.0)
    return (max(interval.value - interval.low, 0.0) * scale, max(interval.high - interval.value, 0.0) * scale)


def _dress(axes: Any, x: Axis, y: Axis) -> None:
    axes.margins(0.06, 0.07)
    axes.set_xlabel(f"{x.title}, {x.unit.strip()}    → cheaper" if x.name == "counted" else f"{x.title}    → faster")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}{'×' if x.unit == '×' else ''}".replace("-", "−"))
    axes.locator_params(axis="x", nbins=6)
    axes.locator_params(axis="y", nbins=6)
    axes.set_autoscale_on(False)
    axes.autoscale_view()


def _name_lines(
    axes: Any,
    drawn: list[tuple[Line, list[Point]]],
    x: Axis,
    y: Axis,
    palette: Palette,
    level: float | None,
) -> None:
    """Every line's name at the right edge, moved apart where they would overlap, and led to the line's last point."""
    wanted = []
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    for line, points in drawn:
        end = max(points, key=lambda point: point[0].value)
        place = ((end[0].value * x.scale - left) / (right - left), (end[1].value * y.scale - low) / (high - low))
        wanted.append((place, clean(line.family, 16), line.role, line.kind in QUIET))
    if level is not None:
        wanted.append(((1.0, (level * y.scale - low) / (high - low)), "full model", "ink", False))
    wanted.sort(key=lambda item: item[0][1])
    heights = spaced([place[1] for place, *_ in wanted], APART)
    for (place, name, role, quiet), height in zip(wanted, heights, strict=True):
        axes.annotate(
            name,
            xy=place,
            xycoords="axes fraction",
            xytext=(1.045, height),
            textcoords="axes fraction",
            va="center",
            color=palette[role],
            fontsize=8.5 if quiet else 9.5,
            weight="normal" if quiet or role == "ink" else "bold",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": palette[role],
                "linewidth": 0.6,
                "alpha": 0.45,
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )


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
