"""``dynamax train``: exits for a frozen backbone, from text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from dynamax_llm.cli.options import Device, Dtype, Model, load_backbone, peek_backbone
from dynamax_llm.errors import UsageError

_SCALES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def train(
    model: Model,
    data: Annotated[
        str,
        typer.Option(help="A .jsonl, .jsonl.xz or .txt file, a folder of them, or a dataset id.", metavar="PATH|ID"),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the exits; the same command again resumes a killed run.")],
    head: Annotated[str, typer.Option(help="Exit head: linear, mlp, transformer or mamba.", metavar="NAME")] = "mamba",
    exits: Annotated[
        str, typer.Option(help="Where exits sit: layers (8,12) or shares of the depth (1/2,0.75).", metavar="LAYERS")
    ] = "1/2,5/8,3/4,7/8",
    inputs: Annotated[
        str, typer.Option(help="What the head reads: hidden (h), signals (statistics of the readout), or both.")
    ] = "hidden,signals",
    readout: Annotated[
        str, typer.Option(help="How an exit speaks: head, tail (last layers first) or lens (learned).", metavar="NAME")
    ] = "head",
    tail_layers: Annotated[int, typer.Option(help="Layers of the tail readout.")] = 1,
    candidates: Annotated[
        int, typer.Option(help="Later exits look only at the first one's so many likeliest tokens; 0: at all.")
    ] = 64,
    label: Annotated[
        str,
        typer.Option(help="action: the exit gives the full model's token; topk: the paper's label.", metavar="NAME"),
    ] = "action",
    label_k: Annotated[int, typer.Option(help="k of the topk label.")] = 15,
    tokens: Annotated[
        str, typer.Option(help="Training tokens: 300k, 1M, 2.5M … Data repeats if it is shorter.")
    ] = "1M",
    seq_length: Annotated[int, typer.Option(help="Tokens of a chunk of text, at most.")] = 512,
    batch: Annotated[int, typer.Option(help="Tokens of a step, padding included; at least one chunk.")] = 4096,
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
    from dynamax_llm.cli.trained import on_policy, report
    from dynamax_llm.exits.artifact import MANIFEST, TENSORS
    from dynamax_llm.exits.config import ExitConfig, place_exits
    from dynamax_llm.exits.files import prepare_folder
    from dynamax_llm.exits.heads import BANKS
    from dynamax_llm.training.settings import TrainSettings
    from dynamax_llm.training.sources import find_source
    from dynamax_llm.training.trainer import train as train_exits

    # Whatever can be wrong is found before the backbone is loaded, which may take minutes.
    settings = TrainSettings(
        max_tokens=count(tokens),
        sequence=seq_length,
        batch_tokens=batch,
        lr=lr,
        seed=seed,
        held_out=heldout,
        patience=patience,
    )
    BANKS.lookup(head)
    n_layers = peek_backbone(model).num_hidden_layers
    places = place_exits(exits, n_layers)
    seen = tuple(item.strip() for item in inputs.split(","))
    shape: dict[str, Any] = {"readout": readout, "tail_layers": tail_layers, "candidates": candidates}
    config = ExitConfig(places, n_layers, head=head, inputs=seen, label=label, label_k=label_k, **shape)
    source = find_source(data, text_field)
    prepare_folder(out, (MANIFEST, TENSORS))
    lm, tokenizer = load_backbone(model, dtype, device)
    try:
        trained = train_exits(adapt(lm), tokenizer, source, config, settings, out)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command continues where it stopped", err=True)
        raise typer.Exit(130) from None
    report(trained, model, out, on_policy(adapt(lm), tokenizer, source, settings, trained))


def count(text: str) -> int:
    """A number of tokens from ``300k``, ``1M``, ``2.5M``, ``1_000_000``. Raises UsageError."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)\s*([kmbg]?)", text.strip(), flags=re.IGNORECASE)
    number = int(float(match[1].replace("_", "")) * _SCALES[match[2].lower()]) if match else 0
    if number < 1:
        raise UsageError(f"tokens {text!r}: give a positive number such as 300k, 1M or 2500000.")
    return number
