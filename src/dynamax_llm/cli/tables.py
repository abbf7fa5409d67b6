"""Tables and bars on a terminal, for all verbs."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class Terminal(Console):
    """Prints text as it is: no markup, no emoji codes, no highlighting. Raises BrokenPipeError if nobody reads."""

    def __init__(self, **how: bool | None) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **how)  # type: ignore[arg-type]

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError

    def write_line(self, text: str = "", style: str | None = None) -> None:
        """A line that the terminal wraps, not this program: it stays one line in a pipe."""
        self.print(text, style=style, soft_wrap=True)


def table(title: str, *columns: str, left: tuple[int, ...] = (0,)) -> Table:
    """An empty table; columns are numbers but for those in ``left``."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index in left else "right", overflow="fold")
    return made


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
