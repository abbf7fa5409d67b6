"""``dynamax train``: exits for a frozen backbone, from text."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamax_llm.cli.options import Device, Dtype, Model, load_backbone, peek_backbone
from dynamax_llm.errors import UsageError

if TYPE_CHECKING:
    from dynamax_llm.training.presets import Preset

#: Options that are fields of the exits' configuration, and of the training's settings (by another name, some).
_CONFIG = {"head", "inputs", "readout", "tail_layers", "candidates"}
_SETTINGS = {
    "tokens": "max_tokens",
    "seq_length": "sequence",
    "batch": "batch_tokens",
    "documents": "documents",
    "label": "label",
    "label_k": "label_k",
    "optimiser": "optimiser",
    "lr": "lr",
    "seed": "seed",
    "on_policy": "on_policy",
    "heldout": "held_out",
    "patience": "patience",
}
_SCALES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}

Inputs = Annotated[
    str,
    typer.Option(help="What the head reads: hidden (h), signals (statistics of the readout), tokens (its leaders)."),
]
Label = Annotated[
    str,
    typer.Option(
        help="action: the exit gives the full model's token; probability, overlap: soft; topk: the paper's.",
        metavar="NAME",
    ),
]
OnPolicy = Annotated[
    float,
    typer.Option("--on-policy", help="Share of the budget for a second pass, on text decoded by the heads."),
]
Candidates = Annotated[
    int, typer.Option(help="Later exits look only at the first one's so many likeliest tokens; 0: at all.")
]


def train(
    context: typer.Context,
    model: Model,
    data: Annotated[
        str,
        typer.Option(help="A .jsonl, .jsonl.xz or .txt file, a folder of them, or a dataset id.", metavar="PATH|ID"),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the exits; the same command again resumes a killed run.")],
    head: Annotated[str, typer.Option(help="Exit head: linear, mlp, transformer or mamba.", metavar="NAME")] = "mlp",
    exits: Annotated[
        str, typer.Option(help="Where exits sit: layers (8,12) or shares of the depth (1/2,0.75).", metavar="LAYERS")
    ] = "1/4,3/8,1/2,5/8,3/4,7/8",
    inputs: Inputs = "hidden,signals,tokens",
    readout: Annotated[
        str, typer.Option(help="How an exit speaks: head, tail (last layers first) or lens (learned).", metavar="NAME")
    ] = "head",
    tail_layers: Annotated[int, typer.Option(help="Layers of the tail readout.")] = 1,
    candidates: Candidates = 256,
    label: Label = "action",
    label_k: Annotated[int, typer.Option(help="k of the topk label.")] = 15,
    on_policy: OnPolicy = 0.0,
    preset: Annotated[
        str | None,
        typer.Option(help="Start from a named set of options (dynamax-paper); those given here win.", metavar="NAME"),
    ] = None,
    tokens: Annotated[
        str, typer.Option(help="Training tokens: 300k, 1M, 2.5M … Data repeats if it is shorter.")
    ] = "1M",
    seq_length: Annotated[int, typer.Option(help="Tokens of a chunk of text, at most.")] = 512,
    batch: Annotated[int, typer.Option(help="Tokens of a step, padding included; at least one chunk.")] = 4096,
    documents: Annotated[
        int | None, typer.Option(help="A budget in documents instead: one a step, cut to --seq-length.", min=1)
    ] = None,
    optimiser: Annotated[str, typer.Option(help="adamw or schedule-free.", metavar="NAME")] = "adamw",
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Seed of weights, data order and draws.")] = 0,
    heldout: Annotated[float, typer.Option(help="Share of the documents kept for evaluation.")] = 0.05,
    patience: Annotated[int, typer.Option(help="Evaluations without improvement before training stops.")] = 5,
    text_field: Annotated[
        str | None, typer.Option(help="Field of a .jsonl or dataset record that holds the text.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Train exits on a frozen backbone and save them as an artifact."""
    from dynamax_llm.backbones import adapt
    from dynamax_llm.cli.trained import report
    from dynamax_llm.exits.artifact import MANIFEST, TENSORS
    from dynamax_llm.exits.files import prepare_folder
    from dynamax_llm.exits.registries import HEADS
    from dynamax_llm.text.sources import find_source
    from dynamax_llm.training.parallel import Group
    from dynamax_llm.training.trainer import train as train_exits

    # Whatever can be wrong is found before the backbone is loaded, which may take minutes.
    HEADS.lookup(head)
    plan, given = chosen(context, preset)
    settings = plan.train_settings(**{_SETTINGS[name]: given[name] for name in _SETTINGS.keys() & given})
    n_layers = peek_backbone(model).num_hidden_layers
    config = plan.exit_config(n_layers, **{name: given[name] for name in _CONFIG & given.keys()})
    source = find_source(data, text_field)
    prepare_folder(out, (MANIFEST, TENSORS))
    group = Group.join(cpu=device == "cpu")
    lm, tokenizer = load_backbone(model, dtype, device)
    try:
        trained = train_exits(adapt(lm), tokenizer, source, config, settings, out)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command continues where it stopped", err=True)
        raise typer.Exit(130) from None
    if not group.main:
        return
    report(trained, model, out)


def chosen(context: typer.Context, preset: str | None) -> tuple[Preset, dict[str, Any]]:
    """The preset (without a name: an empty one) and the options to change in it: with a name, those that were given.

    Raises UsageError for an unknown preset or a number of tokens that is none.
    """
    from dynamax_llm.training.presets import PRESETS, Preset

    values = dict(context.params)
    if preset is None:
        plan = Preset(values.pop("exits"), {}, {})
    else:
        plan = PRESETS.lookup(preset)
        values = {name: value for name, value in values.items() if _was_given(context, name)}
        plan = replace(plan, exits=values.pop("exits", plan.exits))
    if "tokens" in values:
        values["tokens"] = count(values["tokens"])
    if "inputs" in values:
        values["inputs"] = tuple(item.strip() for item in values["inputs"].split(","))
    return plan, values


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def count(text: str) -> int:
    """A number of tokens from ``300k``, ``1M``, ``2.5M``, ``1_000_000``. Raises UsageError."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)\s*([kmbg]?)", text.strip(), flags=re.IGNORECASE)
    number = int(float(match[1].replace("_", "")) * _SCALES[match[2].lower()]) if match else 0
    if number < 1:
        raise UsageError(f"tokens {text!r}: give a positive number such as 300k, 1M or 2500000.")
    return number
