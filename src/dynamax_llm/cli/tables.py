"""Tables and bars on a terminal, for all verbs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from dynamax_llm.evaluation.harness.results import Evaluation, Interval

#: Columns of a terminal from which on the intervals of an evaluation stand beside their means.
WIDE = 150


class Terminal(Console):
    """Prints text as it is: no markup, no emoji codes, no highlighting. BrokenPipeError where stdout is closed."""

    def __init__(self, **how: bool | None) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **how)  # type: ignore[arg-type]

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError

    def write_line(self, text: str = "", style: str | None = None) -> None:
        """A line that the terminal wraps, not this program: it stays one line in a pipe."""
        self.print(text, style=style, soft_wrap=True)

    def write_table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table whose first column is text and whose others are numbers; nothing where there are no rows."""
        table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, name in enumerate(columns):
            table.add_column(name, justify="right" if index else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        if table.rows:
            self.print(table)


class Bar:
    """Samples done, on stderr, where that is a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("evaluating", total=None)

    def show(self, what: str, done: int, total: int) -> None:
        """Set the bar's text and place."""
        self._progress.update(self._task, description=what, completed=done, total=total)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()


def ranged(value: Interval | None, wide: bool = True, form: str = ".3f") -> str:
    """A mean with its interval, if it has one and there is room."""
    if value is None:
        return "–"
    if not wide or value.low is None or value.high is None:
        return format(value.value, form)
    return f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"


def show_evaluation(found: Evaluation, out: Path) -> None:
    """One table per backbone and task: settings as rows, figures with their intervals where there is room."""
    terminal = Terminal()
    wide = terminal.width >= WIDE
    columns = ("setting", "score", "Δ", "agree", "ROUGE-L", "degen.", "depth", "counted", "speed-up")
    for backbone in found.backbones:
        for task in found.tasks:
            rows = [
                (
                    cell.setting,
                    f"{cell.metrics[task.primary].value:.3f}",
                    ranged(cell.metrics[task.primary].delta, wide, "+.3f"),
                    *(ranged(value, wide) for value in (cell.agreement, cell.rouge_l, cell.degenerate)),
                    ranged(cell.mean_depth, wide),
                    f"{cell.counted_reduction.value:.1%}",
                    ranged(cell.speed_up, wide, ".2f"),
                )
                for cell in found.cells
                if (cell.backbone, cell.task) == (backbone.name, task.name)
            ]
            title = f"{task.name} on {backbone.name}, {task.shots}-shot, {task.samples} documents"
            terminal.write_table(f"{title}; score: {task.primary}", columns, rows)
    intervals = "95 %, bootstrap over documents" if wide else f"{out / 'eval.json'}, or a report"
    terminal.write_line(
        f"Intervals: {intervals}. Depth: share of the layers. Counted: multiply-accumulates not spent, which is no "
        "speed-up."
    )
    terminal.write_line(f"Saved in {out}.")
