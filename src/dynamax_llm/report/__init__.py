"""One self-contained HTML page of one or more evaluations, and its figures for papers.

combine    several documents as one            verdict    what they come to
page       the sections                        canvas     a figure for the page and for paper
fronts     quality against cost                depths     histograms, reliability, evidence
tables, texts, promises, words                 markup, numbers, palette, select: what all of them use
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from dynamax_llm.errors import UsageError
from dynamax_llm.evaluation.harness.results import Evaluation
from dynamax_llm.exits.files import write_atomically
from dynamax_llm.report.canvas import Plot, files
from dynamax_llm.report.combine import combine
from dynamax_llm.report.page import page

__all__ = ["combine", "write_report"]

SUFFIXES = (".html", ".htm")


def write_report(evaluations: Sequence[Evaluation], out: str | Path, figures: str | Path | None = None) -> list[Path]:
    """Write the page to ``out`` and, if ``figures`` names a folder, every plot there as SVG and PNG. Returns the paths.

    The same evaluations give the same bytes. Everything is made before anything is written.
    Raises UsageError if the evaluations contradict each other, ``out`` is no .html path, or matplotlib is missing;
    DataError if they speak of what they do not describe; ArtifactError if a file cannot be written.
    """
    target, folder = check_targets(out, figures)
    plots: list[Plot] = []
    text = page(combine(evaluations), plots.append)
    named = {name: content for plot in plots for name, content in files(plot).items()} if folder else {}
    target.parent.mkdir(parents=True, exist_ok=True)
    written = []
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in named.items():
            write_atomically(folder / name, content)
            written.append(folder / name)
    write_atomically(target, text.encode("utf-8", "replace"))
    return [target, *written]


def check_targets(out: str | Path, figures: str | Path | None = None) -> tuple[Path, Path | None]:
    """Where page and figures will go, known to be possible. Raises UsageError, OSError if a folder is not writable."""
    target = Path(out).expanduser()
    if target.is_dir():
        raise UsageError(f"`out` {str(out)!r} is a folder. Give the file to write, such as {target / 'report.html'}.")
    if target.suffix.lower() not in SUFFIXES:
        raise UsageError(f"`out` {str(out)!r} does not end in .html. Give a name such as report.html.")
    folder = Path(figures).expanduser() if figures is not None else None
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UsageError(f"`figures` {str(figures)!r} is a file. Give a folder, new or existing.")
    for place in (target.parent, folder):
        while place is not None and not place.exists():
            place = place.parent
        if place is not None and not place.is_dir():
            raise UsageError(f"{str(place)!r} is a file, so nothing can be written below it. Give another place.")
        if place is not None:
            with tempfile.TemporaryFile(dir=place):
                pass
    return target, folder
