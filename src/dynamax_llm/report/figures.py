"""The figures of a report: fronts of quality against cost, depth histograms, reliability, the evidence of promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamax_llm.evaluation.harness.results import (
    BackboneFacts,
    Cell,
    Evaluation,
    Interval,
    Reliability,
    TaskFacts,
)
from dynamax_llm.report.numbers import is_number, number, slug
from dynamax_llm.report.palette import MARKERS, Palette, step
from dynamax_llm.report.plots import Plot, clean, heading
from dynamax_llm.report.select import (
    Line,
    first_depth,
    label,
    lines,
    metric_name,
    paired,
    setting_of,
)

WIDTH = 4.8
#: The drawing area of a front, as shares of the figure; the lines' names are to its right.
AREA = (0.125, 0.155, 0.575, 0.725)
#: Least distance between two names, as a share of the axes' height.
APART = 0.07

#: The points of a line in a front: cost and quality.
Drawn = list[tuple[Line, list[tuple[Interval, Interval]]]]


@dataclass(frozen=True)
class Axis:
    """What one axis shows: its name in file names, its title, and a cell's value."""

    name: str
    title: str
    value: Callable[[Cell], Interval | None]
    scale: float = 1.0
    neutral: float = 1.0  # the full model's value
    unit: str = ""
    better: str = "better"


COSTS = (
    Axis("counted", "counted reduction", lambda cell: cell.counted_reduction, 100.0, 0.0, "%", "cheaper"),
    Axis("speed-up", "speed-up", lambda cell: cell.speed_up, 1.0, 1.0, "×", "faster"),
)
AGREEMENT = Axis("agreement", "agreement", lambda cell: cell.agreement)


def unscored(task: TaskFacts, cells: Sequence[Cell]) -> bool:
    """Whether every score of the task's primary metric is 0, so that a plot of it shows nothing."""
    scores = [cell.metrics[task.primary].value for cell in cells if task.primary in cell.metrics]
    return bool(scores) and not any(scores)


def fronts(document: Evaluation, backbone: BackboneFacts, task: TaskFacts, cells: Sequence[Cell]) -> list[Plot]:
    """The plots of one backbone on one task, those without points or with nothing but zeros left out."""
    quality = Axis(slug(task.primary), metric_name(task.primary), lambda cell: paired(cell, task))
    families = lines(document, cells)
    full = next((cell for cell in cells if setting_of(document, cell).kind == "full"), None)
    plots = []
    for y in (AGREEMENT,) if unscored(task, cells) else (quality, AGREEMENT):
        for x in COSTS:
            drawn = [(line, points) for line in families if (points := _points(line, x, y))]
            if drawn:
                plots.append(_front(backbone, task, x, y, drawn, y.value(full) if full else None))
    return plots


def _points(line: Line, x: Axis, y: Axis) -> list[tuple[Interval, Interval]]:
    both = ((x.value(cell), y.value(cell)) for cell in line.cells)
    return sorted(((a, b) for a, b in both if a and b), key=lambda point: point[0].value)


def _front(
    backbone: BackboneFacts, task: TaskFacts, x: Axis, y: Axis, drawn: Drawn, reference: Interval | None
) -> Plot:
    """A line per family of settings; the star is the full model, the dotted line its quality."""

    def draw(figure: Any, palette: Palette) -> None:
        axes = figure.add_axes(AREA)
        for line, points in reversed(drawn):  # baselines below
            _draw_line(axes, line, points, x, y, palette)
        level = reference.value if reference else y.neutral
        _frame(axes, x, y, drawn, level)
        axes.axhline(level * y.scale, color=palette["ink"], linewidth=1, dashes=(1, 2.5), zorder=2)
        star = {"markersize": 12, "markeredgewidth": 0, "clip_on": False, "zorder": 6}
        axes.plot(x.neutral * x.scale, level * y.scale, "*", color=palette["ink"], **star)
        axes.axvline(x.neutral * x.scale, color=palette["muted"], linewidth=0.9, zorder=1.5)
        heading(figure, palette, f"{clean(y.title.partition(' (')[0], 24)} against {x.title}")
        _name_lines(axes, drawn, x, y, palette, level)

    description = (
        f"{backbone.name} on {task.name}: {y.title} against {x.title}, one line per family of settings: "
        f"{', '.join(line.family for line, _ in drawn)}. The tables below hold the numbers."
    )
    return Plot(slug("front", backbone.name, task.name, y.name, x.name), (WIDTH, 3.3), description, draw)


