"""What decides where a token leaves, as options of a verb."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynamax_llm.errors import UsageError

if TYPE_CHECKING:
    from dynamax_llm.decoding import EarlyExit
    from dynamax_llm.exits.artifact import Exits

#: What --exits may hold instead of a folder: layers or shares of the depth.
_PLACES = re.compile(r"[\d./, ]+")

ExitsAt = Annotated[
    str | None,
    typer.Option(
        "--exits",
        help="The folder that dynamax train wrote (or a hub id); with --measure also layers (8,12) or shares "
        "(1/2,3/4). Default: what ships with a shipped backbone, else 1/2,5/8,3/4,7/8.",
        metavar="DIR|LAYERS",
    ),
]
Measure = Annotated[
    str | None,
    typer.Option(
        help="Judge by softmax_max, softmax_margin, entropy or state_similarity, not by a head.", metavar="NAME"
    ),
]
Threshold = Annotated[
    str | None,
    typer.Option(
        help="Least confidence to leave with: one value, one per exit (0.8,0.9,…), or never. Default: 0.9.",
        metavar="SHARE",
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(
        help="State of skipped layers: propagate (default), copy (attention), stale (Mamba); defer: exact state; "
        "verify: exact state and the full model's own text.",
        metavar="NAME",
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        min=1, help="Tokens that may wait (defer) or be drafted (verify) before layers catch up. Default: 16."
    ),
]
Promised = Annotated[
    str | None,
    typer.Option(
        "--promise",
        help="A promise that dynamax calibrate recorded with the exits (agreement>=0.98); it decides threshold, "
        "policy, window and judge.",
        metavar="TEXT",
    ),
]
Schedule = Annotated[str, typer.Option(help="fixed, or CALM's decaying threshold.")]


@dataclass(frozen=True)
class Rule:
    """The options' values, until there are exits to apply them to."""

    threshold: str | None
    policy: str | None
    window: int | None
    measure: str | None
    schedule: str
    promise: str | None = None

    def apply(self, exits: Exits) -> EarlyExit:
        """The decoding these options ask for. Raises UsageError."""
        from dynamax_llm.decoding import EarlyExit

        return EarlyExit(
            exits,
            threshold=None if self.threshold is None else _threshold(self.threshold),
            policy=self.policy,
            window=self.window,
            measure=self.measure,
            schedule=self.schedule,
            promise=self.promise,
        )


def _threshold(text: str) -> str | list[str]:
    """One value, or one per exit; what is allowed is the decoding room's business."""
    items = [item.strip() for item in text.split(",")]
    return items[0] if len(items) == 1 else items


def saved_exits(model: str, exits: str | None, measure: str | None) -> Exits | None:
    """The exits in a folder, or those that ship with the backbone; None if a measure is to judge at places in it."""
    from dynamax_llm.backbones.loading import shipped_exits
    from dynamax_llm.exits.artifact import Exits

    is_place = exits is not None and _PLACES.fullmatch(exits) is not None and not Path(exits).is_dir()
    if exits is not None and not is_place:
        return Exits.from_pretrained(exits)
    if exits is None and shipped_exits(model) is not None:
        return Exits.from_pretrained(model)
    if measure is None:
        raise UsageError(
            f"no trained exits for {model!r}. Give --exits DIR, the folder that dynamax train wrote, "
            "or --measure NAME (softmax_margin, say) to decide without training."
        )
    return None
