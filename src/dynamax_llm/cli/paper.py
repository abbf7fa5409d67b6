"""``dynamax paper``: the grid of arXiv 2504.20922 on any backbones, as one resumable command with a report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from dynamax_llm.cli.deciding import Policy
from dynamax_llm.cli.evaluated import Bar, Batch, DataDir, Limit, NewTokens, Timed, show
from dynamax_llm.cli.options import Device, Dtype, quiet
from dynamax_llm.cli.train import count
from dynamax_llm.errors import UsageError

#: The paper's, as the author's public code has them.
_HEADS = ("linear", "transformer", "mamba")


def paper(
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
    heads: Annotated[str, typer.Option(help="Comma list: linear, mlp, transformer, mamba.")] = ",".join(_HEADS),
    tasks: Annotated[
        str, typer.Option(help="Comma list of lm-evaluation-harness tasks.")
    ] = "triviaqa,coqa,truthfulqa_gen",
    threshold: Annotated[
        str, typer.Option(help="Comma list; each is one setting of every head and of the margin rule.")
    ] = "0.25,0.4,0.55,0.7,0.85,0.95",
    limit: Limit = 100,
    batch: Batch = 32,
    timed: Timed = 4,
    max_new_tokens: NewTokens = 32,
    policy: Policy = None,
    data_dir: DataDir = None,
    train_data: Annotated[
        str,
        typer.Option(
            help="Text for exits that are not trained yet; the shipped backbones bring theirs.", metavar="PATH|ID"
        ),
    ] = "HuggingFaceFW/fineweb-edu:sample-10BT",
    train_tokens: Annotated[str, typer.Option(help="Training tokens: 300k, 1M, 2.5M …")] = "1M",
    seed: Annotated[int, typer.Option(help="Seed of training, of the choice of documents and of the bootstrap.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """The paper's grid: backbones x heads x tasks, thresholds swept, baselines beside, as one report."""
    command = shlex.join(["dynamax", *sys.argv[1:]]) if sys.argv[1:2] == ["paper"] else "dynamax paper"
    # Every name is looked at before torch, models and tasks are loaded.
    values = tuple(_number(item) for item in _items("threshold", threshold))

    import torch

    from dynamax_llm.decoding.generate import DEFAULT_POLICY
    from dynamax_llm.evaluation.harness.evaluate import Plan
    from dynamax_llm.paper import MODELS, PaperPlan, run
    from dynamax_llm.report import check_targets, write_report
    from dynamax_llm.training.settings import TrainSettings

    quiet()
    plan = PaperPlan(
        models=tuple(models or MODELS),
        heads=_items("heads", heads),
        tasks=_items("tasks", tasks),
        thresholds=values,
        limit=limit,
        max_new_tokens=max_new_tokens,
        data_dir=data_dir,
        train_data=train_data,
        training=TrainSettings(max_tokens=count(train_tokens), seed=seed),
        how=Plan(batch=batch, timed=timed, seed=seed),
        policy=policy or DEFAULT_POLICY,
        dtype=dtype,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    page, figures = out / "report.html", out / "figures"
    check_targets(page, figures)
    with Bar() as bar:
        found = run(plan, out, command=command, on_progress=bar.show)
    write_report([found], page, figures)
    show(found, out)
    typer.echo(f"Report: {page}")


def _items(name: str, text: str) -> tuple[str, ...]:
    items = tuple(item.strip() for item in text.split(",") if item.strip())
    if not items:
        raise UsageError(f"{name} {text!r}: give at least one, separated by commas.")
    return items


def _number(text: str) -> float:
    from dynamax_llm.decoding.thresholds import NEVER, Thresholds

    if text == NEVER:
        raise UsageError(f"threshold {NEVER!r} is the full model, which is always run: leave it out.")
    value = Thresholds.parse(text, 1).values[0]
    assert value is not None
    return value
