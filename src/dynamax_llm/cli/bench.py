"""``dynamax bench``: wall clock of every state policy and exit depth against full depth, in one run."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynamax_llm.cli.options import Device, Dtype, load_backbone, peek_backbone, quiet
from dynamax_llm.errors import UsageError

#: Columns of a terminal from which on times carry their ranges.
WIDE = 120

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dynamax_llm.evaluation.bench import Bench
    from dynamax_llm.evaluation.bench.document import Row, Spread


Model = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="A model folder, a hub id, or a shipped backbone.")
]
Shape = Annotated[
    str | None,
    typer.Option(
        help="Instead of MODEL, random weights at mistral-7b, codestral-mamba-7b, tiny-transformer or tiny-mamba; "
        "layers after the first of --exit-at add nothing, so leaving there is always right.",
        metavar="NAME",
    ),
]
ExitAt = Annotated[
    str, typer.Option(help="Where all tokens leave, one setting each: layers or shares.", metavar="LAYERS")
]
Policy = Annotated[str, typer.Option(help="State policies: propagate, copy, stale, defer, verify.", metavar="NAMES")]
Window = Annotated[str, typer.Option(help="Tokens that wait under defer and verify.", metavar="NUMBERS")]
Batch = Annotated[str, typer.Option(help="Batch sizes.", metavar="NUMBERS")]
Prompt = Annotated[int, typer.Option(help="Prompt tokens.")]
New = Annotated[int, typer.Option(help="New tokens.")]
Repeats = Annotated[int, typer.Option(help="Times everything is measured.")]
Checks = Annotated[int, typer.Option(help="Also so many exits that are asked and never taken.")]
Head = Annotated[
    str, typer.Option(help="Who is asked there: a kind of head, random, or a confidence measure.", metavar="NAME")
]
Inputs = Annotated[str, typer.Option(help="What that head sees: hidden, signals, tokens.", metavar="NAMES")]
Shares = Annotated[
    str | None,
    typer.Option(help="Also rows that leave by themselves; shares of it that all do together.", metavar="SHARES"),
]
Leave = Annotated[float, typer.Option(help="With --spread: share of every row's tokens that leave.")]
Engine = Annotated[str | None, typer.Option(help="cuda or eager. Default: the fastest that can.", metavar="NAME")]
Baselines = Annotated[bool, typer.Option(help="The eager engine, transformers' generate, and the same compiled.")]
BaselineNew = Annotated[int, typer.Option(help="New tokens of those, which are slow.")]
Sameness = Annotated[bool, typer.Option(help="Look whether engines say the same tokens.")]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for bench.json and the plot as SVG and PNG, or the .json file, with the plot beside it. "
        "Written after every group of settings, so that a run that is cut off leaves what it measured.",
        metavar="DIR|FILE",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of weights, prompts and moments of leaving.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the whole document instead of tables.")]


def bench(
    model: Model = None,
    shape: Shape = None,
    exit_at: ExitAt = "1/2",
    policy: Policy = "propagate,defer,verify",
    window: Window = "8,16",
    batch: Batch = "1,8",
    prompt: Prompt = 64,
    new: New = 256,
    repeats: Repeats = 3,
    checks: Checks = 0,
    head: Head = "mlp",
    inputs: Inputs = "hidden,signals,tokens",
    spread: Shares = None,
    leave: Leave = 0.5,
    engine: Engine = None,
    baselines: Baselines = True,
    baseline_new: BaselineNew = 64,
    sameness: Sameness = True,
    out: Out = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Time decoding on this machine: policies, exit depths and batch sizes against full depth, in one run."""
    from dynamax_llm.evaluation.bench import BenchSettings
    from dynamax_llm.evaluation.bench import bench as measure
    from dynamax_llm.report.benched import target, write_bench

    # Whatever can be wrong is found before weights are loaded or made.
    command = "dynamax " + shlex.join(sys.argv[1:]) if sys.argv[1:2] == ["bench"] else "dynamax bench"
    if (model is None) == (shape is None):
        raise UsageError("give either a MODEL or --shape with the name of a shape, and not both.")
    settings = BenchSettings(
        prompt=prompt,
        new=new,
        baseline_new=baseline_new,
        repeats=repeats,
        batches=_numbers("batch", batch, int),
        policies=_names(policy),
        windows=_numbers("window", window, int),
        exit_at=exit_at,
        checks=checks,
        estimator=head,
        inputs=_names(inputs),
        spread=() if spread is None else _numbers("spread", spread, float),
        leave=leave,
        engine=engine,
        baselines=baselines,
        parity=sameness,
        seed=seed,
    )
    if out is not None:
        target(out)
    lm, tail = _made(shape, settings.exit_at, dtype, device, seed) if shape else _loaded(str(model), dtype, device)
    found = measure(
        lm,
        settings,
        name=shape or Path(str(model)).name,
        zero_tail_from=tail,
        command=command,
        tell=lambda line: typer.echo(line, err=True),
        on_part=None if out is None else lambda part: part.save(_room(target(out))),
    )
    typer.echo(found.model_dump_json(indent=1)) if as_json else _show(found)
    if out is not None:
        typer.echo(f"Saved: {', '.join(map(str, write_bench(found, out)))}.", err=as_json)


