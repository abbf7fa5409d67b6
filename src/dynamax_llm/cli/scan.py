"""``dynamax scan``: before any training, is early exit worth it here?"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from dynamax_llm.cli import options as opt
from dynamax_llm.cli.backbone import command_line, load_backbone, peek_backbone, text_of
from dynamax_llm.evaluation.scan.settings import ScanSettings

#: Layers shown, beside the exits.
ROWS = 24
#: Columns of a terminal from which on depths carry their intervals.
WIDE = 100

if TYPE_CHECKING:
    from dynamax_llm.cli.tables import Terminal
    from dynamax_llm.evaluation.scan.document import Scan


@opt.verb(place=opt.PLACE, settings=opt.Fields(ScanSettings))
def scan(
    *,
    model: opt.Model,
    data: opt.Data,
    exit_layers: opt.ExitLayers = opt.DEFAULT_LAYERS,
    settings: opt.Given,
    out: opt.Target = None,
    text_field: opt.TextField = None,
    place: opt.Given,
    as_json: opt.AsJson = False,
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
    lm, tokenizer = load_backbone(model, place)
    names = {"name": Path(model).name, "command": command_line("scan")}
    found = run(adapt(lm), tokenizer, source, exit_layers, how, **names)
    typer.echo(found.model_dump_json(indent=1)) if as_json else _show(found, _command(found, model, data, how))
    if out is not None:
        written = write_scan(found, out)
        typer.echo(f"Saved: {', '.join(map(str, written))}.", err=as_json)


def _command(found: Scan, model: str, data: str, how: ScanSettings) -> str | None:
    """The command that trains what the scan says pays; None where nothing does."""
    modes = found.modes
    if modes is None or modes.use is None:
        return None
    words = ["dynamax", "train", model, "--data", data, *(("--answers", how.answers) if how.answers else ())]
    if modes.use == "blocks":
        words += ["--readout", "block", "--exit-layers", ",".join(map(str, modes.blocks.layers))]
    elif modes.use == "draft":
        words += ["--readout", "draft"]
    return shlex.join([*words, "--out", "DIR"])


def _show_modes(terminal: Terminal, found: Scan, command: str | None) -> None:
    """What to train, first of all."""
    modes = found.modes
    assert modes is not None
    for line in modes.lines:
        terminal.write_line(line, style="bold")
    use = "nothing that a scan estimates pays here." if command is None else f"{modes.use}: {command}"
    terminal.write_line(f"Use {use}", style="bold")
    if modes.draft is not None:
        draft, passes = modes.draft, modes.draft.pass_costs
        match = " ".join(f"{share:.2f}" for share in draft.match)
        terminal.write_line(
            f"A draft's proposals should match in {match} of the cases by step; {draft.tokens:.1f} tokens a "
            f"verification with {draft.proposals:.1f} proposals. Timed here: a draft step {draft.step_cost:.2f} of a "
            f"pass ({1000 * draft.pass_seconds:.0f} ms), a pass over 4 tokens {passes[3]:.2f}, over 8 {passes[7]:.2f}."
        )
    agreement = ", ".join(
        f"{share:.2f} after layer {layer}"
        for share, layer in zip(modes.blocks.agreement, modes.blocks.layers, strict=True)
    )
    terminal.write_line(f"Blocks should agree in {agreement}. Both are estimated, not measured: {modes.law}")


def _show(found: Scan, command: str | None) -> None:
    """The verdict on modes, then layers, estimators, policies, and the verdict on ordinary heads."""
    from dynamax_llm.cli.tables import Terminal, ranged
    from dynamax_llm.evaluation.scan.document import VERDICT_AT

    terminal = Terminal()
    wide = terminal.width >= WIDE
    _show_modes(terminal, found, command)
    last, targets = found.backbone.n_layers, sorted({point.target for point in found.predicted})
    where = f"{found.data.tokens:,} tokens of {found.data.documents:,} documents"
    layers = [
        (f"{layer.depth}{mark}", f"{layer.depth / last:.2f}", ranged(layer.agreement), ranged(layer.settled))
        for layer in found.layers
        if (mark := " exit" if layer.depth in found.exits else "") or layer.depth % -(-last // ROWS) == 0
    ]
    columns: tuple[str, ...] = ("after layer", "depth", "agreement", "settled")
    terminal.write_table(f"{found.backbone.name}, {last} layers, on {where}", columns, layers)
    oracles = (("every layer", found.oracle.every_layer), ("these exits", found.oracle.exits))
    margin = [point for point in found.points if point.rule == "softmax_margin"]
    depths: list[tuple[str, ...]] = [
        (f"oracle, {name}", *[ranged(value, wide)] * len(targets)) for name, value in oracles
    ]
    for name, points in (("softmax margin", margin), ("predicted for a trained head", found.predicted)):
        depths.append((name, *(ranged(point.depth, wide) for point in points)))
    columns = ("who decides", *(f"{target:.0%}" for target in targets))
    terminal.write_table("Mean depth at an agreement, states intact", columns, depths)
    rules = [("oracle", None), *(("predicted", target) for target in targets)]
    reached = {(reach.policy, reach.rule, reach.target): reach for reach in found.reaches}
    saved = [
        (policy, *(f"{100 * c.counted_reduction:.1f} % ({100 * c.pass_reduction:.0f} %)" for c in cells))
        for policy in dict.fromkeys(reach.policy for reach in found.reaches)
        if (cells := [reached[policy, *rule] for rule in rules])
    ]
    columns = ("policy", "oracle", *(f"predicted, {target:.0%}" for target in targets))
    terminal.write_table("Counted reduction at most (layer passes saved at most)", columns, saved)
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
    terminal.write_line(f"\nOrdinary heads: {found.verdict.answer}. {found.verdict.reason}", style="bold")
    terminal.write_line(
        "The tables are with every layer's state intact, as under defer; propagate, copy and stale need more depth for "
        "the same agreement. Intervals: 95 %, bootstrap over "
        f"{found.data.grouped_by}s. Counted multiply-accumulates are no speed-up.",
    )
