"""A benchmark as a picture, and its files: the document, SVG and PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynamax_llm.errors import UsageError
from dynamax_llm.evaluation.bench.document import Bench, Row
from dynamax_llm.exits.files import write_atomically
from dynamax_llm.report.canvas import Plot, clean, files
from dynamax_llm.report.palette import Palette
from dynamax_llm.report.scanned import check_target

DOCUMENT = "bench.json"
#: Inches: of a bar with its gap, and around the bars of a batch size.
WIDTH, BAR, AROUND = 8.6, 0.24, 0.75


def target(out: str | Path) -> Path:
    """The .json file that ``out``, a folder or that file, stands for. Raises UsageError, OSError if it cannot be."""
    return check_target(out, DOCUMENT)


def write_bench(found: Bench, out: str | Path) -> list[Path]:
    """Write the document and, where matplotlib is installed, its plot as SVG and PNG; returns what was written.

    Raises UsageError for a place that cannot be, ArtifactError if a file cannot be written.
    """
    path = target(out)
    try:
        drawn = files(plot(found, path.stem)) if found.rows else {}
    except UsageError:  # no matplotlib: the numbers are worth keeping all the same
        drawn = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save(path)
    for name, content in drawn.items():
        write_atomically(path.with_name(name), content)
    return [path, *(path.with_name(name) for name in drawn)]


def plot(found: Bench, name: str = "bench") -> Plot:
    """Tokens per second of every setting, a panel per batch size, with the range of the repeats."""
    panels = [[row for row in found.rows if row.batch == batch] for batch in _batches(found)]
    height = sum(BAR * len(rows) + AROUND for rows in panels) + 0.35

    def draw(figure: Any, palette: Palette) -> None:
        top = height - 0.55
        for rows in panels:
            tall = BAR * len(rows)
            axes = figure.add_axes((0.49, (top - tall) / height, 0.44, tall / height))
            _panel(axes, rows, found, palette)
            top -= tall + AROUND
        title = f"{clean(found.backbone.name, 40)}, {clean(found.place.device_name, 30)}, {found.place.dtype}"
        figure.text(0.02, 1 - 0.25 / height, title, color=palette["ink"], fontsize=10.5, weight="bold")

    fastest = max(found.rows, key=lambda row: row.tokens_per_second.median)
    says = (
        f"Tokens per second of {found.backbone.name} by setting and batch size; the most are "
        f"{fastest.tokens_per_second.median:.0f}, {fastest.label} at batch size {fastest.batch}."
    )
    return Plot(name, (WIDTH, height), says, draw)


def _panel(axes: Any, rows: list[Row], found: Bench, palette: Palette) -> None:
    """Bars from top to bottom; a line where weights read once per step at copy bandwidth would end."""
    full = [row for row in rows if row.kind == "full"]
    for place, row in enumerate(rows):
        rate, role = row.tokens_per_second, {"full": "c1", "stock": "b0"}.get(row.kind, "c0")
        place_ = len(rows) - 1 - place
        axes.barh(place_, rate.median, height=0.62, color=palette[role], zorder=2)
        axes.plot((rate.low, rate.high), (place_, place_), color=palette["ink"], linewidth=1.1, zorder=3)
        text = f"{rate.median:.0f}" if rate.median >= 100 else f"{rate.median:.1f}"
        axes.annotate(text, (rate.high, place_), (4, 0), textcoords="offset points", va="center", fontsize=8)
    if full:
        limit = full[0].batch * found.place.copy_bandwidth / full[0].weight_bytes
        most = max(row.tokens_per_second.high for row in rows)
        if limit < 3 * most:  # far away it would only squeeze the bars
            axes.axvline(limit, color=palette["muted"], linewidth=1.1, linestyle=(0, (4, 2)), zorder=1)
            axes.annotate("weights once", (limit, len(rows) - 0.5), (3, 1), textcoords="offset points",
                          color=palette["muted"], fontsize=7.5, annotation_clip=False)  # fmt: skip
    axes.set_yticks(
        range(len(rows) - 1, -1, -1), [clean(f"{row.label} · {row.engine}", 66) for row in rows], fontsize=8
    )
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"tokens/s, batch size {rows[0].batch}")


def _batches(found: Bench) -> list[int]:
    return sorted({row.batch for row in found.rows})
