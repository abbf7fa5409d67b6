"""``dynamax paper``: the grid of arXiv 2504.20922 on any backbones, as one resumable command with a report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from dynamax_llm.cli import options as opt
from dynamax_llm.cli.backbone import command_line, default_device, quiet
from dynamax_llm.evaluation.harness.plan import Plan
from dynamax_llm.paper.plan import MODELS, PaperPlan
from dynamax_llm.settings import DecodeSettings
from dynamax_llm.training.settings import TrainSettings


@opt.verb(
    place=opt.PLACE,
    resumes=True,
    grid=opt.Fields(PaperPlan),
    decode=opt.Fields(DecodeSettings, "engine"),
    how=opt.Fields(Plan),
    training=opt.Fields(TrainSettings, "max_tokens", flags={"max_tokens": "--train-tokens"}),
)
def paper(
    *,
    out: Annotated[
        Path,
        typer.Option(help="Folder for exits, records, eval.json and the report; the same command again goes on."),
    ],
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="Backbones to compare. Default: Mistral 7B v0.3 and Codestral Mamba 7B v0.1."
        ),
    ] = None,
    grid: opt.Given,
    decode: opt.Given,
    how: opt.Given,
    training: opt.Given,
    train_data: Annotated[
        str,
        typer.Option(
            help="Text for exits that are not trained yet; the shipped backbones bring theirs.", metavar="PATH|ID"
        ),
    ] = "HuggingFaceFW/fineweb-edu:sample-10BT",
    place: opt.Given,
) -> None:
    """The paper's grid: backbones x heads x tasks, thresholds swept, baselines beside, as one report."""
    work = Plan(**how)
    settings: opt.Given = {"training": TrainSettings(seed=work.seed, **training), "how": work, "train_data": train_data}
    plan = PaperPlan(models=tuple(models or MODELS), **place, **settings, **grid, **decode)

    from dynamax_llm.cli.tables import Bar, show_evaluation
    from dynamax_llm.paper import run
    from dynamax_llm.report import check_targets, write_report

    quiet()
    plan = replace(plan, device=plan.device or default_device())
    page, figures = out / "report.html", out / "figures"
    check_targets(page, figures)
    with Bar() as bar:
        found = run(plan, out, command=command_line("paper"), on_progress=bar.show)
    write_report([found], page, figures)
    show_evaluation(found, out)
    typer.echo(f"Report: {page}")
