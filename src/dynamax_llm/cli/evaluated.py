"""What ``dynamax eval`` and ``dynamax paper`` share: options, a bar while they work, tables of what they found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from dynamax_llm.evaluation.harness.results import Cell, Evaluation, Interval

Limit = Annotated[int, typer.Option(help="Documents per task.")]
Batch = Annotated[int, typer.Option(help="Rows at a time; the texts do not depend on it.")]
Timed = Annotated[int, typer.Option(help="Documents per task whose decoding is timed, at batch 1; 0: none.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Tokens to generate at most.")]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder of local task files (triviaqa_dev.jsonl …), for use offline.")
]

#: Columns of a terminal from which on intervals stand beside their means.
WIDE = 150


class Bar:
    """Samples done, on stderr, where that is a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("evaluating", total=None)

    def show(self, what: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=what, completed=done, total=total)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()


def show(found: Evaluation, out: Path) -> None:
    """One table per backbone and task: settings as rows, figures with their intervals where there is room."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    wide = console.width >= WIDE
    for backbone in found.backbones:
        for task in found.tasks:
            cells = [cell for cell in found.cells if (cell.backbone, cell.task) == (backbone.name, task.name)]
            if cells:
                name = f"{task.name} on {backbone.name}, {task.shots}-shot, {task.samples} documents"
                console.print(_table(f"{name}; score: {task.primary}", task.primary, cells, wide))
    said = "Intervals: 95 %, bootstrap over documents." if wide else f"Intervals: {out / 'eval.json'}, or a report."
    console.print(f"{said} Depth: share of the layers. Counted: multiply-accumulates not spent, which is no speed-up.")
    console.print(f"Saved in {out}.", soft_wrap=True)


def _table(title: str, primary: str, cells: Sequence[Cell], wide: bool) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("setting", overflow="fold")
    for name in ("score", "Δ", "agree", "ROUGE-L", "degen.", "depth", "counted", "speed-up"):
        table.add_column(name, justify="right", overflow="fold")
    for cell in cells:
        metric = cell.metrics[primary]
        table.add_row(
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
    return table


def _shown(value: Interval | None, wide: bool, form: str = ".3f") -> str:
    if value is None:
        return "–"
    if not wide or value.low is None or value.high is None:
        return format(value.value, form)
    return f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"
