"""``dynamax train``: exits for a frozen backbone, from text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dynamax_llm.cli import options as opt
from dynamax_llm.cli.backbone import load_backbone, no_empty_folder, peek_backbone
from dynamax_llm.cli.learn import Lesson
from dynamax_llm.errors import UsageError
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
    "candidates": Option(
        "Later exits read only this many of the first one's likeliest tokens; 0: the whole vocabulary.", least=0
    ),
}


Data = Annotated[
    str,
    typer.Option(
        help="A .jsonl, .jsonl.xz or .txt file, a folder of them, or a dataset id; with --answers, prompts: "
        "records with prompt, messages or question, or a .txt file of one a line.",
        metavar="PATH|ID",
    ),
]
PresetName = Annotated[
    str | None,
    typer.Option(help="Start from a named set of options (dynamax-paper); those given here win.", metavar="NAME"),
]
Readouts = Annotated[
    str,
    typer.Option(
        help="How an exit makes logits: head, tail (last layers first), lens (learned), block (a learned one), or "
        "draft, which runs no layer and whose tokens the model checks. Several (block,draft) learn in one pass and "
        "get a folder each below --out.",
        metavar="NAMES",
    ),
]
TailLayers = Annotated[
    int | None, typer.Option(help="Layers of the tail readout. Default: its own.", metavar="INTEGER")
]
BlockKind = Annotated[
    str | None,
    typer.Option(help="Blocks of block and draft: transformer or mamba. Default: transformer.", metavar="NAME"),
]
Vocabulary = Annotated[
    int | None,
    typer.Option(help="Most frequent tokens that block and draft speak; 0: all. Default: their own.", metavar="N"),
]


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
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the exits; the same command again resumes a killed run.")],
    exit_layers: opt.ExitLayers = opt.DEFAULT_LAYERS,
    preset: PresetName = None,
    readout: Readouts = ExitConfig.readout,
    tail_layers: TailLayers = None,
    block: BlockKind = None,
    vocabulary: Vocabulary = None,
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
    names = _readouts(readout if opt.was_given(context, "readout") else plan.config.get("readout", readout))
    own = {"tail_layers": tail_layers, "block": block, "vocabulary": vocabulary}
    config = {**config, **_readout_options(names, own)}
    training = plan.train_settings(**settings)
    lesson = Lesson.of(data, text_field, learn, answering)

    n_layers = peek_backbone(model).num_hidden_layers
    configs = {name: plan.exit_config(n_layers, **{**config, "readout": name}) for name in names}
    lesson.read()
    _train(model, configs, training, lesson, out, place)


def _train(
    model: str,
    configs: dict[str, ExitConfig],
    training: TrainSettings,
    lesson: Lesson,
    out: Path,
    place: opt.Given,
) -> None:
    """Train one configuration in ``out``, or several in folders of their own below it, and report."""
    from dynamax_llm.backbones import adapt
    from dynamax_llm.cli.trained import report
    from dynamax_llm.exits.artifact import MANIFEST, TENSORS
    from dynamax_llm.exits.files import prepare_folder
    from dynamax_llm.training.parallel import Group
    from dynamax_llm.training.trainer import train, train_many

    folders = {name: out if len(configs) == 1 else out / name for name in configs}
    with no_empty_folder(out):
        for folder in folders.values():
            with no_empty_folder(folder):
                prepare_folder(folder, (MANIFEST, TENSORS))
        group = Group.join(cpu=place.get("device") == "cpu")
        lm, tokenizer = load_backbone(model, place)
        backbone, source = adapt(lm), lesson.source(lm, tokenizer, out, group)
        if len(configs) == 1:
            ((name, config),) = configs.items()
            trained = {name: train(backbone, tokenizer, source, config, training, out)}
        else:
            trained = train_many(backbone, tokenizer, source, configs, training, out, decode=True)
    for name in configs if group.main else ():
        report(trained[name], model, folders[name])


def _readouts(text: str) -> tuple[str, ...]:
    """The readouts of a comma list, each once. Raises UsageError."""
    names = opt.items(text)
    problem = Option("", choices=tuple(READOUTS)).problem(names or text)
    if problem is not None:
        raise UsageError(f"--readout {text!r}: {problem}")
    if len(set(names)) < len(names):
        raise UsageError(f"--readout {text!r}: name each readout once.")
    return names


def _readout_options(names: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options given, all of which a readout takes. Raises UsageError for one that none takes."""
    given = {name: value for name, value in options.items() if value is not None}
    for option, value in given.items():
        takers = [name for name, kind in READOUTS.items() if option in {field.name for field in fields(kind.Options)}]
        if not set(takers) & set(names):
            raise UsageError(
                f"--{option.replace('_', '-')} {value!r}: the readout {','.join(names)} has no such option; "
                f"{' and '.join(takers)} {'has' if len(takers) == 1 else 'have'}. Leave it out, or give --readout."
            )
    return given
