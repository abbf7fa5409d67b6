"""The configuration of the exits of one backbone: where they are, which head and which readout they have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from dynamax_llm.errors import ExitPlacementError, UsageError
from dynamax_llm.exits.registries import HEADS, READOUTS

#: The paper's four exits (arXiv 2504.20922), as shares of the depth.
PAPER_EXITS = ("1/2", "5/8", "3/4", "7/8")
#: Where states are exact, exits from a quarter of the depth save most; where they are not, thresholds keep the early
#: ones for the few tokens that can afford them (see ``Exits.drift_penalty``).
DEFAULT_EXITS = ("1/4", "3/8", "1/2", "5/8", "3/4", "7/8")
#: Stands for the head kind's own width (``Bank.default_width``).
OWN_WIDTH = 0
INPUTS = ("hidden", "statistics", "tokens")
#: ExitFeatures hold this many top probabilities, so that fewer candidates make no sense.
LEAST_CANDIDATES = 5
#: How candidates are found: "pairs", the two likeliest of each group of tokens (one pass, no sorting); "top", exactly.
SHORTLISTS = ("pairs", "top")


@dataclass(frozen=True)
class ReadoutOptions:
    """The options of a readout kind: none here; a kind with options has a frozen dataclass of its own."""

    tail_layers = 0

    def check(self, layers: Sequence[int], n_layers: int) -> None:
        """Raise UsageError unless the options fit exits after ``layers`` of ``n_layers``."""


@dataclass(frozen=True)
class ExitConfig:
    """The exits of one backbone; everything but the learned weights.

    ``layers`` are depths: an exit at depth e sits after the e-th layer, counted from 1. ``head`` is a kind of
    ``HEADS``, None for exits that have a confidence measure alone. ``width`` is the head's inner width (0: its kind's
    ``default_width``; None: a sixth of the backbone's, 16 to 64). ``readout`` is a kind of ``READOUTS`` and
    ``readout_options`` an object of its ``Options``. ``candidates``: the first exit reads the whole vocabulary, later
    ones only this many likely tokens of it (0: every exit reads everything), found as ``shortlist`` says
    (``features.shortlist``). ``inputs`` are what a head reads: h, statistics of the logits, and the LM head's rows of
    the two leading tokens. Raises UsageError for values that are not allowed.
    """

    layers: tuple[int, ...]
    n_layers: int
    head: str | None = "mlp"
    inputs: tuple[str, ...] = INPUTS
    width: int | None = OWN_WIDTH
    readout: str = "head"
    readout_options: ReadoutOptions = ReadoutOptions()
    candidates: int = 256
    shortlist: str = "pairs"

    def __post_init__(self) -> None:
        bank = None if self.head is None else HEADS.lookup(self.head)
        kind = READOUTS.lookup(self.readout)
        if self.shortlist not in SHORTLISTS:
            raise UsageError(f"unknown shortlist {self.shortlist!r}. Available: {', '.join(SHORTLISTS)}.")
        if type(self.readout_options) is ReadoutOptions:  # nothing was chosen
            object.__setattr__(self, "readout_options", kind.Options())
        if type(self.readout_options) is not kind.Options:
            raise UsageError(
                f"readout_options {self.readout_options!r}: the readout {self.readout!r} takes "
                f"{kind.Options.__name__}. Give those, or leave readout_options out."
            )
        if self.width == OWN_WIDTH:
            object.__setattr__(self, "width", None if bank is None else bank.default_width)
        # Until format version 1 the statistics were called "signals".
        inputs = tuple("statistics" if name == "signals" else name for name in self.inputs)
        object.__setattr__(self, "inputs", inputs)
        if not inputs or any(name not in INPUTS for name in inputs):
            raise UsageError(f"head inputs {self.inputs!r}: give one or more of {', '.join(INPUTS)}.")
        if self.candidates != 0 and self.candidates < LEAST_CANDIDATES:
            raise UsageError(
                f"candidates {self.candidates!r}: give at least {LEAST_CANDIDATES}, or 0 to read the whole "
                "vocabulary at every exit."
            )
        if kind.drafts and bank is not None and bank.recurrent:
            plain = [repr(name) for name, each in HEADS.items() if not each.recurrent]
            raise UsageError(
                f"head {self.head!r} with the readout {self.readout!r}: its chains are no sequence for a head with a "
                f"memory. Use {' or '.join(plain)}."
            )
        self.readout_options.check(self.layers, self.n_layers)

    @property
    def tail_layers(self) -> int:
        """Layers that run between leaving an exit and its logits."""
        return self.readout_options.tail_layers

    @classmethod
    def from_options(cls, layers: Sequence[int], n_layers: int, **options: Any) -> ExitConfig:
        """From flat options, as presets and the command line have them: fields of this class, of any readout kind's
        ``Options`` (only those of the kind that is used count). Raises TypeError for unknown options, UsageError for
        values that are not allowed."""
        kind = READOUTS.lookup(options.get("readout", cls.readout))
        if kind.drafts:  # one exit, before the first layer
            layers, options = (0,), {**options, "candidates": 0}
        names = {field.name for each in READOUTS.values() for field in fields(each.Options)}
        given = {name: options.pop(name) for name in names & options.keys()}
        own = {field.name for field in fields(kind.Options)}
        return cls(
            tuple(layers),
            n_layers,
            readout_options=kind.Options(**{name: value for name, value in given.items() if name in own}),
            **options,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, the inverse of ``from_json``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ExitConfig:
        """Raises TypeError, KeyError or UsageError; the artifact loader turns that into its own error.

        Format version 1 had flat options, the labels of training among them. Exits saved before there was a choice of
        shortlist took the likeliest tokens exactly.
        """
        values = {"shortlist": "top", **data, "layers": tuple(data["layers"]), "inputs": tuple(data["inputs"])}
        if "readout_options" not in values:
            values = {name: value for name, value in values.items() if name not in ("label", "label_k")}
            return cls.from_options(**values)
        values["readout_options"] = READOUTS.lookup(values["readout"]).Options(**values["readout_options"])
        return cls(**values)


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
