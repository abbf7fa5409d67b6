"""matplotlib for the page and for papers: every figure is drawn by one function, with two sets of colours.

Inside the page a figure's colours are CSS variables, so it follows light and dark, and its text stays text.
"""

from __future__ import annotations

import html
import io
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamax_llm.errors import UsageError
from dynamax_llm.exits.files import write_atomically
from dynamax_llm.report.palette import LIGHT, SENTINELS, Palette

#: Dots per inch of PNG files.
RESOLUTION = 220
STYLE = Path(__file__).with_name("report.mplstyle")
#: The palette's role of every coloured part of matplotlib's style.
_ROLES = {
    "text.color": "ink",
    "axes.edgecolor": "line",
    "axes.labelcolor": "muted",
    "axes.titlecolor": "ink",
    "grid.color": "grid",
    "xtick.color": "muted",
    "ytick.color": "muted",
}


@dataclass(frozen=True)
class Plot:
    """A figure to be drawn: file name, size in inches, a sentence for readers who cannot see it, and how to draw it.

    ``draw(figure, palette)`` puts everything on an empty matplotlib figure.
    """

    name: str
    size: tuple[float, float]
    description: str
    draw: Callable[[Any, Palette], None]


def inline(plot: Plot) -> str:
    """The figure as SVG for the page: transparent, responsive, coloured by variables, with ids of its own."""
    drawn = _rendered(plot, SENTINELS, "svg").decode()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->|<style type=\"text/css\">.*?</style>", "", drawn, flags=re.DOTALL
    )
    drawn = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", drawn)  # groups; only hashed ids are referred to
    drawn = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", drawn)
    drawn = re.sub(r"<[^>]+>", lambda element: _rounded(element[0]), drawn)  # coordinates only: text keeps its digits
    drawn = re.sub(r"\n\s*", "\n", drawn)
    for role, value in SENTINELS.items():
        drawn = drawn.replace(value, f"var(--{role})")
    width, height = (72 * side for side in plot.size)
    name = html.escape(plot.description)
    opened = f'<svg role="img" aria-label="{name}" viewBox="0 0 {width:g} {height:g}" class="plot">'
    return re.sub(r"<svg .*?>", lambda _: opened, drawn, count=1, flags=re.DOTALL)


def files(plot: Plot) -> dict[str, bytes]:
    """The figure for papers, by file name: SVG with text as text, and PNG; both on white."""
    return {f"{plot.name}.{kind}": _rendered(plot, LIGHT, kind) for kind in ("svg", "png")}


def _rendered(plot: Plot, palette: Palette, kind: str) -> bytes:
    matplotlib, figure_class = _matplotlib()
    style: dict[str, Any] = {name: palette[role] for name, role in _ROLES.items()}
    style["svg.hashsalt"] = plot.name
    buffer = io.BytesIO()
    with matplotlib.rc_context(style, fname=STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's fonts may have what this one lacks
        figure = figure_class(figsize=plot.size)
        plot.draw(figure, palette)
        for axes in figure.axes:
            axes.set_facecolor("none")
        ground: dict[str, Any] = {"transparent": True} if palette is SENTINELS else {"facecolor": "#ffffff"}
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, dpi=RESOLUTION if kind == "png" else 72, metadata=metadata, **ground)
    return buffer.getvalue()


def _matplotlib() -> tuple[Any, Any]:
    """The library and its Figure. Raises UsageError if it is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "a report needs matplotlib for its figures, which is not installed. Run: pip install 'dynamax-llm[eval]'"
        ) from None
    return matplotlib, Figure


def heading(figure: Any, palette: Palette, text: str) -> None:
    """A figure's title, at its upper left."""
    height = 1 - 0.24 / figure.get_figheight()
    figure.text(0.02, height, text, color=palette["ink"], fontsize=10.5, weight="bold")


def clean(text: str, length: int = 60) -> str:
    """Text from data for a figure: one line, no control characters, at most ``length`` characters."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def check_target(out: str | Path, document: str) -> Path:
    """The .json file that ``out``, a folder (then ``document`` in it) or that file, stands for.

    Raises UsageError, OSError if it cannot be written.
    """
    given = Path(out).expanduser()
    path = given if given.suffix == ".json" and not given.is_dir() else given / document
    folder = check_writable(path.parent)
    if folder is not None:
        raise UsageError(f"--out {str(out)!r}: {str(folder)!r} is a file. Give a folder, or a file that ends in .json.")
    return path


def check_writable(folder: Path) -> Path | None:
    """Check that a folder exists or can be made. Returns the file that is in the way, if any; raises OSError."""
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        return folder
    with tempfile.TemporaryFile(dir=folder):
        return None


def save_with_plot(document: Any, path: Path, plot: Plot | None) -> list[Path]:
    """Write the document and, where matplotlib is installed, its plot as SVG and PNG; returns what was written.

    Raises ArtifactError if a file cannot be written.
    """
    try:
        drawn = files(plot) if plot else {}
    except UsageError:  # without matplotlib the document is still worth keeping
        drawn = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    document.save(path)
    for name, content in drawn.items():
        write_atomically(path.with_name(name), content)
    return [path, *(path.with_name(name) for name in drawn)]


def _rounded(element: str) -> str:
    return re.sub(r"-?\d+\.\d{3,}", lambda digits: f"{float(digits[0]):.2f}", element)
