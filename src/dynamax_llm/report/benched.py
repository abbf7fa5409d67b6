"""A benchmark's figure and files: the document, SVG and PNG."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from dynamax_llm.evaluation.bench.document import Bench, Row
from dynamax_llm.report.palette import Palette
from dynamax_llm.report.plots import Plot, check_target, clean, heading, save_with_plot

#: The .json file that ``out``, a folder or that file, stands for. Raises UsageError, OSError if it cannot be.
target = functools.partial(check_target, document="bench.json")
#: Inches: width; height of a bar with its gap, and around the bars of a batch size.
WIDTH, BAR, AROUND = 8.6, 0.24, 0.75


def write_bench(document: Bench, out: str | Path) -> list[Path]:
    """Write the document and, where matplotlib is installed, its plot; returns the paths.

    Raises UsageError for a place that cannot be, ArtifactError if a file cannot be written.
    """
    path = target(out)
    return save_with_plot(document, path, plot(document, path.stem) if document.rows else None)


def plot(document: Bench, name: str = "bench") -> Plot:
    """Tokens per second of every setting, a panel per batch size, with the range of the repeats."""
    batches = sorted({row.batch for row in document.rows})
    panels = [[row for row in document.rows if row.batch == batch] for batch in batches]
    height = sum(BAR * len(rows) + AROUND for rows in panels) + 0.35

    def draw(figure: Any, palette: Palette) -> None:
        top = height - 0.55
        for rows in panels:
            tall = BAR * len(rows)
            _panel(figure.add_axes((0.49, (top - tall) / height, 0.44, tall / height)), rows, document, palette)
            top -= tall + AROUND
        place = document.place
        heading(figure, palette, f"{clean(document.backbone.name, 40)}, {clean(place.device_name, 30)}, {place.dtype}")

    fastest = max(document.rows, key=lambda row: row.tokens_per_second.median)
    description = (
        f"Tokens per second of {document.backbone.name} by setting and batch size; the most are "
        f"{fastest.tokens_per_second.median:.0f}, {fastest.label} at batch size {fastest.batch}."
    )
    return Plot(name, (WIDTH, height), description, draw)


def _panel(axes: Any, rows: list[Row], document: Bench, palette: Palette) -> None:
    """Bars from top to bottom; a line at the rate of reading all weights once per step at copy bandwidth."""
    heights = range(len(rows) - 1, -1, -1)
    for height, row in zip(heights, rows, strict=True):
        rate, role = row.tokens_per_second, {"full": "c1", "stock": "b0"}.get(row.kind, "c0")
        axes.barh(height, rate.median, height=0.62, color=palette[role], zorder=2)
        axes.plot((rate.low, rate.high), (height, height), color=palette["ink"], linewidth=1.1, zorder=3)
        text = f"{rate.median:.0f}" if rate.median >= 100 else f"{rate.median:.1f}"
        axes.annotate(text, (rate.high, height), (4, 0), textcoords="offset points", va="center", fontsize=8)
    full = next((row for row in rows if row.kind == "full"), None)
    limit = full.batch * document.place.copy_bandwidth / full.weight_bytes if full else float("inf")
    if limit < 3 * max(row.tokens_per_second.high for row in rows):  # far away it would only squeeze the bars
        muted = palette["muted"]
        axes.axvline(limit, color=muted, linewidth=1.1, linestyle=(0, (4, 2)), zorder=1)
        offset: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": False}
        axes.annotate("weights once", (limit, len(rows) - 0.5), (3, 1), color=muted, fontsize=7.5, **offset)
    axes.set_yticks(heights, [clean(f"{row.label} · {row.engine}", 66) for row in rows], fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"tokens/s, batch size {rows[0].batch}")
