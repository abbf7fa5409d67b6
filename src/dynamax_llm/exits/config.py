"""What sits at the exits of one backbone: where they are, which head judges them, which readout speaks for them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction

from dynamax_llm.errors import ExitPlacementError, UsageError

#: The paper's four exits (arXiv 2504.20922), as shares of the depth.
PAPER_EXITS = ("1/2", "5/8", "3/4", "7/8")
#: Where states are exact, exits from a quarter of the depth save most; where they are not, thresholds keep the early
#: ones for the few tokens that can afford them (see ``Exits.drift_penalty``).
DEFAULT_EXITS = ("1/4", "3/8", "1/2", "5/8", "3/4", "7/8")
HEADS = ("linear", "mlp", "transformer", "mamba")
#: Inner widths at which heads cost about the same: 74 to 77 thousand parameters on the default inputs of a backbone of
#: width 192, less than 2 % of a 7B layer's multiply-accumulates. A linear head makes no use of one.
WIDTHS = {"linear": 64, "mlp": 96, "transformer": 66, "mamba": 80}
#: Stands for the width in ``WIDTHS``.
OWN_WIDTH = 0
READOUTS = ("head", "tail", "lens")
INPUTS = ("hidden", "signals", "tokens")
LABELS = ("action", "topk", "probability", "overlap")
#: ExitFeatures hold this many top probabilities, so that no fewer candidates make sense.
LEAST_CANDIDATES = 5
#: How candidates are found: "pairs", the two likeliest of each group of tokens (one pass, no sorting); "top", exactly.
SHORTLISTS = ("pairs", "top")


@dataclass(frozen=True)
class ExitConfig:
    """The exits of one backbone; everything but the learned weights.

    ``layers`` are depths: an exit at depth e sits after the e-th layer, counted from 1. ``head`` is None for exits
    that are judged by a confidence measure alone. ``width`` is the head's inner width (0: its kind's in ``WIDTHS``;
    None: a sixth of the backbone's, 16 to 64). ``candidates``: the first exit reads the whole vocabulary, later ones
    look only at so many likely tokens of it (0: every exit reads everything), found as ``shortlist`` says
    (``confidence.shortlist``). ``inputs`` are what a head sees: h, its readout's statistics, and the LM head's rows of
    the two tokens that lead there. ``label`` "action" is 1 iff this readout gives the full model's token; the others
    are described in ``traces/labels.py``. Raises UsageError for values that are not allowed.
    """

    layers: tuple[int, ...]
    n_layers: int
    head: str | None = "mlp"
    inputs: tuple[str, ...] = INPUTS
    width: int | None = OWN_WIDTH
    readout: str = "head"
    tail_layers: int = 1
    candidates: int = 256
    lens_rank: int = 16
    label: str = "action"
    label_k: int = 15
    shortlist: str = "pairs"

    def __post_init__(self) -> None:
        if self.width == OWN_WIDTH:
            object.__setattr__(self, "width", WIDTHS.get(self.head or "linear", OWN_WIDTH))
        checks = (
            ("head", self.head, (None, *HEADS)),
            ("readout", self.readout, READOUTS),
            ("label", self.label, LABELS),
            ("shortlist", self.shortlist, SHORTLISTS),
        )
        for name, value, allowed in checks:
            if value not in allowed:
                raise UsageError(f"unknown {name} {value!r}. Available: {', '.join(filter(None, allowed))}.")
        if not self.inputs or any(kind not in INPUTS for kind in self.inputs):
            raise UsageError(f"head inputs {self.inputs!r}: give one or more of {', '.join(INPUTS)}.")
        if self.candidates != 0 and self.candidates < LEAST_CANDIDATES:
            raise UsageError(
                f"candidates {self.candidates!r}: give at least {LEAST_CANDIDATES}, or 0 to read the whole "
                "vocabulary at every exit."
            )
        if self.readout == "tail" and not 1 <= self.tail_layers <= self.n_layers - max(self.layers):
            raise UsageError(
                f"tail of {self.tail_layers} layers: with the last exit at depth {max(self.layers)} of "
                f"{self.n_layers}, a tail may have 1 to {self.n_layers - max(self.layers)} layers."
            )

    def to_json(self) -> dict:
        """Plain JSON types, the inverse of ``from_json``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> ExitConfig:
        """Raises TypeError on unknown or missing keys; the artifact loader turns that into its own error.

        Exits saved before there was a choice of shortlist took the likeliest tokens exactly.
        """
        return cls(**{"shortlist": "top", **data, "layers": tuple(data["layers"]), "inputs": tuple(data["inputs"])})


def place_exits(spec: str | tuple[str | int | float, ...], n_layers: int) -> tuple[int, ...]:
    """Exit depths from layers (``"8,10"``) or fractions of the depth (``"1/2,0.75"``), sorted, within 1..L-1.

    A fraction is rounded to the nearest layer; in a shallow model fractions that meet on one layer are one exit.
    Raises ExitPlacementError for anything else, and for a layer named twice.
    """
    items = [item.strip() for item in spec.split(",")] if isinstance(spec, str) else [str(item) for item in spec]
    depths: dict[int, str] = {}
    for item in items:
        try:
            value = Fraction(item)
        except (ValueError, ZeroDivisionError):
            raise ExitPlacementError(
                f"exit {item!r} is neither a layer nor a fraction. "
                "Write layers (8,12) or shares of the depth (1/2,0.75)."
            ) from None
        is_share = _is_share(item)
        depth = round(value * n_layers) if is_share else int(value)
        if not 1 <= depth < n_layers:
            raise ExitPlacementError(
                f"exit {item!r} lies at depth {depth}; this backbone has {n_layers} layers, so exits may sit "
                f"after layers 1 to {n_layers - 1}."
            )
        if depth in depths and not (is_share and _is_share(depths[depth])):
            raise ExitPlacementError(
                f"exits {depths[depth]!r} and {item!r} both lie after layer {depth}: name each layer once."
            )
        depths[depth] = item
    return tuple(sorted(depths))


def _is_share(item: str) -> bool:
    """Whether an exit is written as a share of the depth rather than as a layer."""
    return "/" in item or "." in item
