"""What ``dynamax eval`` and ``dynamax paper`` show while they work, and of what they found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamax_llm.evaluation.results import Evaluation, Interval


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
    """One table per task: settings as rows, figures with their intervals."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    for task in found.tasks:
        head = (
            "setting",
            task.primary,
            "Δ to full",
            "agreement",
            "ROUGE-L",
            "degenerate",
            "mean depth",
            "counted",
            "speed-up",
        )
        table = Table(title=f"{task.name}, {task.shots}-shot, {task.samples} documents", title_justify="left")
        for name in head:
            table.add_column(name, justify="left" if name == "setting" else "right")
        for cell in found.cells:
            if cell.task != task.name:
                continue
            metric = cell.metrics[task.primary]
            table.add_row(
                cell.setting,
                f"{metric.value:.3f}",
                _shown(metric.delta, "+.3f"),
                _shown(cell.agreement),
                _shown(cell.rouge_l),
                _shown(cell.degenerate),
                _shown(cell.mean_depth),
                f"{cell.counted_reduction.value:.1%}",
                _shown(cell.speed_up, ".2f"),
            )
        console.print(table)
    console.print("Intervals: 95 %, bootstrap over documents. Counted: multiply-accumulates not spent, no speed-up.")
    console.print(f"Saved in {out}.", soft_wrap=True)


def _shown(value: Interval | None, form: str = ".3f") -> str:
    if value is None:
        return "–"
    if value.low is None or value.high is None:
        return format(value.value, form)
    return f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"
