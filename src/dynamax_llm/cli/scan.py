"""``dynamax scan``: before any training, is early exit worth it here?"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynamax_llm.cli.options import Device, Dtype, Model, load_backbone, peek_backbone
from dynamax_llm.cli.train import count

#: Layers shown, beside the exits.
ROWS = 24
#: Columns of a terminal from which on depths carry their intervals.
WIDE = 100

if TYPE_CHECKING:
    from dynamax_llm.evaluation.harness.results import Interval
    from dynamax_llm.evaluation.scan.document import Scan


def scan(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="Text like that to come: a .jsonl, .jsonl.xz or .txt file, a folder of them, or a dataset id.",
            metavar="PATH|ID",
        ),
    ],
    exits: Annotated[
        str,
        typer.Option(help="Where exits would sit: layers (8,12) or shares of the depth (1/2,0.75).", metavar="LAYERS"),
    ] = "1/4,3/8,1/2,5/8,3/4,7/8",
    tokens: Annotated[str, typer.Option(help="Tokens of text to look at: 20k, 100k …")] = "20k",
    seq_length: Annotated[int, typer.Option(help="Tokens of a chunk of text, at most.")] = 512,
    batch: Annotated[int, typer.Option(help="Tokens of a pass, padding included; at least one chunk.")] = 4096,
    candidates: Annotated[
        int, typer.Option(help="Later exits read only this many of the first one's likeliest tokens; 0: all tokens.")
    ] = 256,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for scan.json and the plot as SVG and PNG, or the .json file, with the plot beside it.",
            metavar="DIR|FILE",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of documents.")] = 0,
    text_field: Annotated[
        str | None, typer.Option(help="Field of a .jsonl or dataset record that holds the text.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole document instead of tables.")] = False,
) -> None:
    """Say what early exit could save on this model and text, before any training."""
    from dynamax_llm.backbones import adapt
    from dynamax_llm.evaluation.scan.scan import ScanSettings
    from dynamax_llm.evaluation.scan.scan import scan as look
    from dynamax_llm.exits.config import ExitConfig, place_exits
    from dynamax_llm.report.scanned import check_target, write_scan
    from dynamax_llm.text.sources import find_source

    # Whatever can be wrong is found before the backbone is loaded, which may take minutes.
    command = "dynamax " + shlex.join(sys.argv[1:]) if sys.argv[1:2] == ["scan"] else "dynamax scan"
    settings = ScanSettings(
        tokens=count(tokens), sequence=seq_length, batch_tokens=batch, candidates=candidates, seed=seed
    )
    n_layers = peek_backbone(model).num_hidden_layers
    ExitConfig(place_exits(exits, n_layers), n_layers, candidates=candidates)
    source = find_source(data, text_field)
    if out is not None:
        check_target(out)
    lm, tokenizer = load_backbone(model, dtype, device)
    found = look(adapt(lm), tokenizer, source, exits, settings, name=Path(model).name, command=command)
    typer.echo(found.model_dump_json(indent=1)) if as_json else _show(found)
    if out is not None:
        written = write_scan(found, out)
        typer.echo(f"Saved: {', '.join(map(str, written))}.", err=as_json)


def _show(found: Scan) -> None:
    """Layers, judges, policies, and the verdict."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from dynamax_llm.evaluation.scan.document import VERDICT_AT

    console = Console(highlight=False, markup=False)

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, name in enumerate(columns):
            made.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
        return made

    last, targets = found.backbone.n_layers, sorted({point.target for point in found.predicted})
    where = f"{found.data.tokens:,} tokens of {found.data.documents:,} documents"
    layers = table(f"{found.backbone.name}, {last} layers, on {where}", "after layer", "depth", "agreement", "settled")
    for layer in found.layers:
        mark = " exit" if layer.depth in found.exits else ""
        if mark or layer.depth % -(-last // ROWS) == 0:
            shares = (_with(layer.agreement), _with(layer.settled))
            layers.add_row(f"{layer.depth}{mark}", f"{layer.depth / last:.2f}", *shares)
    console.print(layers)
    depths = table("Mean depth at an agreement, states intact", "who decides", *(f"{target:.0%}" for target in targets))
    wide = console.width >= WIDE
    for name, value in (("every layer", found.oracle.every_layer), ("these exits", found.oracle.exits)):
        depths.add_row(f"oracle, {name}", _with(value, wide), *["same"] * (len(targets) - 1))
    margin = [point for point in found.points if point.rule == "softmax_margin"]
    for name, points in (("softmax margin", margin), ("predicted for a trained head", found.predicted)):
        depths.add_row(name, *(_with(point.depth, wide) for point in points))
    console.print(depths)
    rules = [("oracle", None), *(("predicted", target) for target in targets)]
    names = ("oracle", *(f"predicted, {target:.0%}" for target in targets))
    saved = table("Counted reduction at most (layer passes saved at most)", "policy", *names)
    for policy in dict.fromkeys(reach.policy for reach in found.reaches):
        own = {(reach.rule, reach.target): reach for reach in found.reaches if reach.policy == policy}
        cells = [own[rule] for rule in rules]
        saved.add_row(policy, *(f"{100 * c.counted_reduction:.1f} % ({100 * c.pass_reduction:.0f} %)" for c in cells))
    console.print(saved)
    for even in found.break_even:
        console.print(f"Break-even under {even.policy}: a check may cost {even.of_layer:.2f} layers.")
    paid = ", ".join(f"{check.of_layer:.2f} after layer {check.depth}" for check in found.checks)
    console.print(f"The default head's check costs, in layers, its look included: {paid}.")
    left = found.disturbed
    console.print(
        f"Decoded under propagate at {VERDICT_AT:.0%} ({left.tokens:,} tokens), the margin rule runs {left.margin:.3f} "
        f"of the depth, with states intact {left.margin_intact:.3f}. If as much is left for a trained head: depth "
        f"{left.predicted:.3f}, counted reduction {left.counted_reduction:.1%}.",
        soft_wrap=True,
    )
    console.print(f"\n{found.verdict.answer.capitalize()}. {found.verdict.reason}", style="bold", soft_wrap=True)
    console.print(
        "The tables are with every layer's state intact, as under defer; propagate, copy and stale need more depth for "
        "the same agreement. Intervals: 95 %, bootstrap over "
        f"{found.data.grouped_by}s. Counted multiply-accumulates are no speed-up.",
        soft_wrap=True,
    )


def _with(value: Interval, wide: bool = True) -> str:
    """A share with its interval, if it has one and there is room."""
    if not wide or value.low is None or value.high is None:
        return f"{value.value:.3f}"
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