def _draw_line(
    axes: Any, line: Line, points: list[tuple[Interval, Interval]], x: Axis, y: Axis, palette: Palette
) -> None:
    quiet, colour = line.quiet, palette[line.role]
    xs = [point[0].value * x.scale for point in points]
    ys = [point[1].value * y.scale for point in points]
    across, upward = [_ends(point[0]) for point in points], [_ends(point[1]) for point in points]
    whisker = {"colors": colour, "linewidth": 0.7 if quiet else 1.0, "alpha": 0.22 if quiet else 0.32, "zorder": 2.5}
    axes.hlines(ys, [x.scale * low for low, _ in across], [x.scale * high for _, high in across], **whisker)
    axes.vlines(xs, [y.scale * low for low, _ in upward], [y.scale * high for _, high in upward], **whisker)
    dashes: Any = (0, (4, 2.5)) if line.kind == "pruned" else (0, (1.2, 1.8)) if quiet else "-"
    marker = {"marker": MARKERS[line.role], "markerfacecolor": "none" if quiet else colour}
    size = {"markersize": 3.4 if quiet else 5.2, "markeredgewidth": 0.9 if quiet else 0}
    width = 1.0 if quiet else 1.9
    axes.plot(xs, ys, color=colour, linewidth=width, linestyle=dashes, zorder=3 if quiet else 4, **marker, **size)


def _ends(interval: Interval) -> tuple[float, float]:
    """Both ends; the value itself for an end that is missing or lies on its wrong side."""
    value = interval.value
    low, high = (value if end is None else end for end in (interval.low, interval.high))
    return min(low, value), max(high, value)


def _frame(axes: Any, x: Axis, y: Axis, drawn: Drawn, level: float) -> None:
    """Limits around the lines of settings (baselines may leave them), and what is written along the axes."""
    points = [point for line, group in drawn if not line.quiet for point in group]
    points = points or [point for _, group in drawn for point in group]
    across = [x.neutral, *(point[0].value for point in points)]
    upward = [level, *(end for point in points for end in _ends(point[1]))]
    for axis, values, set_limits, below in ((x, across, axes.set_xlim, 0.05), (y, upward, axes.set_ylim, 0.14)):
        low, high = min(values), max(values)
        widening = max(0.02 - (high - low), 0.0) / 2  # equal values get a frame too
        low, high = low - widening, high + widening
        set_limits((low - below * (high - low)) * axis.scale, (high + 0.06 * (high - low)) * axis.scale)
    axes.set_xlabel(f"{x.title}{', %' if x.unit == '%' else ''}  → {x.better}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}{'×' if x.unit == '×' else ''}".replace("-", "−"))
    axes.locator_params(axis="both", nbins=6)


def _name_lines(axes: Any, drawn: Drawn, x: Axis, y: Axis, palette: Palette, level: float) -> None:
    """Every line's name at the right edge, moved apart where they would overlap, and led to the line's last point.

    A line that leaves the frame is led to its last point inside and has an arrow.
    """
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    names = [((1.0, (level * y.scale - low) / (high - low)), "full model", "ink", True)]
    for line, points in drawn:
        places = [
            ((a.value * x.scale - left) / (right - left), (b.value * y.scale - low) / (high - low)) for a, b in points
        ]
        inside = [place for place in places if place[0] <= 1 and 0 <= place[1] <= 1]
        arrow = " ↓" if min(place[1] for place in places) < 0 else " →" if places[-1][0] > 1 else ""
        end = inside[-1] if inside else (1.0, 0.0 if arrow == " ↓" else min(max(places[-1][1], 0.0), 1.0))
        names.append((end, clean(line.family, 16) + arrow, line.role, line.quiet))
    names.sort(key=lambda item: item[0][1])
    heights = spaced([place[1] for place, *_ in names], APART)
    for (place, name, role, quiet), height in zip(names, heights, strict=True):
        leader = {"color": palette[role], "linewidth": 0.7, "alpha": 0.5, "clip_on": False, "zorder": 2}
        axes.plot((place[0] + 0.012, 1.03), (place[1], height), transform=axes.transAxes, **leader)
        font = {"fontsize": 8.5 if quiet else 9, "weight": "normal" if quiet else "bold", "color": palette[role]}
        axes.text(1.045, height, name, transform=axes.transAxes, va="center", **font)


