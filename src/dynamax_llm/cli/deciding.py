"""What decides where a token leaves: saved exits or places for a measure, and thresholds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamax_llm.decoding.thresholds import Thresholds
from dynamax_llm.errors import UsageError
from dynamax_llm.exits.config import DEFAULT_EXITS, place_exits
from dynamax_llm.settings import DecodeSettings

if TYPE_CHECKING:
    from dynamax_llm.backbones import Backbone
    from dynamax_llm.decoding import EarlyExit
    from dynamax_llm.exits.artifact import Exits

#: Layers or shares of the depth.
_PLACES = re.compile(r"[\d./, ]+")
#: Policies under which tokens wait.
_WINDOWED = ("defer", "verify")

ExitsFolder = Annotated[
    str | None,
    typer.Option(
        "--exits",
        help="The folder that dynamax train wrote, a hub id, or a shipped backbone's name. Default: what ships with a "
        "shipped backbone.",
        metavar="DIR",
    ),
]
MeasureLayers = Annotated[
    str | None,
    typer.Option(
        "--exit-layers",
        help="Instead of --exits, with --measure: layers (8,12) or shares of the depth (1/2,3/4). "
        f"Default: {','.join(DEFAULT_EXITS)}.",
        metavar="LAYERS",
    ),
]


def check_exits(exits: str | None, exit_layers: str | None, measure: object) -> None:
    """Raise UsageError for layers where a folder belongs, both at once, or layers without a measure."""
    if exits is not None and _PLACES.fullmatch(exits) and not Path(exits).is_dir():
        raise UsageError(
            f"exits {exits!r}: --exits takes a folder. For layers give --exit-layers {exits} with --measure NAME."
        )
    if exits is not None and exit_layers is not None:
        raise UsageError("give either --exits DIR or --exit-layers with --measure, and not both.")
    if exit_layers is not None and not measure:
        raise UsageError(
            f"exit layers {exit_layers!r} have no trained head: layers need --measure NAME (softmax_margin, say)."
        )


def saved_exits(model: str, exits: str | None, exit_layers: str | None, measure: object) -> Exits | None:
    """The exits in a folder, or those that ship with the backbone; None where a measure decides at layers.

    Raises UsageError where there are neither exits nor a measure.
    """
    from dynamax_llm.backbones.loading import shipped_exits
    from dynamax_llm.exits.artifact import Exits

    if exits is not None:
        return Exits.from_pretrained(exits)
    if exit_layers is None and shipped_exits(model) is not None:
        return Exits.from_pretrained(model)
    if not measure:
        raise UsageError(
            f"no trained exits for {model!r}. Give --exits DIR, the folder that dynamax train wrote, "
            "or --measure NAME (softmax_margin, say) to decide without training."
        )
    return None


def decode_options(given: Mapping[str, Any], exits: str | None = None) -> dict[str, Any]:
    """EarlyExit's arguments for the options given; thresholds are checked. Raises UsageError.

    With a folder of ``exits`` it depends on them whether a window has an effect: no note is printed here.
    """
    options = dict(given)
    if "threshold" in options:
        parts = [item.strip() for item in str(options["threshold"]).split(",")]
        Thresholds.parse(parts, len(parts))
        options["threshold"] = parts[0] if len(parts) == 1 else parts
    if exits is None:
        note_unused_window(options)
    return options


def note_unused_window(given: Mapping[str, Any]) -> None:
    """Print a note where a window was given that the policy does not use."""
    policy = given.get("policy", DecodeSettings.policy)
    if "window" in given and "promise" not in given and policy not in _WINDOWED:
        typer.echo(f"note: --window has no effect under --policy {policy}; it is for defer and verify.", err=True)


def note_closed(early_exit: EarlyExit, options: Mapping[str, Any]) -> None:
    """Print a note where no exit can fire, though exits were wanted; a draft's choice says so itself."""
    closed = not early_exit.drafting.threshold and not early_exit.thresholds.active
    if closed and options.get("threshold") != "never":
        typer.echo("note: no exit can fire at this threshold: every token runs all layers.", err=True)


def at_layers(backbone: Backbone, exit_layers: str | None, options: Mapping[str, Any]) -> EarlyExit:
    """Decoding with a measure at layers. Thresholds belong to the layers in the order in which both were given."""
    from dynamax_llm.decoding import EarlyExit
    from dynamax_llm.exits.artifact import Exits

    options = dict(options)
    places: tuple[str, ...] = DEFAULT_EXITS
    if exit_layers is not None:
        places = tuple(item.strip() for item in exit_layers.split(","))
    thresholds = options.get("threshold")
    if isinstance(thresholds, list) and len(thresholds) == len(places):
        order = sorted(range(len(places)), key=lambda index: place_exits(places[index], backbone.n_layers))
        options["threshold"] = [thresholds[index] for index in order]
    return EarlyExit(Exits.untrained(backbone, places), **options)
