"""What ``dynamax eval`` and ``dynamax paper`` share: tables of what they found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from dynamax_llm.evaluation.harness.results import Cell, Evaluation, Interval

#: Columns of a terminal from which on intervals stand beside their means.
WIDE = 150


def show(found: Evaluation, out: Path) -> None:
    """One table per backbone and task: settings as rows, figures with their intervals where there is room."""
    from dynamax_llm.cli.tables import Terminal

    terminal = Terminal()
    wide = terminal.width >= WIDE
    for backbone in found.backbones:
        for task in found.tasks:
            cells = [cell for cell in found.cells if (cell.backbone, cell.task) == (backbone.name, task.name)]
            if cells:
                name = f"{task.name} on {backbone.name}, {task.shots}-shot, {task.samples} documents"
                terminal.print(_table(f"{name}; score: {task.primary}", task.primary, cells, wide))
    said = "Intervals: 95 %, bootstrap over documents." if wide else f"Intervals: {out / 'eval.json'}, or a report."
    terminal.write_line(
        f"{said} Depth: share of the layers. Counted: multiply-accumulates not spent, which is no speed-up."
    )
    terminal.write_line(f"Saved in {out}.")


def _table(title: str, primary: str, cells: Sequence[Cell], wide: bool) -> Table:
    from dynamax_llm.cli.tables import table

    columns = ("score", "Δ", "agree", "ROUGE-L", "degen.", "depth", "counted", "speed-up")
    settings = table(title, "setting", *columns)
    for cell in cells:
        metric = cell.metrics[primary]
        settings.add_row(
            cell.setting,
            f"{metric.value:.3f}",
            _shown(metric.delta, wide, "+.3f"),
            _shown(cell.agreement, wide),
            _shown(cell.rouge_l, wide),
            _shown(cell.degenerate, wide),
            _shown(cell.mean_depth, wide),
            f"{cell.counted_reduction.value:.1%}",
            _shown(cell.speed_up, wide, ".2f"),
        )
    return settings


def _shown(value: Interval | None, wide: bool, form: str = ".3f") -> str:
    if value is None:
        return "–"
    if not wide or value.low is None or value.high is None:
        return format(value.value, form)
    return f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"
