"""The run of a tuning: measure, train, save, load what was saved and measure that; resumable at any moment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.errors import UsageError
from dynamax_llm.progress import TokenBar
from dynamax_llm.text.batches import first_batches
from dynamax_llm.text.sources import Source
from dynamax_llm.training.run import Checkpoint, identity, run, splits, versions
from dynamax_llm.training.tuning.folder import card, check_free, publish, stage, summary, table, work_folder
from dynamax_llm.training.tuning.learner import TuneLearner
from dynamax_llm.training.tuning.measure import Figures, measure
from dynamax_llm.training.tuning.settings import TuneSettings
from dynamax_llm.training.tuning.student import student


@dataclass(frozen=True)
class Tuned:
    """Where the tuned model is, what was measured on held-out text before and after, and the whole record."""

    folder: Path
    before: Figures
    after: Figures
    kept: float  # share of held-out tokens at which the tuned full model gives the original's token
    record: dict[str, Any]


def tune(
    backbone: Backbone,
    tokenizer: Any,
    source: Source,
    layers: tuple[int, ...],
    settings: TuneSettings,
    out: str | Path,
    dtype: torch.dtype | None = None,
) -> Tuned:
    """Tune a copy of the backbone for exits after ``layers`` (from 1), and save it as a Hugging Face folder in ``out``.

    The model itself is never changed. ``dtype`` is that of the saved weights, the model's own if None. The same call
    again resumes a run that was killed. The figures after are those of the saved folder, loaded anew.

    Raises ArtifactError for a folder that is not empty or cannot be written, DataError for unusable text, UsageError
    for exits outside 1..L-1, a missing peft, a loss that is NaN or infinite, or a folder that holds another run.
    """
    if not layers or sorted(set(layers)) != list(layers) or not 1 <= layers[0] <= layers[-1] < backbone.n_layers:
        raise UsageError(f"exits {layers!r}: give layers between 1 and {backbone.n_layers - 1}, rising, each once.")
    target = check_free(out)
    stream, held_out = splits(source, tokenizer, backbone, settings)
    held = first_batches(held_out, settings.eval_tokens)
    dtype = dtype or backbone.dtype
    work = work_folder(target)
    checkpoint = Checkpoint(work, identity(backbone, source, settings, layers=list(layers), dtype=str(dtype)))
    with TokenBar(settings.max_tokens, 0, settings.quiet, "tuning") as bar:
        bar.stage("measuring the model before")
        before = measure(backbone, held, layers, settings.agreement)
        with student(backbone, settings) as trained:
            learner = TuneLearner(trained, layers, settings)
            counters = run(learner, stream, checkpoint, settings, bar)
            history, size = learner.history, sum(parameter.numel() for parameter in trained.parameters.values())
            staged = stage(backbone.model, trained.weights(), tokenizer, dtype, work)
        del learner, trained  # makes room for the model that is measured
        bar.stage("measuring the model after")
        after = measure(_reload(staged, backbone), held, layers, settings.agreement)
    kept = float((after.choices == before.choices).double().mean())
    record = {
        "model": backbone.model.config.name_or_path,
        "data": source.spec,
        "layers": list(layers),
        "settings": settings.deciding(),
        "tokens": counters.tokens,
        "steps": counters.steps,
        "wall_seconds": round(counters.seconds, 1),
        "trained_parameters": size,
        "history": history,
        "before": before.to_json(),
        "after": after.to_json(),
        "tokens_kept": kept,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(backbone.device),
        "versions": versions(*(("peft",) if settings.method == "lora" else ())),
    }
    publish(work, target, record, card(record, table(before, after, layers), summary(before, after, kept)))
    return Tuned(target, before, after, kept, record)


def _reload(folder: Path, like: Backbone) -> Backbone:
    """The staged model as its users will load it, in the dtype and on the device of the original."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=like.dtype, use_safetensors=True)
    return adapt(model.to(like.device).eval())
