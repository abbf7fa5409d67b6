"""``dynamax export``: a trained draft in another program's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynamax_llm.cli import options as opt
from dynamax_llm.cli.backbone import load_backbone, no_empty_folder, peek_backbone
from dynamax_llm.errors import UsageError

FORMATS = ("speculators",)


@opt.verb(place=opt.PLACE)
def export(
    *,
    model: opt.Model,
    exits: Annotated[
        str, typer.Option("--exits", help="The folder of a draft (readout draft, join concatenate).", metavar="DIR")
    ],
    out: Annotated[Path, typer.Option(help="New folder for the exported draft.")],
    file_format: Annotated[
        str, typer.Option("--format", help=f"Format to write: {', '.join(FORMATS)} (EAGLE-3).", metavar="NAME")
    ] = FORMATS[0],
    verifier: Annotated[
        str | None,
        typer.Option(help="Name by which the other program finds the model. Default: MODEL.", metavar="PATH|ID"),
    ] = None,
    proposals: Annotated[int, typer.Option(help="Tokens drafted at a time.", min=1)] = 4,
    place: opt.Given,
) -> None:
    """Write a draft as a folder that other programs can load."""
    if file_format not in FORMATS:
        raise UsageError(f"format {file_format!r}: give one of {', '.join(FORMATS)}.")

    from dynamax_llm.exits.artifact import Exits
    from dynamax_llm.exits.speculators import checked, export_speculators

    found = Exits.from_pretrained(exits)
    checked(found)
    peek_backbone(model)
    with no_empty_folder(out):
        lm, _ = load_backbone(model, place)
        target = export_speculators(found, lm, out, verifier=verifier or model, proposals=proposals)
    typer.echo(f"Saved in {target}: an EAGLE-3 draft in the format of speculators, taps {_taps(target)}.")
    typer.echo("This folder was not run in any engine: recipes/export compares its logits with the draft's own.")


def _taps(folder: Path) -> str:
    """The depths whose h are its features."""
    import json

    taps = json.loads((folder / "config.json").read_text())["eagle_aux_hidden_state_layer_ids"]
    return ", ".join(map(str, taps))
