"""The run of a tuning: measure, train, save, load what was saved and measure that; resumable at any moment."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.backbones.fingerprint import fingerprint
from dynamax_llm.errors import UsageError
from dynamax_llm.progress import TokenBar
from dynamax_llm.text.batches import Batch, Position, Split, first_batches
from dynamax_llm.text.sources import Source
from dynamax_llm.training.checkpoint import Checkpoint
from dynamax_llm.training.tuning.folder import card, check_free, publish, stage, summary, table, work_folder
from dynamax_llm.training.tuning.learner import TuneLearner
from dynamax_llm.training.tuning.measure import Figures, measure
from dynamax_llm.training.tuning.settings import TuneSettings
from dynamax_llm.training.tuning.student import Student, student

#: Entries of the training loss in the record, about.
HISTORY = 20
#: A checkpoint may take this share of the time at most: writing all weights of a large model takes long.
CHECKPOINT_SHARE = 0.1


@dataclass(frozen=True)
class Tuned:
    """Where the tuned model is, what was measured on held-out text before and after, and the whole record."""

    folder: Path
    before: Figures
    after: Figures
    kept: float  # share of held-out tokens at which the tuned full model says what the original says
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
    for exits outside 1..L-1, a missing peft, a loss that is no number, or a folder in which another run was begun.
    """
    if not layers or sorted(set(layers)) != list(layers) or not 1 <= layers[0] <= layers[-1] < backbone.n_layers:
        raise UsageError(f"exits {layers!r}: give layers between 1 and {backbone.n_layers - 1}, rising, each once.")
    target = check_free(out)
    sequence = min(settings.sequence, backbone.max_positions() or settings.sequence)
    split = (settings.held_out, sequence, settings.batch_tokens, settings.seed)
    held = first_batches(Split(source, tokenizer, True, *split), settings.eval_tokens)
    dtype = dtype or backbone.dtype
    identity = _identity(backbone, source, layers, settings, dtype)
    work = work_folder(target)
    before = measure(backbone, held, layers, settings.agreement)
    stream = Split(source, tokenizer, False, *split)
    with student(backbone, settings) as pupil:
        run = _Run(pupil, stream, layers, settings, Checkpoint(work, identity))
        run.finish()
        trained = run.record()
        staged = stage(backbone.model, pupil.weights(), tokenizer, dtype, work)
    del run, pupil  # makes room for the model that is measured
    after = measure(_reload(staged, backbone), held, layers, settings.agreement)
    kept = float((after.choices == before.choices).double().mean())
    record = {
        "model": backbone.model.config.name_or_path,
        "data": source.spec,
        "layers": list(layers),
        "settings": settings.deciding(),
        **trained,
        "before": before.to_json(),
        "after": after.to_json(),
        "tokens_kept": kept,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(backbone.device),
        "versions": _versions(settings),
    }
    publish(work, target, record, card(record, table(before, after, layers), summary(before, after, kept)))
    return Tuned(target, before, after, kept, record)


class _Run:
    """The mutable state of one tuning."""

    def __init__(
        self, pupil: Student, stream: Split, layers: tuple[int, ...], settings: TuneSettings, checkpoint: Checkpoint
    ) -> None:
        self.stream, self.settings, self.checkpoint = stream, settings, checkpoint
        self.learner = TuneLearner(pupil, layers, settings)
        self.position = Position()
        self.tokens, self.steps, self.seconds = 0, 0, 0.0
        self.history: list[dict[str, Any]] = []
        self._restore()

    def finish(self) -> None:
        """Train to the end of the budget; an interruption is saved first."""
        with TokenBar(self.settings.max_tokens, self.tokens, self.settings.quiet) as bar:
            try:
                self._loop(bar)
            except KeyboardInterrupt:
                self.save()
                raise
        self.save()

    def _loop(self, bar: TokenBar) -> None:
        begun = saved = time.monotonic()
        before, patience = self.seconds, self.settings.checkpoint_seconds
        for batch, position in self.stream.batches(self.position):
            if self.tokens >= self.settings.max_tokens:
                break
            self._step(batch)
            self.position = position
            now = time.monotonic()
            self.seconds = before + now - begun
            bar.show(self.tokens, lambda: ("tuning", f"loss {self.learner.loss:.3f}"))
            if now - saved >= patience:
                self.save()
                saved = time.monotonic()
                patience = max(self.settings.checkpoint_seconds, (saved - now) / CHECKPOINT_SHARE)

    def _step(self, batch: Batch) -> None:
        self.learner.step(batch, self.steps, self.tokens / self.settings.max_tokens)
        self.tokens += batch.tokens
        self.steps += 1
        if self.tokens >= len(self.history) * self.settings.max_tokens / HISTORY:
            self.history.append({"tokens": self.tokens, "loss": self.learner.loss})

    def record(self) -> dict[str, Any]:
        """What the run did, as JSON types."""
        return {
            "tokens": self.tokens,
            "steps": self.steps,
            "wall_seconds": round(self.seconds, 1),
            "trained_parameters": sum(parameter.numel() for parameter in self.learner.student.parameters.values()),
            "history": self.history,
        }

    def save(self) -> None:
        """Write the checkpoint."""
        state = {"position": [self.position.epoch, self.position.document, self.position.batch]}
        self.checkpoint.save(self.learner.tensors(), state | {name: getattr(self, name) for name in _COUNTERS})

    def _restore(self) -> None:
        """Go on where the checkpoint left off, if there is one."""
        found = self.checkpoint.load()
        if found is None:
            return
        tensors, state = found
        self.learner.restore(tensors)
        self.position = Position(*state["position"])
        for name in _COUNTERS:
            setattr(self, name, state[name])


#: Attributes of a run that a checkpoint keeps as they are.
_COUNTERS = ("tokens", "steps", "seconds", "history")


def _reload(folder: Path, like: Backbone) -> Backbone:
    """The staged model as its users will load it, in the dtype and on the device of the original."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=like.dtype, use_safetensors=True)
    return adapt(model.to(like.device).eval())


def _versions(settings: TuneSettings) -> dict[str, str]:
    libraries = ("torch", "transformers", *(("peft",) if settings.method == "lora" else ()))
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in libraries}}


def _identity(
    backbone: Backbone, source: Source, layers: tuple[int, ...], settings: TuneSettings, dtype: torch.dtype
) -> dict[str, Any]:
    """Everything that decides the result of a run, for its checkpoint."""
    return {
        "backbone": fingerprint(backbone.model),
        "data": source.spec,
        "text_field": source.text_field,
        "data_bytes": sum(path.stat().st_size for path in source.files),
        "layers": list(layers),
        "settings": settings.deciding(),
        "dtype": str(dtype),
    }
