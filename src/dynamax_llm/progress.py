"""Progress of long work on stderr: a bar on a terminal, a line now and then in a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

#: Seconds between two updates of the bar, whose figures wait for the device; and between two lines in a pipe.
PAUSE, LINE_PAUSE = 0.5, 30.0


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"– {self._unit}/s" if speed is None else f"{speed:,.0f} {self._unit}/s")


class TokenBar:
    """Tokens (or another unit), their rate, time left and the latest figures; nothing at all if ``quiet`` is set."""

    def __init__(self, total: int, done: int, quiet: bool, title: str = "training", unit: str = "tokens") -> None:
        self._console, self._quiet, self._total = Console(stderr=True, highlight=False, markup=False), quiet, total
        self._unit = unit
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} / {task.total:,.0f}"),
            _Rate(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._updated = 0.0 if self._console.is_terminal else time.monotonic()
        self._task = self._progress.add_task(title, total=total, completed=done, note="")

    def show(self, tokens: int, note: Callable[[], tuple[str, str]]) -> None:
        """Move to ``tokens`` done, at most once in a pause: ``note`` makes phase and figures, and costs time."""
        now = time.monotonic()
        if self._quiet or now - self._updated < (LINE_PAUSE if self._progress.disable else PAUSE):
            return
        self._updated = now
        phase, figures = note()
        self._progress.update(self._task, completed=tokens, total=self._total, description=phase, note=figures)
        if self._progress.disable:
            self._line(f"{phase}: {tokens:,} of {self._total:,} {self._unit}; {figures}")

    def stage(self, name: str) -> None:
        """Begin work of unknown length before or after the tokens, such as a measurement."""
        self._progress.update(self._task, description=name, total=None, note="")
        if self._progress.disable and not self._quiet:
            self._line(f"{name} …")

    def _line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def __enter__(self) -> TokenBar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
