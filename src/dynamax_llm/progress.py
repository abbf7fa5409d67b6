"""Progress of long work on stderr: a bar on a terminal, a line now and then in a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

#: Seconds between two updates of the bar, whose figures wait for the device; and between two lines in a pipe.
PAUSE, LINE_PAUSE = 0.5, 30.0

#: Called with the steps done and all steps of a stage; the last number may be an upper bound.
Advance = Callable[[int, int], None]


def unwatched(done: int, total: int) -> None:
    """An ``Advance`` that shows nothing."""


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:,.0f} / {task.total:,.0f}")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        if unit is None:
            return Text()
        speed = task.finished_speed or task.speed
        return Text(f"– {unit}/s" if speed is None else f"{speed:,.0f} {unit}/s")


class Stages:
    """Stages of long work one after another, each with a bar of its own; nothing at all if ``quiet`` is set."""

    def __init__(self, quiet: bool) -> None:
        self._console, self._quiet = Console(stderr=True, highlight=False, markup=False), quiet
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            _Count(),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._stage: TaskID | None = None

    def stage(self, name: str) -> Advance:
        """Begin work such as a measurement; what is returned moves its bar. In a pipe: a line now, and one whenever a
        pause is over."""
        self._end_stage()
        self._stage = task = self._progress.add_task(name, total=None, note="", unit=None)
        lines = self._progress.disable and not self._quiet
        if lines:
            self._line(f"{name} …")
        last = time.monotonic()

        def advance(done: int, total: int) -> None:
            nonlocal last
            self._progress.update(task, completed=done, total=total)
            if lines and time.monotonic() - last >= LINE_PAUSE:
                last = time.monotonic()
                self._line(f"{name}: {done:,} of {total:,}")

        return advance

    def _end_stage(self) -> None:
        """Fill the bar of the stage that has ended: a search may end before its last step."""
        if self._stage is not None:
            steps = self._progress.tasks[self._progress.task_ids.index(self._stage)].total or 1
            self._progress.update(self._stage, completed=steps, total=steps)

    def _line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        if error is None:
            self._end_stage()
        self._progress.stop()


class TokenBar(Stages):
    """Tokens (or another unit), their rate, time left and the latest figures, and stages before or after them."""

    def __init__(self, total: int, done: int, quiet: bool, title: str = "training", unit: str = "tokens") -> None:
        super().__init__(quiet)
        self._total, self._unit = total, unit
        self._updated = 0.0 if self._console.is_terminal else time.monotonic()
        self._task = self._progress.add_task(title, total=total, completed=done, note="", unit=unit)

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
