"""Plots of depth and of trust: where tokens leave, whether heads that say p are right, what a promise was tested on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynamax_llm.evaluation.harness.results import BackboneFacts, Cell, Evaluation, Reliability, TaskFacts
from dynamax_llm.report.canvas import Plot, clean
from dynamax_llm.report.markup import slug
from dynamax_llm.report.numbers import is_number, number
from dynamax_llm.report.palette import Palette, step
from dynamax_llm.report.select import label, setting_of

WIDTH = 4.8


def first_depth(document: Evaluation, backbone: BackboneFacts) -> int:
    """Where this backbone's depth scale begins: its first exit, or the shallowest token if that is lower."""
    places = [place for setting in document.settings.get(backbone.name, ()) for place in setting.layers]
    seen = [depth for cell in document.cells if cell.backbone == backbone.name for depth in cell.histogram]
    shown = [token.layers for item in document.examples if item.backbone == backbone.name for token in item.tokens]
    return min([*places, *seen, *shown, backbone.n_layers])


def histogram(document: Evaluation, backbone: BackboneFacts, task: TaskFacts, cells: Sequence[Cell]) -> Plot | None:
    """Every setting's tokens by depth as one stacked bar; None if no cell counted any."""
    counted = [cell for cell in cells if sum(cell.histogram.values()) > 0]
    if not counted:
        return None
    first, last = first_depth(document, backbone), backbone.n_layers
    own = document.settings[backbone.name]
    legend = sorted({place for setting in own for place in setting.layers if first <= place <= last} | {last})
    names = [clean(label(setting_of(document, cell)), 26) for cell in counted]
    height = 0.86 + 0.215 * len(counted)

    def draw(figure: Any, palette: Palette) -> None:
        from matplotlib import collections

        axes = figure.add_axes((0.365, 0.36 / height, 0.52, (height - 0.86) / height))
        boxes, colours = [], []
        for row, cell in enumerate(counted):
            total, left = sum(cell.histogram.values()), 0.0
            for depth, tokens in sorted(cell.histogram.items()):
                right = left + 100 * tokens / total
                boxes.append([(left, row - 0.36), (right, row - 0.36), (right, row + 0.36), (left, row + 0.36)])
                colours.append(palette[f"d{step(depth, first, last)}"])
                left = right
            mean = f"{cell.mean_depth.value * last:.1f}"
            axes.text(103, row, mean, va="center", ha="left", color=palette["muted"], fontsize=8.5)
        axes.add_collection(collections.PolyCollection(boxes, facecolors=colours, linewidths=0))
        axes.set_yticks(range(len(counted)), names)
        axes.set_ylim(len(counted) - 0.45, -0.55)
        axes.set_xlim(0, 100)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("share of tokens, %", fontsize=8.5)
        axes.spines["left"].set_visible(False)
        axes.text(103, -0.95, "mean", va="center", color=palette["muted"], fontsize=8)
        figure.text(0.02, 1 - 0.24 / height, clean(task.name, 22), color=palette["ink"], fontsize=10.5, weight="bold")
        _scale(figure, 1 - 0.245 / height, legend, palette, (first, last))

    says = f"{backbone.name} on {task.name}: share of tokens by layers run, one bar per setting."
    return Plot(slug("depth", backbone.name, task.name), (WIDTH, height), says, draw)


def _scale(figure: Any, height: float, depths: Sequence[int], palette: Palette, span: tuple[int, int]) -> None:
    """One numbered swatch per depth, at the right of the title; of many, the first and the last alone."""
    shown = depths if len(depths) <= 6 else (depths[0], depths[-1])
    left = 0.92 - 0.092 * len(shown)
    figure.text(left - 0.015, height, "layers run", ha="right", color=palette["muted"], fontsize=8.5)
    for index, depth in enumerate(shown):
        place = (left + 0.092 * index, height)
        figure.text(*place, "■", color=palette[f"d{step(depth, *span)}"], fontsize=11)
        figure.text(place[0] + 0.038, height, str(depth), color=palette["muted"], fontsize=8.5)


