"""``dynamax bench``: wall clock of every state policy and exit depth against full depth, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynamax_llm.cli import options as opt
from dynamax_llm.cli.backbone import command_line, default_device, load_backbone, peek_backbone, quiet
from dynamax_llm.errors import UsageError
from dynamax_llm.evaluation.bench.settings import BenchSettings
from dynamax_llm.settings import PlaceSettings

#: Columns of a terminal from which on times carry their ranges.
WIDE = 120

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dynamax_llm.evaluation.bench import Bench
    from dynamax_llm.evaluation.bench.document import Row, Spread


@opt.verb(place=opt.PLACE, settings=opt.Fields(BenchSettings))
def bench(
    *,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A model folder, a hub id, or a shipped backbone.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Instead of MODEL, random weights at mistral-7b, codestral-mamba-7b, tiny-transformer or tiny-mamba; "
            "layers after the first of --exit-layers add nothing, so leaving there is always right.",
            metavar="NAME",
        ),
    ] = None,
    settings: opt.Given,
    out: opt.Target = None,
    place: opt.Given,
    as_json: opt.AsJson = False,
) -> None:
    """Time decoding on this machine: policies, exit depths and batch sizes against full depth, in one run.

    With --out the document is written after every group of settings: a run that is cut off leaves what it measured.
    """
    if (model is None) == (shape is None):
        raise UsageError("give either a MODEL or --shape with the name of a shape, and not both.")
    plan = BenchSettings(**settings)

    from dynamax_llm.evaluation.bench import bench as measure
    from dynamax_llm.report.benched import target, write_bench

    if out is not None:
        target(out)
    chosen = PlaceSettings(**place)
    lm, tail = _random(shape, plan, chosen) if shape else (_loaded(str(model), place), None)

    def save(part: Bench) -> None:
        path = target(Path(str(out)))
        path.parent.mkdir(parents=True, exist_ok=True)
        part.save(path)

    found = measure(
        lm,
        plan,
        name=shape or Path(str(model)).name,
        zero_tail_from=tail,
        command=command_line("bench"),
        tell=lambda line: typer.echo(line, err=True),
        on_part=None if out is None else save,
    )
    typer.echo(found.model_dump_json(indent=1)) if as_json else _show(found)
    if out is not None:
        typer.echo(f"Saved: {', '.join(map(str, write_bench(found, out)))}.", err=as_json)


def _loaded(model: str, place: opt.Given) -> PreTrainedModel:
    peek_backbone(model)
    return load_backbone(model, place)[0]


def _random(shape: str, plan: BenchSettings, chosen: PlaceSettings) -> tuple[PreTrainedModel, int]:
    """Random weights at a shape, and the depth after which its layers add nothing."""
    import torch

    from dynamax_llm.backbones.loading import DTYPES
    from dynamax_llm.evaluation.common.random_models import RANDOM_SHAPES, random_model, zero_tail
    from dynamax_llm.exits.config import place_exits

    quiet()
    first = place_exits(plan.exit_at, RANDOM_SHAPES.lookup(shape).num_hidden_layers)[0]
    wanted, place = DTYPES.lookup(chosen.dtype), chosen.device or default_device()
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"device {place!r} cannot be used here ({line}). Use cpu, cuda, cuda:0 …") from error
    if wanted is None:
        wanted = torch.float32 if place == "cpu" else torch.bfloat16
    lm = random_model(shape, place, wanted, seed=plan.seed)
    zero_tail(lm, first)
    return lm, first


def _show(found: Bench) -> None:
    """Times, then what engines say, then what is missing."""
    from dynamax_llm.cli.tables import Terminal

    terminal = Terminal()
    place, load = found.place, found.load
    heading = (
        f"{found.backbone.name}, {place.device_name}, {place.dtype}, {load.prompt}-token prompt, {load.new} new "
        f"tokens, {load.repeats} repeats; a copy moves {place.copy_bandwidth / 1e9:,.0f} GB/s"
    )
    wide = terminal.width >= WIDE
    columns: tuple[str, ...] = ("setting · engine", "ms/token", "tokens/s", "x full", "bandwidth")
    columns += ("first token", "building") if wide else ()
    for batch in sorted({row.batch for row in found.rows}):
        rows = [_cells(row, wide)[: len(columns)] for row in found.rows if row.batch == batch]
        terminal.write_table(f"{heading}, batch {batch}", columns, rows)
    same = [
        (
            f"{item.of}, against {item.reference}"
            + ("" if item.model == found.backbone.name else f" ({item.model}, {item.dtype})"),
            str(item.batch),
            f"{item.positions:,}",
            "–" if item.differing is None else f"{item.differing:.2%}",
            "–" if item.equal is None else f"{item.equal:.1%}",
        )
        for item in found.parity
    ]
    terminal.write_table("Same tokens?", ("of, against", "batch", "tokens", "likeliest differs", "equal"), same)
    for lack in found.missing:
        terminal.write_line(f"Not measured, batch {lack.batch}: {lack.label}: {lack.reason}.")
    terminal.write_line(
        "ms/token: median of one row's time per token after the first [least, greatest]. x full: wall clock against "
        "full depth of the same engine in the same turns. Bandwidth: counted bytes of weights over time, as a share of "
        "the copy's. Building: what the first call took longer than later ones. Likeliest differs: given the same text "
        "so far; equal: in free generation, where one difference changes all that follows.",
    )


def _cells(row: Row, wide: bool) -> tuple[str, ...]:
    return (
        f"{row.label} · {row.engine}",
        _range(row.ms_per_token, 3) if wide else f"{row.ms_per_token.median:.3f}",
        f"{row.tokens_per_second.median:.1f}",
        "–" if row.speed_up is None else f"{row.speed_up.median:.3f}",
        f"{row.bandwidth_share:.2f}",
        f"{1e3 * row.first_token.median:.1f} ms",
        f"{row.building:.1f} s",
    )


def _range(value: Spread, digits: int) -> str:
    return f"{value.median:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
