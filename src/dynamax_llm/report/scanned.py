"""A scan as a picture, and its files: the document, SVG and PNG."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from dynamax_llm.errors import UsageError
from dynamax_llm.evaluation.scan.document import VERDICT_AT, Scan
from dynamax_llm.exits.files import write_atomically
from dynamax_llm.report.canvas import Plot, clean, files
from dynamax_llm.report.palette import Palette

DOCUMENT = "scan.json"
SIZE = (6.4, 3.6)


def check_target(out: str | Path, document: str = DOCUMENT) -> Path:
    """The .json file that ``out``, a folder (then ``document`` in it) or that file, stands for.

    Raises UsageError, OSError if it cannot be.
    """
    given = Path(out).expanduser()
    path = given if given.suffix == ".json" and not given.is_dir() else given / document
    place = path.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UsageError(f"`out` {str(out)!r}: {str(place)!r} is a file. Give a folder, or a file that ends in .json.")
    with tempfile.TemporaryFile(dir=place):
        pass
    return path


def write_scan(scan: Scan, out: str | Path) -> list[Path]:
    """Write the document and, where matplotlib is installed, its plot as SVG and PNG; returns what was written.

    Raises UsageError for a place that cannot be, ArtifactError if a file cannot be written.
    """
    path = check_target(out)
    try:
        drawn = files(plot(scan, path.stem))
    except UsageError:  # no matplotlib: the numbers are worth keeping all the same
        drawn = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    scan.save(path)
    for name, content in drawn.items():
        write_atomically(path.with_name(name), content)
    return [path, *(path.with_name(name) for name in drawn)]


def plot(scan: Scan, name: str = "scan") -> Plot:
    """Agreement and settled share by depth, and where oracle, predicted head and margin rule lie at VERDICT_AT."""
    last = scan.backbone.n_layers
    marks = [
        ("oracle", scan.oracle.exits.value, "c2"),
        ("predicted", _at(scan.predicted), "c0"),
        ("margin", _at(tuple(point for point in scan.points if point.rule == "softmax_margin")), "c4"),
    ]

    def draw(figure: Any, palette: Palette) -> None:
        axes = figure.add_axes((0.10, 0.15, 0.72, 0.66))
        depths = [layer.depth / last for layer in scan.layers]
        for values, role, label, shift in (
            ([layer.settled for layer in scan.layers], "b0", "settled", (-44, 6)),
            ([layer.agreement for layer in scan.layers], "c1", "agreement", (6, -16)),
        ):
            xs, ys = [*depths, 1.0], [*(value.value for value in values), 1.0]
            axes.plot(xs, ys, color=palette[role], linewidth=1.9 if role == "c1" else 1.1, zorder=3)
            middle = len(depths) // 3
            axes.annotate(label, (xs[middle], ys[middle]), shift, textcoords="offset points", color=palette[role])
        known = [(depth, layer.agreement) for depth, layer in zip(depths, scan.layers, strict=True)]
        banded = [(depth, value.low, value.high) for depth, value in known if value.low is not None]
        if banded:
            axes.fill_between(*zip(*banded, strict=True), color=palette["c1"], alpha=0.2, linewidth=0)
        for place in scan.exits:
            axes.axvline(place / last, color=palette["grid"], linewidth=2.5, zorder=1)
        for row, (label, depth, role) in enumerate(marks):
            axes.axvline(depth, color=palette[role], linewidth=1.2, linestyle=(0, (4, 2)), zorder=2)
            text = f"{label} {depth:.2f}"
            axes.annotate(text, (1.0, 0.62 - 0.13 * row), (8, 0), xycoords="axes fraction",
                          textcoords="offset points", color=palette[role], annotation_clip=False)  # fmt: skip
        axes.text(1.025, 0.75, f"mean depth at\n{VERDICT_AT:.0%} agreement", transform=axes.transAxes,
                  color=palette["muted"], fontsize=8, va="bottom")  # fmt: skip
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("depth, share of the layers")
        axes.set_ylabel("share of tokens")
        figure.text(0.02, 0.92, f"{clean(scan.backbone.name, 40)}: {scan.verdict.answer}",
                    color=palette["ink"], fontsize=10.5, weight="bold")  # fmt: skip

    says = (
        f"{scan.backbone.name}: share of tokens by depth whose layer's own argmax is the full model's; mean depth of "
        + ", ".join(f"{label} {depth:.2f}" for label, depth, _ in marks)
        + "."
    )
    return Plot(name, SIZE, says, draw)


def _at(points: tuple[Any, ...]) -> float:
    return next(point.depth.value for point in points if point.target == VERDICT_AT)
