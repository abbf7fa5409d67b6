"""One self-contained HTML page of one or more evaluations, and its figures for papers.

page       the page, from ``page.html.j2``        verdict    what an evaluation comes to
figures    what is drawn                          plots      how it is drawn, for the page and for paper
select     which parts belong together            promises   a promise in words
benched, scanned   figures and files of the other documents
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynamax_llm.errors import UsageError
from dynamax_llm.evaluation.harness.combine import combine
from dynamax_llm.evaluation.harness.results import Evaluation
from dynamax_llm.exits.files import write_atomically
from dynamax_llm.report.page import page
from dynamax_llm.report.plots import Plot, check_writable, files

__all__ = ["combine", "write_report"]

SUFFIXES = (".html", ".htm")


def write_report(evaluations: Sequence[Evaluation], out: str | Path, figures: str | Path | None = None) -> list[Path]:
    """Write the page to ``out`` and, if ``figures`` names a folder, every plot there as SVG and PNG. Returns the paths.

    The same evaluations give the same bytes. Everything is made before anything is written.
    Raises UsageError if the evaluations contradict each other, ``out`` is not an .html path, or matplotlib is missing;
    DataError if a result refers to something that no evaluation describes; ArtifactError if a file cannot be written.
    """
    target, folder = check_targets(out, figures)
    plots: list[Plot] = []
    contents = {target: page(combine(evaluations), plots.append).encode("utf-8", "replace")}
    if folder:
        contents |= {folder / name: content for plot in plots for name, content in files(plot).items()}
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    return list(contents)


def check_targets(out: str | Path, figures: str | Path | None = None) -> tuple[Path, Path | None]:
    """The paths of page and figures, if they can be written. Raises UsageError, OSError if a folder is not writable."""
    target = Path(out).expanduser()
    if target.is_dir():
        raise UsageError(f"`out` {str(out)!r} is a folder. Give the file to write, such as {target / 'report.html'}.")
    if target.suffix.lower() not in SUFFIXES:
        raise UsageError(f"`out` {str(out)!r} does not end in .html. Give a name such as report.html.")
    folder = Path(figures).expanduser() if figures is not None else None
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UsageError(f"`figures` {str(figures)!r} is a file. Give a folder, new or existing.")
    for place in (target.parent, *([folder] if folder else [])):
        file = check_writable(place)
        if file is not None:
            raise UsageError(f"{str(file)!r} is a file, so nothing can be written below it. Give another place.")
    return target, folder