def _loaded(model: str, dtype: str, device: str | None) -> tuple[PreTrainedModel, None]:
    peek_backbone(model)
    return load_backbone(model, dtype, device)[0], None


def _made(shape: str, exit_at: str, dtype: str, device: str | None, seed: int) -> tuple[PreTrainedModel, int]:
    """Random weights at a shape, and the depth after which its layers add nothing."""
    import torch

    from dynamax_llm.backbones.loading import DTYPES
    from dynamax_llm.evaluation.common.random_models import RANDOM_SHAPES, random_model, zero_tail
    from dynamax_llm.exits.config import place_exits

    quiet()
    first = place_exits(exit_at, RANDOM_SHAPES.lookup(shape).num_hidden_layers)[0]
    wanted, place = DTYPES.lookup(dtype), device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"device {place!r} cannot be used here ({line}). Use cpu, cuda, cuda:0 …") from error
    if wanted is None:
        wanted = torch.float32 if place == "cpu" else torch.bfloat16
    lm = random_model(shape, place, wanted, seed=seed)
    zero_tail(lm, first)
    return lm, first


def _names(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _numbers(option: str, text: str, kind: type) -> tuple:
    try:
        return tuple(kind(item) for item in text.split(","))
    except ValueError:
        like = "1,8" if kind is int else "0,0.5,1"
        raise UsageError(f"--{option} {text!r}: give numbers separated by commas, like {like}.") from None


def _room(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _show(found: Bench) -> None:
    """Times, then what engines say, then what is missing."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, name in enumerate(columns):
            made.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
        return made

    place, load = found.place, found.load
    heading = (
        f"{found.backbone.name}, {place.device_name}, {place.dtype}, {load.prompt}-token prompt, {load.new} new "
        f"tokens, {load.repeats} repeats; a copy moves {place.copy_bandwidth / 1e9:,.0f} GB/s"
    )
    wide = console.width >= WIDE
    columns: tuple[str, ...] = ("setting · engine", "ms/token", "tokens/s", "x full", "bandwidth")
    columns += ("first token", "building") if wide else ()
    for batch in sorted({row.batch for row in found.rows}):
        times = table(f"{heading}, batch {batch}", *columns)
        for row in (row for row in found.rows if row.batch == batch):
            times.add_row(*_cells(row, wide)[: len(columns)])
        console.print(times)
    same = table("Same tokens?", "of, against", "batch", "tokens", "likeliest differs", "equal")
    for item in found.parity:
        differing = "–" if item.differing is None else f"{item.differing:.2%}"
        equal = "–" if item.equal is None else f"{item.equal:.1%}"
        where = "" if item.model == found.backbone.name else f" ({item.model}, {item.dtype})"
        of = f"{item.of}, against {item.reference}{where}"
        same.add_row(of, str(item.batch), f"{item.positions:,}", differing, equal)
    if found.parity:
        console.print(same)
    for lack in found.missing:
        console.print(f"Not measured, batch {lack.batch}: {lack.label}: {lack.reason}.", soft_wrap=True)
    console.print(
        "ms/token: median of one row's time per token after the first [least, greatest]. x full: wall clock against "
        "full depth of the same engine in the same turns. Bandwidth: counted bytes of weights over time, as a share of "
        "the copy's. Building: what the first call took longer than later ones. Likeliest differs: given the same text "
        "so far; equal: in free generation, where one difference changes all that follows.",
        soft_wrap=True,
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