def spaced(heights: Sequence[float], apart: float) -> list[float]:
    """Ascending heights in 0..1 moved so that neighbours are ``apart``: one pass up, one down."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + apart) if placed else max(height, 0.0))
    ceiling = 1.0
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - apart
    return placed


def histogram(document: Evaluation, backbone: BackboneFacts, task: TaskFacts, cells: Sequence[Cell]) -> Plot | None:
    """Every setting's tokens by depth as one stacked bar; None if no cell counted any."""
    counted = [cell for cell in cells if sum(cell.histogram.values()) > 0]
    if not counted:
        return None
    first, last = first_depth(document, backbone), backbone.n_layers
    exits = {layer for setting in document.settings[backbone.name] for layer in setting.layers}
    depths = sorted({layer for layer in exits if first <= layer <= last} | {last})
    names = [clean(label(setting_of(document, cell)), 26) for cell in counted]
    height = 0.86 + 0.215 * len(counted)

    def draw(figure: Any, palette: Palette) -> None:
        from matplotlib.collections import PolyCollection

        axes = figure.add_axes((0.365, 0.36 / height, 0.52, (height - 0.86) / height))
        boxes, colours, muted = [], [], palette["muted"]
        for row, cell in enumerate(counted):
            total, left = sum(cell.histogram.values()), 0.0
            for depth, tokens in sorted(cell.histogram.items()):
                right = left + 100 * tokens / total
                boxes.append([(left, row - 0.36), (right, row - 0.36), (right, row + 0.36), (left, row + 0.36)])
                colours.append(palette[f"d{step(depth, first, last)}"])
                left = right
            axes.text(103, row, f"{cell.mean_depth.value * last:.1f}", va="center", color=muted, fontsize=8.5)
        axes.add_collection(PolyCollection(boxes, facecolors=colours, linewidths=0))
        axes.set_yticks(range(len(counted)), names)
        axes.set_ylim(len(counted) - 0.45, -0.55)
        axes.set_xlim(0, 100)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("share of tokens, %", fontsize=8.5)
        axes.spines["left"].set_visible(False)
        axes.text(103, -0.95, "mean", va="center", color=muted, fontsize=8)
        heading(figure, palette, clean(task.name, 22))
        _depth_legend(figure, 1 - 0.245 / height, depths, palette, (first, last))

    description = f"{backbone.name} on {task.name}: share of tokens by layers run, one bar per setting."
    return Plot(slug("depth", backbone.name, task.name), (WIDTH, height), description, draw)


def _depth_legend(figure: Any, height: float, depths: Sequence[int], palette: Palette, span: tuple[int, int]) -> None:
    """One numbered swatch per depth, at the right of the title; of more than six, the first and the last alone."""
    depths = depths if len(depths) <= 6 else (depths[0], depths[-1])
    left, muted = 0.92 - 0.092 * len(depths), palette["muted"]
    figure.text(left - 0.015, height, "layers run", ha="right", color=muted, fontsize=8.5)
    for index, depth in enumerate(depths):
        at = left + 0.092 * index
        figure.text(at, height, "■", color=palette[f"d{step(depth, *span)}"], fontsize=11)
        figure.text(at + 0.038, height, str(depth), color=muted, fontsize=8.5)


