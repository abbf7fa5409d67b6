"""``dynamax scan``: before any training, is early exit worth it here?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dynamax_llm.cli.backbone import command_line, load_backbone, peek_backbone, text_of
from dynamax_llm.cli.options import (
    DEFAULT_LAYERS,
    DTYPE,
    AsJson,
    Data,
    Device,
    Dtype,
    ExitLayers,
    Fields,
    Given,
    Model,
    Target,
    TextField,
    verb,
)
from dynamax_llm.evaluation.scan.settings import ScanSettings

#: Layers shown, beside the exits.
ROWS = 24
#: Columns of a terminal from which on depths carry their intervals.
WIDE = 100

if TYPE_CHECKING:
    from dynamax_llm.evaluation.harness.results import Interval
    from dynamax_llm.evaluation.scan.document import Scan


@verb(settings=Fields(ScanSettings))
def scan(
    *,
    model: Model,
    data: Data,
    exit_layers: ExitLayers = DEFAULT_LAYERS,
    settings: Given,
    out: Target = None,
    text_field: TextField = None,
    dtype: Dtype = DTYPE,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Say what early exit could save on this model and text, before any training."""
    how = ScanSettings(**settings)

    import typer

    from dynamax_llm.backbones import adapt
    from dynamax_llm.evaluation.scan.scan import scan as run
    from dynamax_llm.exits.config import ExitConfig, place_exits
    from dynamax_llm.report.scanned import check_target, write_scan

    n_layers = peek_backbone(model).num_hidden_layers
    ExitConfig(place_exits(exit_layers, n_layers), n_layers, candidates=how.candidates)
    source = text_of(data, text_field)
    if out is not None:
        check_target(out)
    lm, tokenizer = load_backbone(model, dtype, device)
    names = {"name": Path(model).name, "command": command_line("scan")}
    found = run(adapt(lm), tokenizer, source, exit_layers, how, **names)
    typer.echo(found.model_dump_json(indent=1)) if as_json else _show(found)
    if out is not None:
        written = write_scan(found, out)
        typer.echo(f"Saved: {', '.join(map(str, written))}.", err=as_json)


def _show(found: Scan) -> None:
    """Layers, judges, policies, and the verdict."""
    from dynamax_llm.cli.tables import Terminal, table
    from dynamax_llm.evaluation.scan.document import VERDICT_AT

    terminal = Terminal()
    last, targets = found.backbone.n_layers, sorted({point.target for point in found.predicted})
    where = f"{found.data.tokens:,} tokens of {found.data.documents:,} documents"
    layers = table(f"{found.backbone.name}, {last} layers, on {where}", "after layer", "depth", "agreement", "settled")
    for layer in found.layers:
        mark = " exit" if layer.depth in found.exits else ""
        if mark or layer.depth % -(-last // ROWS) == 0:
            shares = (_with(layer.agreement), _with(layer.settled))
            layers.add_row(f"{layer.depth}{mark}", f"{layer.depth / last:.2f}", *shares)
    terminal.print(layers)
    depths = table("Mean depth at an agreement, states intact", "who decides", *(f"{target:.0%}" for target in targets))
    wide = terminal.width >= WIDE
    for name, value in (("every layer", found.oracle.every_layer), ("these exits", found.oracle.exits)):
        depths.add_row(f"oracle, {name}", _with(value, wide), *["same"] * (len(targets) - 1))
    margin = [point for point in found.points if point.rule == "softmax_margin"]
    for name, points in (("softmax margin", margin), ("predicted for a trained head", found.predicted)):
        depths.add_row(name, *(_with(point.depth, wide) for point in points))
    terminal.print(depths)
    rules = [("oracle", None), *(("predicted", target) for target in targets)]
    names = ("oracle", *(f"predicted, {target:.0%}" for target in targets))
    saved = table("Counted reduction at most (layer passes saved at most)", "policy", *names)
    for policy in dict.fromkeys(reach.policy for reach in found.reaches):
        own = {(reach.rule, reach.target): reach for reach in found.reaches if reach.policy == policy}
        cells = [own[rule] for rule in rules]
        saved.add_row(policy, *(f"{100 * c.counted_reduction:.1f} % ({100 * c.pass_reduction:.0f} %)" for c in cells))
    terminal.print(saved)
    for even in found.break_even:
        terminal.write_line(f"Break-even under {even.policy}: a check may cost {even.of_layer:.2f} layers.")
    paid = ", ".join(f"{check.of_layer:.2f} after layer {check.depth}" for check in found.checks)
    terminal.write_line(f"The default head's check costs, in layers, its look included: {paid}.")
    left = found.disturbed
    terminal.write_line(
        f"Decoded under propagate at {VERDICT_AT:.0%} ({left.tokens:,} tokens), the margin rule runs {left.margin:.3f} "
        f"of the depth, with states intact {left.margin_intact:.3f}. If as much is left for a trained head: depth "
        f"{left.predicted:.3f}, counted reduction {left.counted_reduction:.1%}.",
    )
    terminal.write_line(f"\n{found.verdict.answer.capitalize()}. {found.verdict.reason}", style="bold")
    terminal.write_line(
        "The tables are with every layer's state intact, as under defer; propagate, copy and stale need more depth for "
        "the same agreement. Intervals: 95 %, bootstrap over "
        f"{found.data.grouped_by}s. Counted multiply-accumulates are no speed-up.",
    )


def _with(value: Interval, wide: bool = True) -> str:
    """A share with its interval, if it has one and there is room."""
    if not wide or value.low is None or value.high is None:
        return f"{value.value:.3f}"
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