def reliability(document: Evaluation, backbone: BackboneFacts, family: str, curves: Sequence[Reliability]) -> Plot:
    """One panel per exit: what the head said against how often the exit was right; dots as large as their tokens."""
    first, last = first_depth(document, backbone), backbone.n_layers
    columns = min(len(curves), 2)
    rows = -(-len(curves) // columns)
    width, height = (WIDTH if columns == 2 else 3.0), 0.4 + 2.3 * rows

    def draw(figure: Any, palette: Palette) -> None:
        figure.text(0.02, 1 - 0.22 / height, clean(family, 30), color=palette["ink"], fontsize=10.5, weight="bold")
        for index, curve in enumerate(curves):
            row, column = divmod(index, columns)
            left = (column + 0.18 + 0.03 * (columns == 1)) / columns
            bottom = 1 - (0.4 + 2.3 * (row + 1) - 0.5) / height
            axes = figure.add_axes((left, bottom, 0.75 / columns, 1.5 / height))
            _panel(axes, curve, palette[f"d{step(curve.layer, first, last)}"], palette)

    errors = ", ".join(f"layer {curve.layer} {number(curve.error)}" for curve in curves)
    says = f"Reliability of {family} on {backbone.name}; expected calibration error at {errors}."
    return Plot(slug("reliability", backbone.name, family), (width, height), says, draw)


def _panel(axes: Any, curve: Reliability, colour: str, palette: Palette) -> None:
    total = sum(item.tokens for item in curve.bins)
    shown = [item for item in curve.bins if item.tokens > 0]
    axes.plot([0, 1], [0, 1], color=palette["muted"], linewidth=0.9, dashes=(4, 3), zorder=2)
    axes.plot(
        [item.confidence for item in shown], [item.right for item in shown], color=colour, linewidth=1.6, zorder=3
    )
    sizes = [14 + 150 * item.tokens / total for item in shown]
    axes.scatter([item.confidence for item in shown], [item.right for item in shown], s=sizes, color=colour, zorder=4)
    axes.set_xlim(-0.04, 1.04)
    axes.set_ylim(-0.04, 1.04)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_title(f"layer {curve.layer} · ECE {number(curve.error)}", loc="left", fontsize=9.5)
    axes.set_xlabel("the head says", fontsize=8.5)
    axes.set_ylabel("the exit is right", fontsize=8.5)


def evidence(name: str, promise: Mapping[str, Any]) -> Plot | None:
    """A promise's path from safe to risky: estimate against mean depth, its bound, and what was kept."""
    points = [
        (float(item["mean_depth"]), float(item["estimate"]), bool(item.get("kept")), item)
        for item in promise.get("evidence") or ()
        if isinstance(item, Mapping) and is_number(item.get("mean_depth")) and is_number(item.get("estimate"))
    ]
    if not points:
        return None
    bound, chosen = promise.get("bound"), promise.get("parameter")

    def draw(figure: Any, palette: Palette) -> None:
        axes = figure.add_axes((0.135, 0.16, 0.82, 0.7))
        axes.plot(
            [100 * x for x, *_ in points], [y for _, y, *_ in points], color=palette["c1"], linewidth=1.2, zorder=2
        )
        for x, y, kept, item in points:
            axes.plot(
                100 * x,
                y,
                "o",
                markersize=6,
                color=palette["c1"],
                markerfacecolor=palette["c1"] if kept else palette["surface"],
                zorder=3,
            )
            if item.get("parameter") == chosen:
                axes.plot(
                    100 * x, y, "o", markersize=12, color=palette["c0"], markerfacecolor="none", markeredgewidth=1.6
                )
        if is_number(bound):
            axes.axhline(bound, color=palette["bad"], linewidth=1.1, dashes=(5, 3), zorder=1.5)
            axes.annotate(
                f"bound {number(bound)}",
                (0.995, bound),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right",
                color=palette["bad"],
                fontsize=8.5,
            )
        axes.margins(0.05, 0.1)
        axes.invert_xaxis()
        axes.set_xlabel("mean depth, % of the layers, safe → risky")
        figure.text(
            0.02,
            0.92,
            clean(str(promise.get("text", "promise")), 44),
            color=palette["ink"],
            fontsize=10.5,
            weight="bold",
        )

    says = (
        f"{promise.get('text')}: estimate against mean depth along the path from safe to risky, bound {number(bound)}; "
        "filled dots passed the test, the ringed one was chosen. The table beside it holds the numbers."
    )
    return Plot(slug("promise", name), (WIDTH, 3.1), says, draw)
