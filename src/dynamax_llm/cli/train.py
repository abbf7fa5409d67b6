"""``dynamax train``: exits for a frozen backbone, from text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from dynamax_llm.cli import options as opt
from dynamax_llm.cli.backbone import load_backbone, no_empty_folder, peek_backbone
from dynamax_llm.cli.learn import Lesson
from dynamax_llm.exits.config import INPUTS, ExitConfig
from dynamax_llm.exits.registries import HEADS, READOUTS
from dynamax_llm.settings import Option
from dynamax_llm.text.settings import AnswerSettings, LearnSettings
from dynamax_llm.training.settings import TrainSettings

#: Fields of an ExitConfig that are options; their defaults are ExitConfig's.
CONFIG = {
    "head": Option("Exit head: linear, mlp, transformer or mamba.", choices=tuple(HEADS), metavar="NAME"),
    "inputs": Option(
        "What the head reads: hidden (h), statistics (of the readout's logits), tokens (its leaders).", choices=INPUTS
    ),
    "readout": Option(
        "How an exit makes logits: head, tail (last layers first) or lens (learned).",
        choices=tuple(READOUTS),
        metavar="NAME",
    ),
    "candidates": Option(
        "Later exits read only this many of the first one's likeliest tokens; 0: the whole vocabulary.", least=0
    ),
}


@opt.verb(
    place=opt.PLACE,
    resumes=True,
    config=opt.Fields(ExitConfig, options=CONFIG),
    settings=opt.Fields(TrainSettings),
    learn=opt.Fields(LearnSettings),
    answering=opt.Fields(AnswerSettings),
)
def train(
    *,
    context: typer.Context,
    model: opt.Model,
    data: Annotated[
        str,
        typer.Option(
            help="A .jsonl, .jsonl.xz or .txt file, a folder of them, or a dataset id; with --answers, prompts: "
            "records with prompt, messages or question, or a .txt file of one a line.",
            metavar="PATH|ID",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the exits; the same command again resumes a killed run.")],
    exit_layers: opt.ExitLayers = opt.DEFAULT_LAYERS,
    preset: Annotated[
        str | None,
        typer.Option(help="Start from a named set of options (dynamax-paper); those given here win.", metavar="NAME"),
    ] = None,
    tail_layers: Annotated[
        int | None, typer.Option(help="Layers of the tail readout. Default: its own.", metavar="INTEGER")
    ] = None,
    config: opt.Given,
    settings: opt.Given,
    learn: opt.Given,
    answering: opt.Given,
    text_field: opt.TextField = None,
    place: opt.Given,
) -> None:
    """Train exits on a frozen backbone and save them as an artifact."""
    from dynamax_llm.training.presets import PRESETS, Preset

    plan = Preset(exit_layers, {}, {}) if preset is None else PRESETS.lookup(preset)
    if opt.was_given(context, "exit_layers"):
        plan = replace(plan, exits=exit_layers)
    training = plan.train_settings(**settings)
    lesson = Lesson.of(data, text_field, learn, answering)

    from dynamax_llm.backbones import adapt
    from dynamax_llm.cli.trained import report
    from dynamax_llm.exits.artifact import MANIFEST, TENSORS
    from dynamax_llm.exits.files import prepare_folder
    from dynamax_llm.training.parallel import Group
    from dynamax_llm.training.trainer import train as train_exits

    if tail_layers is not None:
        config = {**config, "tail_layers": tail_layers}
    exits = plan.exit_config(peek_backbone(model).num_hidden_layers, **config)
    lesson.read()
    with no_empty_folder(out):
        prepare_folder(out, (MANIFEST, TENSORS))
        group = Group.join(cpu=place.get("device") == "cpu")
        lm, tokenizer = load_backbone(model, place)
        source = lesson.source(lm, tokenizer, out, group)
        trained = train_exits(adapt(lm), tokenizer, source, exits, training, out)
    if group.main:
        report(trained, model, out)
