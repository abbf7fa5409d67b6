"""``dynamax bench``: wall clock. Of saved exits on prompts (``--data``), or of policies and depths on random tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynamax_llm.cli import options as opt
from dynamax_llm.cli.backbone import command_line, default_device, load_backbone, peek_backbone, quiet
from dynamax_llm.cli.deciding import ExitsFolder, check_exits, saved_exits
from dynamax_llm.errors import UsageError
from dynamax_llm.evaluation.bench.exits.settings import ExitBenchSettings
from dynamax_llm.evaluation.bench.settings import BenchSettings
from dynamax_llm.settings import PlaceSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Fields of ExitBenchSettings that BenchSettings has not; the others share their options.
ON_PROMPTS = ("thresholds", "measure", "prompts", "chat", "system", "threads")


@opt.verb(place=opt.PLACE, settings=opt.Fields(BenchSettings), on_prompts=opt.Fields(ExitBenchSettings, *ON_PROMPTS))
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
    data: Annotated[
        Path | None,
        typer.Option(
            help="Time saved exits on these prompts: a .jsonl file with a field prompt, messages or question, and kind "
            "if you like, or a .txt file with one a line.",
            metavar="FILE",
        ),
    ] = None,
    exits: ExitsFolder = None,
    on_prompts: opt.Given,
    settings: opt.Given,
    out: opt.Target = None,
    place: opt.Given,
    as_json: opt.AsJson = False,
) -> None:
    """Time decoding on this machine: saved exits on your prompts, or policies and exit depths on random tokens.

    With --data every mode of the exits in --exits takes turns with plain generate; without it, every policy, depth and
    batch size with full depth. With --out the document is written after every part: a run that is cut off leaves what
    it measured.
    """
    if (model is None) == (shape is None):
        raise UsageError("give either a MODEL or --shape with the name of a shape, and not both.")
    if data is None:
        _refuse(["exits"] * bool(exits) + list(on_prompts), "is about saved exits and prompts: give `data` too")
        _on_random_tokens(model, shape, BenchSettings(**settings), out, place, as_json)
        return
    of_the_other = [name for name in settings if name not in ExitBenchSettings.__dataclass_fields__]
    _refuse(["shape"] * bool(shape) + of_the_other, "is about random tokens, not about prompts: leave `data` out")
    _on_prompts(str(model), exits, data, ExitBenchSettings(**settings, **on_prompts), out, place, as_json)


def _refuse(names: list[str], reason: str) -> None:
    """Raise UsageError for the first argument that belongs to the other way of using the command."""
    if names:
        raise UsageError(f"`{names[0]}` {reason}, or leave `{names[0]}` out.")


def _on_prompts(
    model: str,
    exits: str | None,
    data: Path,
    settings: ExitBenchSettings,
    out: Path | None,
    place: opt.Given,
    as_json: bool,
) -> None:
    check_exits(exits, None, settings.measure)
    peek_backbone(model)

    from dynamax_llm.backbones import adapt
    from dynamax_llm.cli.benched import show_exits
    from dynamax_llm.evaluation.bench.exits.document import ExitBench
    from dynamax_llm.evaluation.bench.exits.run import bench_exits
    from dynamax_llm.exits.artifact import Exits
    from dynamax_llm.exits.config import DEFAULT_EXITS
    from dynamax_llm.report.plots import check_target
    from dynamax_llm.text.prompts import read_prompts

    prompts = read_prompts(data)
    path = None if out is None else check_target(out, ExitBench.FILE)
    saved = saved_exits(model, exits, None, settings.measure)
    lm, tokenizer = load_backbone(model, place)
    found = bench_exits(
        lm,
        tokenizer,
        saved or Exits.untrained(adapt(lm), DEFAULT_EXITS),
        prompts,
        settings,
        name=Path(model).name,
        exits_name=Path(exits or model).name,
        command=command_line("bench"),
        on_part=None if path is None else lambda part: part.save(path),
    )
    typer.echo(found.model_dump_json(indent=1)) if as_json else show_exits(found)
    if path is not None:
        found.save(path)
        typer.echo(f"Saved: {path}.", err=as_json)


def _on_random_tokens(
    model: str | None, shape: str | None, plan: BenchSettings, out: Path | None, place: opt.Given, as_json: bool
) -> None:
    from dynamax_llm.cli.benched import show_bench
    from dynamax_llm.evaluation.bench import bench as measure
    from dynamax_llm.report.benched import target, write_bench

    path = None if out is None else target(out)
    lm, tail = _random(shape, plan, PlaceSettings(**place)) if shape else (_loaded(str(model), place), None)
    found = measure(
        lm,
        plan,
        name=shape or Path(str(model)).name,
        zero_tail_from=tail,
        command=command_line("bench"),
        tell=lambda line: typer.echo(line, err=True),
        on_part=None if path is None else lambda part: part.save(path),
    )
    typer.echo(found.model_dump_json(indent=1)) if as_json else show_bench(found)
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
