"""The progress bar of a training run: tokens, tokens per second, time left, and how it is going."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

#: Seconds between two looks at the figures, which wait for the device.
PAUSE = 0.5


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("– tokens/s" if speed is None else f"{speed:,.0f} tokens/s")


class TokenBar:
    """A bar on stderr, silent where stderr is no terminal or ``quiet`` is set."""

    def __init__(self, total: int, done: int, quiet: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} / {task.total:,.0f}"),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._shown = 0.0
        self._task = self._progress.add_task("starting", total=total, completed=done, note="")

    def show(self, tokens: int, note: Callable[[], tuple[str, str]]) -> None:
        """Move to ``tokens`` tokens done, at most once in PAUSE: ``note`` makes phase and figures, and costs time."""
        now = time.monotonic()
        if self._progress.disable or now - self._shown < PAUSE:
            return
        self._shown = now
        phase, figures = note()
        self._progress.update(self._task, completed=tokens, description=phase, note=figures)

    def __enter__(self) -> TokenBar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
