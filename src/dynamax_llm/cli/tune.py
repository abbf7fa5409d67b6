"""``dynamax tune``: a copy of an ordinary checkpoint whose exits pay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynamax_llm.cli.options import Device, Dtype, Model, load_backbone, peek_backbone
from dynamax_llm.cli.train import count
from dynamax_llm.errors import UsageError

if TYPE_CHECKING:
    from dynamax_llm.training.tuning import Tuned


Data = Annotated[
    str, typer.Option(help="A .jsonl, .jsonl.xz or .txt file, a folder of them, or a dataset id.", metavar="PATH|ID")
]
Out = Annotated[Path, typer.Option(help="New folder for the tuned model; the same command resumes a killed run.")]
Method = Annotated[
    str, typer.Option(help="lora: adapters, merged into the saved weights; full: all weights.", metavar="NAME")
]
ExitsAt = Annotated[
    str, typer.Option("--exits", help="What to train as exits: layers (8,12), shares of the depth, or all.")
]
Schedule = Annotated[
    str, typer.Option(help="weighted: every exit at every step; rotating: a few, drawn anew each step.", metavar="NAME")
]
Distill = Annotated[float, typer.Option(help="Share of the loss that is distillation, 0 to 1; the rest is the text.")]
Teacher = Annotated[
    str,
    typer.Option(
        help="original: exits and last layer learn from the untouched model, so that it stays what it is; "
        "current: exits from the last layer as it is, the last layer from the text.",
        metavar="NAME",
    ),
]
Tokens = Annotated[str, typer.Option(help="Training tokens: 300k, 1M, 2.5M … Data repeats if it is shorter.")]
Sequence = Annotated[int, typer.Option("--seq-length", help="Tokens of a chunk of text, at most.")]
Batch = Annotated[int, typer.Option(help="Tokens of a step, padding included; at least one chunk.")]
Rate = Annotated[float | None, typer.Option(help="Peak learning rate. Default: 1e-3 for lora, 1e-4 for full.")]
Again = Annotated[bool, typer.Option("--checkpointing", help="Less memory: layers run again in the backward pass.")]
Field = Annotated[str | None, typer.Option(help="Field of a .jsonl or dataset record that holds the text.")]


def tune(
    model: Model,
    data: Data,
    out: Out,
    method: Method = "lora",
    rank: Annotated[int, typer.Option(help="Rank of LoRA's adapters.")] = 16,
    exits: ExitsAt = "1/4,3/8,1/2,5/8,3/4,7/8",
    schedule: Schedule = "weighted",
    rotating: Annotated[int, typer.Option(help="Exits of a step when rotating.")] = 1,
    distill: Distill = 1.0,
    teacher: Teacher = "original",
    tokens: Tokens = "1M",
    seq_length: Sequence = 512,
    batch: Batch = 4096,
    lr: Rate = None,
    checkpointing: Again = False,
    seed: Annotated[int, typer.Option(help="Seed of adapters, data order and draws.")] = 0,
    heldout: Annotated[float, typer.Option(help="Share of the documents kept for the figures.")] = 0.05,
    eval_tokens: Annotated[str, typer.Option(help="Held-out tokens measured, before and after.")] = "20k",
    text_field: Field = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Tune a copy of a model so that its exits pay, and say what that changed in the full model."""
    from dynamax_llm.backbones import adapt
    from dynamax_llm.exits.config import place_exits
    from dynamax_llm.text.sources import find_source
    from dynamax_llm.training.tuning import TuneSettings
    from dynamax_llm.training.tuning import tune as run
    from dynamax_llm.training.tuning.folder import check_free
    from dynamax_llm.training.tuning.student import check_peft

    # Whatever can be wrong is found before the backbone is loaded, which may take minutes.
    settings = TuneSettings(
        method=method,
        rank=rank,
        schedule=schedule,
        rotating=rotating,
        distil=distill,
        teacher=teacher,
        max_tokens=count(tokens),
        sequence=seq_length,
        batch_tokens=batch,
        lr=lr,
        held_out=heldout,
        eval_tokens=count(eval_tokens),
        checkpointing=checkpointing,
        seed=seed,
    )
    if method == "lora":
        check_peft()
    config = peek_backbone(model)
    depth = config.num_hidden_layers
    places = tuple(range(1, depth)) if exits.strip() == "all" else place_exits(exits, depth)
    if device == "auto":
        raise UsageError("device 'auto' spreads layers, and tuning needs them on one: give cpu, cuda or cuda:1.")
    source = find_source(data, text_field)
    check_free(out)
    lm, tokenizer = load_backbone(model, dtype, device)
    try:
        tuned = run(adapt(lm), tokenizer, source, places, settings, out, config.dtype)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command continues where it stopped", err=True)
        raise typer.Exit(130) from None
    report(tuned, places)


def report(tuned: Tuned, layers: tuple[int, ...]) -> None:
    """Print what the tuning changed on held-out text, and the command that trains exits on the result."""
    from rich.console import Console
    from rich.table import Table

    from dynamax_llm.training.tuning.folder import HEADER, summary, table

    console = Console(highlight=False, markup=False)
    before, after = tuned.before, tuned.after
    title = f"before and after, on {before.tokens:,} held-out tokens; * marks trained exits"
    for header, rows in (
        (HEADER, table(before, after, layers)),
        (("", "before", "after"), summary(before, after, tuned.kept)),
    ):
        drawn = Table(title=title, title_justify="left")
        for column in header:
            drawn.add_column(column, justify="right" if column else "left")
        for row in rows:
            drawn.add_row(*row)
        console.print(drawn)
        title = ""
    change = after.loss - before.loss
    console.print(
        f"The full model's own loss changed by {change:+.4f} nats per token; "
        f"{tuned.kept:.1%} of its tokens are the original's."
    )
    console.print(f"Saved in {tuned.folder}: a stock model folder. Next:", soft_wrap=True)
    console.print(f"  dynamax train {tuned.folder} --data {tuned.record['data']} --out my-exits", soft_wrap=True)
