"""matplotlib for the page and for paper: one drawing, two sets of colours.

Inside the page a figure's colours become CSS variables, so it follows light and dark; its text stays text.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dynamax_llm.errors import UsageError
from dynamax_llm.report.markup import Markup
from dynamax_llm.report.palette import LIGHT, SENTINELS, Palette

#: Dots per inch of PNG files.
RESOLUTION = 220

_STYLE = {
    "svg.fonttype": "none",  # text as text
    "text.parse_math": False,  # a $ in a task's name is a $
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.linewidth": 0.7,
    "lines.solid_capstyle": "round",
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Plot:
    """A figure to be drawn: file name, size in inches, what it shows in one sentence, and who draws it.

    ``draw(figure, palette)`` puts everything on an empty matplotlib figure.
    """

    name: str
    size: tuple[float, float]
    says: str
    draw: Callable[[Any, Palette], None]


def inline(plot: Plot) -> Markup:
    """The figure as SVG for the page: transparent, responsive, coloured by variables, ids its own."""
    drawn = _rendered(plot, SENTINELS, "svg").decode()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->|<style type=\"text/css\">.*?</style>", "", drawn, flags=re.DOTALL
    )
    drawn = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", drawn)  # groups; only hashed ids are referred to
    drawn = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", drawn)
    drawn = re.sub(r"<[^>]+>", lambda found: _rounded(found[0]), drawn)  # coordinates only: text keeps its digits
    drawn = re.sub(r"\n\s*", "\n", drawn)
    for role, value in SENTINELS.items():
        drawn = drawn.replace(value, f"var(--{role})")
    width, height = (72 * side for side in plot.size)
    opened = f'<svg role="img" aria-label="{_quoted(plot.says)}" viewBox="0 0 {width:g} {height:g}" class="plot"'
    return Markup(re.sub(r"<svg .*?>", lambda _: f"{opened}>", drawn, count=1, flags=re.DOTALL))


def files(plot: Plot) -> dict[str, bytes]:
    """The figure for papers, by file name: SVG with text as text, and PNG; both on white."""
    return {f"{plot.name}.{kind}": _rendered(plot, LIGHT, kind) for kind in ("svg", "png")}


def _rendered(plot: Plot, palette: Palette, kind: str) -> bytes:
    matplotlib, figure_class = _matplotlib()
    colours = {
        "text.color": palette["ink"],
        "axes.edgecolor": palette["line"],
        "axes.labelcolor": palette["muted"],
        "axes.titlecolor": palette["ink"],
        "grid.color": palette["grid"],
        "xtick.color": palette["muted"],
        "ytick.color": palette["muted"],
        "svg.hashsalt": plot.name,
    }
    buffer = io.BytesIO()
    with matplotlib.rc_context({**_STYLE, **colours}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's fonts may have what this one lacks
        figure = figure_class(figsize=plot.size)
        plot.draw(figure, palette)
        for axes in figure.axes:
            axes.set_facecolor("none")
        ground: dict[str, Any] = {"transparent": True} if palette is SENTINELS else {"facecolor": "#ffffff"}
        about = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, dpi=RESOLUTION if kind == "png" else 72, metadata=about, **ground)
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


def clean(text: str, length: int = 60) -> str:
    """Text from data for a figure: one line, no control characters, not too long."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def _rounded(element: str) -> str:
    return re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", element)


def _quoted(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
