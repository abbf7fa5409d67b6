"""A scan's figure and files: the document, SVG and PNG."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from dynamax_llm.evaluation.scan.document import VERDICT_AT, Point, Scan
from dynamax_llm.report import plots
from dynamax_llm.report.palette import Palette
from dynamax_llm.report.plots import Plot, clean, heading, save_with_plot

#: The .json file that ``out``, a folder or that file, stands for. Raises UsageError, OSError if it cannot be.
check_target = functools.partial(plots.check_target, document="scan.json")
SIZE = (6.4, 3.6)


def write_scan(scan: Scan, out: str | Path) -> list[Path]:
    """Write the document and, where matplotlib is installed, its plot; returns the paths.

    Raises UsageError for a place that cannot be, ArtifactError if a file cannot be written.
    """
    path = check_target(out)
    return save_with_plot(scan, path, plot(scan, path.stem))


def plot(scan: Scan, name: str = "scan") -> Plot:
    """Agreement and settled share by depth, and the depths of oracle, predicted head and margin rule at VERDICT_AT."""
    marks = [
        ("oracle", scan.oracle.exits.value, "c2"),
        ("predicted", _depth(scan.predicted), "c0"),
        ("margin", _depth(tuple(point for point in scan.points if point.rule == "softmax_margin")), "c4"),
    ]

    def draw(figure: Any, palette: Palette) -> None:
        axes = figure.add_axes((0.10, 0.15, 0.72, 0.66))
        _curves(axes, scan, palette)
        beside: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": False}
        for row, (label, depth, role) in enumerate(marks):
            axes.axvline(depth, color=palette[role], linewidth=1.2, linestyle=(0, (4, 2)), zorder=2)
            at = (1.0, 0.62 - 0.13 * row)
            axes.annotate(f"{label} {depth:.2f}", at, (8, 0), xycoords="axes fraction", color=palette[role], **beside)
        note = f"mean depth at\n{VERDICT_AT:.0%} agreement"
        axes.text(1.025, 0.75, note, transform=axes.transAxes, color=palette["muted"], fontsize=8, va="bottom")
        heading(figure, palette, f"{clean(scan.backbone.name, 40)}: {scan.verdict.answer}")

    depths = ", ".join(f"{label} {depth:.2f}" for label, depth, _ in marks)
    description = (
        f"{scan.backbone.name}: share of tokens by depth whose layer's own argmax is the full model's; mean depth of "
        f"{depths}."
    )
    return Plot(name, SIZE, description, draw)


def _curves(axes: Any, scan: Scan, palette: Palette) -> None:
    last = scan.backbone.n_layers
    depths = [layer.depth / last for layer in scan.layers]
    middle = len(depths) // 3
    for values, role, label, shift in (
        ([layer.settled for layer in scan.layers], "b0", "settled", (-44, 6)),
        ([layer.agreement for layer in scan.layers], "c1", "agreement", (6, -16)),
    ):
        xs, ys = [*depths, 1.0], [*(value.value for value in values), 1.0]
        axes.plot(xs, ys, color=palette[role], linewidth=1.9 if role == "c1" else 1.1, zorder=3)
        axes.annotate(label, (xs[middle], ys[middle]), shift, textcoords="offset points", color=palette[role])
    agreements = [(depth, layer.agreement) for depth, layer in zip(depths, scan.layers, strict=True)]
    banded = [(depth, value.low, value.high) for depth, value in agreements if value.low is not None]
    if banded:
        axes.fill_between(*zip(*banded, strict=True), color=palette["c1"], alpha=0.2, linewidth=0)
    for exit in scan.exits:
        axes.axvline(exit / last, color=palette["grid"], linewidth=2.5, zorder=1)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("depth, share of the layers")
    axes.set_ylabel("share of tokens")


def _depth(points: tuple[Point, ...]) -> float:
    return next(point.depth.value for point in points if point.target == VERDICT_AT)
