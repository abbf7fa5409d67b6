"""The result of a tuning on disk: a plain Hugging Face folder, which appears whole or not at all.

Everything is written beside the target, in a hidden folder that also holds the checkpoint of the run; one rename
then makes it the target.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamax_llm.errors import ArtifactError
from dynamax_llm.exits.files import prepare_folder
from dynamax_llm.training.tuning.measure import Figures

RECORD = "tuning.json"
MODEL = "model"


def check_free(out: str | Path) -> Path:
    """The target. Raises ArtifactError if it is a file or a folder with anything in it; makes nothing."""
    target = Path(out).expanduser().resolve()
    if target.is_dir() and any(target.iterdir()):
        held = ", ".join(sorted(item.name for item in target.iterdir())[:3])
        raise ArtifactError(f"{str(out)!r} is not empty (it holds {held}). Give a new folder for the tuned model.")
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"{str(out)!r} is a file. Give a new folder for the tuned model.")
    return target


def work_folder(target: Path) -> Path:
    """Where the run keeps its checkpoint and its unfinished result. Raises ArtifactError if it cannot be written."""
    return prepare_folder(target.parent / f".{target.name}.tuning", (MODEL,))


def stage(model: PreTrainedModel, weights: dict[str, Tensor], tokenizer: Any, dtype: torch.dtype, work: Path) -> Path:
    """The tuned model and its tokenizer in the work folder, floating-point weights in ``dtype``; returns where."""
    folder = work / MODEL
    shutil.rmtree(folder, ignore_errors=True)
    try:
        model.save_pretrained(folder, state_dict=_stored(weights, dtype))
        config = folder / "config.json"  # save_pretrained records the dtype of the model in memory
        fields = json.loads(config.read_text(encoding="utf-8")) | {"dtype": str(dtype).removeprefix("torch.")}
        config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(folder)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {folder} ({error.strerror or error}). Free some space or give another folder."
        ) from error
    return folder


def _stored(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in the dtype they are saved in; names that share a tensor still share one, and it is saved once."""
    stored: dict[tuple[int, torch.Size], Tensor] = {}
    for weight in weights.values():
        target = dtype if weight.is_floating_point() else weight.dtype
        stored.setdefault((weight.data_ptr(), weight.shape), weight.detach().to(target))
    return {name: stored[weight.data_ptr(), weight.shape] for name, weight in weights.items()}


def publish(work: Path, target: Path, record: dict[str, Any], card: str) -> None:
    """Add the record and the model card, and make the staged folder the target."""
    staged = work / MODEL
    (staged / RECORD).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (staged / "README.md").write_text(card, encoding="utf-8")
    check_free(target)
    os.replace(staged, target)
    shutil.rmtree(work)


def table(before: Figures, after: Figures, layers: tuple[int, ...]) -> list[tuple[str, ...]]:
    """Rows of (layer, depth, loss before, after, agreement before, after); trained exits are marked with *."""
    count = len(before.loss_per_layer)
    columns = (before.loss_per_layer, after.loss_per_layer, before.agreement_per_layer, after.agreement_per_layer)
    return [
        (f"{index}*" if index in layers else str(index), f"{index / count:.3f}", *(f"{value:.3f}" for value in values))
        for index, values in enumerate(zip(*columns, strict=True), start=1)
    ]


def summary(before: Figures, after: Figures, kept: float) -> list[tuple[str, str, str]]:
    """Rows of (figure, before, after) of the whole model."""

    def row(name: str, field: str) -> tuple[str, str, str]:
        return name, f"{getattr(before, field):.4f}", f"{getattr(after, field):.4f}"

    return [
        row("full model's loss, nats per token", "loss"),
        row("trained exits' loss, weighted by depth", "exit_loss"),
        row("oracle mean depth, all layers", "oracle_depth"),
        row("oracle mean depth, trained exits", "oracle_depth_at_exits"),
        row(f"margin rule's mean depth at {before.agreement:.0%} agreement", "margin_depth"),
        ("full model's tokens that are the original's", "1.0000", f"{kept:.4f}"),
    ]


HEADER = ("layer", "depth", "loss before", "loss after", "agreement before", "agreement after")


def card(record: dict[str, Any], rows: list[tuple[str, ...]], figures: list[tuple[str, str, str]]) -> str:
    """The model card, every number of it taken from the record."""
    settings = record["settings"]
    how = f"LoRA of rank {settings['rank']}, merged" if settings["method"] == "lora" else "all weights"

    def markdown(header: tuple[str, ...], lines: list[Any]) -> str:
        rule = "|".join(["---"] * len(header))
        return "\n".join(["| " + " | ".join(line) + " |" for line in (header, *lines)]).replace(
            "|\n", f"|\n|{rule}|\n", 1
        )

    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [early-exit]
---

# {Path(record["model"]).name or "A model"}, tuned for early exits

`{record["model"]}` after `dynamax tune` on `{record["data"]}`: {how}, {record["tokens"]:,} tokens, exits after layers
{", ".join(map(str, record["layers"]))} ({settings["schedule"]}), {settings["distil"]:.0%} of the loss distillation from
the {settings["teacher"]} last layer. A stock model: any tool that takes the original takes it. The original's licence
and limits apply. Settings and figures: `{RECORD}`.

On {record["before"]["tokens"]:,} held-out tokens, teacher-forced:

{markdown(("", "before", "after"), figures)}

{markdown(HEADER, rows)}

Agreement is with the model's own last layer. * marks trained exits.
"""