def reliability(document: Evaluation, backbone: BackboneFacts, family: str, curves: Sequence[Reliability]) -> Plot:
    """One panel per exit: confidence against the share of tokens the exit got right; dots as large as their tokens."""
    first, last = first_depth(document, backbone), backbone.n_layers
    columns = min(len(curves), 2)
    rows = -(-len(curves) // columns)
    width, height = (WIDTH if columns == 2 else 3.0), 0.4 + 2.3 * rows

    def draw(figure: Any, palette: Palette) -> None:
        heading(figure, palette, clean(family, 30))
        for index, curve in enumerate(curves):
            row, column = divmod(index, columns)
            left = (column + 0.18 + 0.03 * (columns == 1)) / columns
            bottom = 1 - (0.4 + 2.3 * (row + 1) - 0.5) / height
            axes = figure.add_axes((left, bottom, 0.75 / columns, 1.5 / height))
            _reliability_panel(axes, curve, palette[f"d{step(curve.layer, first, last)}"], palette["muted"])

    errors = ", ".join(f"layer {curve.layer} {number(curve.error)}" for curve in curves)
    description = f"Reliability of {family} on {backbone.name}; expected calibration error at {errors}."
    return Plot(slug("reliability", backbone.name, family), (width, height), description, draw)


def _reliability_panel(axes: Any, curve: Reliability, colour: str, muted: str) -> None:
    total = sum(item.tokens for item in curve.bins)
    bins = [item for item in curve.bins if item.tokens > 0]
    xs, ys = [item.confidence for item in bins], [item.right for item in bins]
    axes.plot([0, 1], [0, 1], color=muted, linewidth=0.9, dashes=(4, 3), zorder=2)
    axes.plot(xs, ys, color=colour, linewidth=1.6, zorder=3)
    axes.scatter(xs, ys, s=[14 + 150 * item.tokens / total for item in bins], color=colour, zorder=4)
    for limits, ticks in ((axes.set_xlim, axes.set_xticks), (axes.set_ylim, axes.set_yticks)):
        limits(-0.04, 1.04)
        ticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_title(f"layer {curve.layer} · ECE {number(curve.error)}", loc="left", fontsize=9.5)
    axes.set_xlabel("confidence", fontsize=8.5)
    axes.set_ylabel("share right", fontsize=8.5)


def evidence(name: str, promise: Mapping[str, Any]) -> Plot | None:
    """A promise's path from safe to risky: estimate against mean depth, its bound, what passed, what was chosen."""
    points = [
        (100 * float(item["mean_depth"]), float(item["estimate"]), item)
        for item in promise.get("evidence") or ()
        if isinstance(item, Mapping) and is_number(item.get("mean_depth")) and is_number(item.get("estimate"))
    ]
    if not points:
        return None
    bound, text = promise.get("bound"), str(promise.get("text", "promise"))

    def draw(figure: Any, palette: Palette) -> None:
        axes = figure.add_axes((0.135, 0.16, 0.82, 0.7))
        blue, orange, red = palette["c1"], palette["c0"], palette["bad"]
        axes.plot([x for x, *_ in points], [y for _, y, _ in points], color=blue, linewidth=1.2, zorder=2)
        for x, y, item in points:
            inner = blue if item.get("kept") else palette["surface"]
            axes.plot(x, y, "o", markersize=6, color=blue, markerfacecolor=inner, zorder=3)
            if item.get("parameter") == promise.get("parameter"):
                axes.plot(x, y, "o", markersize=12, color=orange, markerfacecolor="none", markeredgewidth=1.6)
        if is_number(bound):
            axes.axhline(bound, color=red, linewidth=1.1, dashes=(5, 3), zorder=1.5)
            above: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate(
                f"bound {number(bound)}", (0.995, bound), (0, 3), ha="right", color=red, fontsize=8.5, **above
            )
        axes.margins(0.05, 0.1)
        axes.invert_xaxis()
        axes.set_xlabel("mean depth, % of the layers, safe → risky")
        heading(figure, palette, clean(text, 44))

    description = (
        f"{text}: estimate against mean depth along the path from safe to risky, bound {number(bound)}; "
        "filled dots passed the test, the ringed one was chosen. The table beside it holds the numbers."
    )
    return Plot(slug("promise", name), (WIDTH, 3.1), description, draw)
