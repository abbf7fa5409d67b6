"""Colours by role, for the light page, the dark page and paper.

Categories follow Okabe and Ito (2008), darkened on the light page and lightened on the dark one until text in them
has a contrast of 4.5 to its ground; depths follow ``render.colour``, as on the terminal.
"""

from __future__ import annotations

from collections.abc import Mapping

from dynamax_llm.render import colour

#: Steps of the depth scale, from the first exit to the last layer.
DEPTHS = 9
#: Roles of settings worth looking at, in the order in which they are given out; then those of baselines.
CATEGORIES = ("c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7")
BASELINES = ("b0", "b1")
#: Markers of lines by role, so that colour is not all that tells them apart.
MARKERS = dict(zip((*CATEGORIES, *BASELINES), "os^DvPXpos", strict=True))
#: Families known by name keep their colour from report to report.
KNOWN = {"mamba": "c0", "transformer": "c1", "linear": "c2", "mlp": "c3", "softmax_margin": "c4"}

Palette = Mapping[str, str]

_LIGHT = {
    "page": "#faf9f6", "surface": "#ffffff", "ink": "#1d1c1a", "muted": "#5f5b54", "line": "#dcd8cf",
    "grid": "#ebe8e1", "accent": "#9c3d0c", "good": "#00694a", "bad": "#a8321a",
    "c0": "#b4470a", "c1": "#0a62a3", "c2": "#00724f", "c3": "#983a72", "c4": "#7a5c00", "c5": "#1a6f85",
    "c6": "#7a4bb0", "c7": "#6d5a3c", "b0": "#6f6b66", "b1": "#6f6b66",
}  # fmt: skip
_DARK = {
    "page": "#14161a", "surface": "#1a1d22", "ink": "#e9e6e0", "muted": "#a9a59d", "line": "#363b44",
    "grid": "#272b32", "accent": "#f0a070", "good": "#4fd0a5", "bad": "#ff9580",
    "c0": "#f39355", "c1": "#6cb8f2", "c2": "#4fd0a5", "c3": "#e69ac6", "c4": "#e3b93c", "c5": "#7ccfe0",
    "c6": "#bb9cf0", "c7": "#cdb994", "b0": "#9b978f", "b1": "#9b978f",
}  # fmt: skip


def _with_depths(base: dict[str, str], share: float) -> Palette:
    """The depths themselves (``d0`` …) and, for text to stand on, mixed into the surface (``t0`` …)."""
    steps = [colour(step / (DEPTHS - 1)) for step in range(DEPTHS)]
    tints = {f"t{step}": mixed(value, base["surface"], share) for step, value in enumerate(steps)}
    return base | {f"d{step}": value for step, value in enumerate(steps)} | tints


def mixed(one: str, other: str, share: float) -> str:
    """``share`` of one ``#rrggbb`` colour in another."""
    pairs = ((int(one[at : at + 2], 16), int(other[at : at + 2], 16)) for at in (1, 3, 5))
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)


LIGHT, DARK = _with_depths(_LIGHT, 0.30), _with_depths(_DARK, 0.42)
#: What figures inside the page are drawn with: one colour per role that nothing else has, replaced by its variable.
SENTINELS: Palette = {role: f"#f0e1{index:02x}" for index, role in enumerate(LIGHT)}


def variables(palette: Palette) -> str:
    """CSS custom properties of a palette."""
    return "".join(f"--{role}:{value};" for role, value in palette.items())


def step(depth: float, first: float, last: float) -> int:
    """The step of the depth scale for ``depth`` layers, where the scale spans ``first`` to ``last``."""
    return round(min(max((depth - first) / max(last - first, 1), 0.0), 1.0) * (DEPTHS - 1))
