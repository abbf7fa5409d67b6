"""``dynamax tune``: a copy of an ordinary checkpoint whose exits pay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynamax_llm.cli import options as opt
from dynamax_llm.cli.backbone import load_backbone, peek_backbone, text_of
from dynamax_llm.errors import UsageError
from dynamax_llm.training.tuning.settings import TuneSettings

if TYPE_CHECKING:
    from dynamax_llm.training.tuning import Tuned


@opt.verb(place=opt.PLACE, resumes=True, settings=opt.Fields(TuneSettings))
def tune(
    *,
    model: opt.Model,
    data: opt.Data,
    out: Annotated[Path, typer.Option(help="New folder for the tuned model; the same command resumes a killed run.")],
    exit_layers: Annotated[
        str,
        typer.Option(help="What to train as exits: layers (8,12), shares of the depth, or all.", metavar="LAYERS"),
    ] = opt.DEFAULT_LAYERS,
    settings: opt.Given,
    text_field: opt.TextField = None,
    place: opt.Given,
) -> None:
    """Tune a copy of a model so that its exits pay, and say what that changed in the full model."""
    tuning = TuneSettings(**settings)
    if place.get("device") == "auto":
        raise UsageError("device 'auto' spreads layers, and tuning needs them on one: give cpu, cuda or cuda:1.")

    from dynamax_llm.backbones import adapt
    from dynamax_llm.exits.config import place_exits
    from dynamax_llm.training.tuning import tune as run
    from dynamax_llm.training.tuning.folder import check_free
    from dynamax_llm.training.tuning.student import check_peft

    if tuning.method == "lora":
        check_peft()
    config = peek_backbone(model)
    depth = config.num_hidden_layers
    places = tuple(range(1, depth)) if exit_layers.strip() == "all" else place_exits(exit_layers, depth)
    source = text_of(data, text_field)
    check_free(out)
    lm, tokenizer = load_backbone(model, place)
    report(run(adapt(lm), tokenizer, source, places, tuning, out, config.dtype), places)


def report(tuned: Tuned, layers: tuple[int, ...]) -> None:
    """Print what the tuning changed on held-out text, and the command that trains exits on the result."""
    from dynamax_llm.cli.tables import Terminal
    from dynamax_llm.training.tuning import folder

    terminal, before, after = Terminal(), tuned.before, tuned.after
    title = f"before and after, on {before.tokens:,} held-out tokens; * marks trained exits"
    terminal.write_table(title, folder.HEADER, folder.table(before, after, layers))
    terminal.write_table("", ("", "before", "after"), folder.summary(before, after, tuned.kept))
    terminal.write_line(
        f"The full model's own loss changed by {after.loss - before.loss:+.4f} nats per token; "
        f"{tuned.kept:.1%} of its tokens are the original's."
    )
    terminal.write_line(f"Saved in {tuned.folder}: a stock model folder. Next:")
    terminal.write_line(f"  dynamax train {tuned.folder} --data {tuned.record['data']} --out my-exits")
