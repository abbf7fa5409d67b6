"""Training exits on a frozen backbone: one streaming pass, any number of heads, resumable at any moment.

Each batch is harvested and used at once; nothing but checkpoints touches the disk. Heads that share exits, readout
and labels share the exit batch, because the frozen forward is the cost. With the ``lens`` readout the translators are
trained first, on their own share of the budget, and the heads then learn labels that come from them. Started by
``accelerate launch``, several processes share every batch (``parallel``); the first of them writes.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.backbones.fingerprint import fingerprint
from dynamax_llm.errors import UsageError
from dynamax_llm.exits.artifact import MANIFEST, TENSORS, Exits
from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.config import INPUTS, ExitConfig
from dynamax_llm.exits.files import prepare_folder
from dynamax_llm.exits.readouts.base import build_readout
from dynamax_llm.exits.registries import READOUTS
from dynamax_llm.progress import TokenBar
from dynamax_llm.text.batches import Batch, Position, Split, first_batches
from dynamax_llm.text.sources import Source
from dynamax_llm.traces.collect import ExitBatch, collect_exits
from dynamax_llm.traces.drift import drift_penalty
from dynamax_llm.traces.on_policy import collect_on_policy
from dynamax_llm.traces.simulate import ThresholdSample
from dynamax_llm.training.aside import Aside
from dynamax_llm.training.checkpoint import Checkpoint
from dynamax_llm.training.held_out import HeldOut, evaluate, on_policy
from dynamax_llm.training.learner import Learner, part
from dynamax_llm.training.lens import LEARNERS
from dynamax_llm.training.optimiser import averaged
from dynamax_llm.training.parallel import Group
from dynamax_llm.training.settings import TrainSettings

#: What heads must have in common to learn from one exit batch.
SHARED = ("layers", "n_layers", "readout", "readout_options", "candidates", "labels", "shortlist")


def train(
    backbone: Backbone, tokenizer: Any, source: Source, config: ExitConfig, settings: TrainSettings, out: str | Path
) -> Exits:
    """Train the heads of one configuration and save the exits in ``out``; the same call again resumes.

    Raises DataError for unusable text, UsageError for settings that cannot be used or a folder that holds another
    run, ArtifactError for a folder that cannot be written.
    """
    target = prepare_folder(out, (MANIFEST, TENSORS))
    run = _Run(backbone, tokenizer, source, {"": config}, settings, target)
    exits = run.finish()[""]
    if run.group.main:
        exits.save(target)
    return exits


def train_many(
    backbone: Backbone,
    tokenizer: Any,
    source: Source,
    configs: Mapping[str, ExitConfig],
    settings: TrainSettings,
    out: str | Path,
) -> dict[str, Exits]:
    """Train several configurations in one pass over the data; each is saved in ``out``/name. Otherwise as ``train``."""
    folders = {name: prepare_folder(Path(out) / name, (MANIFEST, TENSORS)) for name in configs}
    run = _Run(backbone, tokenizer, source, configs, settings, Path(out))
    result = run.finish()
    for name, exits in result.items() if run.group.main else ():
        exits.save(folders[name])
    return result


class _Run:
    """The mutable state of one training run."""

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: Any,
        source: Source,
        configs: Mapping[str, ExitConfig],
        settings: TrainSettings,
        out: Path,
    ) -> None:
        self.config = _common(configs)
        self.backbone, self.source, self.settings = backbone, source, settings
        if settings.documents and READOUTS.lookup(self.config.readout).learner:
            raise UsageError(
                f"the readout {self.config.readout!r} takes its share of a budget in tokens: leave documents out, or "
                "use a readout without weights."
            )
        self.group, self.aside = Group.join(backbone.device.type == "cpu"), Aside(backbone.device)
        sequence = min(settings.sequence, backbone.max_positions() or settings.sequence)
        self.group.check(sequence, settings.batch_tokens)
        shape = (backbone.width, settings, backbone.device, self.group)
        self.learners = {name: Learner(config, *shape) for name, config in configs.items()}
        learner = READOUTS.lookup(self.config.readout).learner
        self.lens = LEARNERS.lookup(learner)(backbone, self.config, settings, self.group) if learner else None
        self.lens_budget = int(settings.max_tokens * settings.lens_share) if self.lens else 0
        self.readout = build_readout(backbone, self.config, self.lens.weights if self.lens else None)
        split = (settings.held_out, sequence, settings.batch_tokens, settings.seed, settings.documents is not None)
        self.stream = Split(source, tokenizer, False, *split)
        held = first_batches(Split(source, tokenizer, True, *split), settings.eval_tokens)
        self.held = HeldOut(held, self._harvest, self.group)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.position = Position()
        self.tokens, self.steps, self.seconds = 0, 0, 0.0
        self.next_evaluation = self.lens_budget + settings.eval_every
        self.divergence: dict[str, list[float]] = {}
        self.again = False  # whether the second pass, on policy, has begun
        self.checkpoint = Checkpoint(out, _identity(backbone, source, configs, settings))
        self._restore()

    def _harvest(self, batch: Batch) -> ExitBatch:
        return collect_exits(self.backbone, self.readout, batch)

    def finish(self) -> dict[str, Exits]:
        """Train to the end of the budget, or until every head has stopped; returns the best of each."""
        if self.tokens == 0 and self.lens:
            self.divergence["before"] = self.lens.measure(self.held.batches)
        quiet = self.settings.quiet or not self.group.main
        with TokenBar(self.settings.max_tokens, self.tokens, quiet) as bar:
            try:
                self._loop(bar)
            except KeyboardInterrupt:
                self.save()
                raise
        self.save()
        return {name: self._exits(name) for name in self.learners}

    def _loop(self, bar: TokenBar) -> None:
        begun = saved = time.monotonic()
        before = self.seconds
        for batch, position in self.stream.batches(self.position):
            if self._done():
                break
            self._step(batch)
            self.position = position
            now = time.monotonic()
            self.seconds = before + now - begun
            bar.show(self.tokens, self._note)
            if now - saved >= self.settings.checkpoint_seconds:
                self.save()
                saved = time.monotonic()

    def _done(self) -> bool:
        stopped = all(one.stopped for one in self.learners.values())
        return self._spent() or (stopped and (self.again or not self.settings.on_policy))

    def _spent(self) -> bool:
        """Whether the budget is used up."""
        return self.tokens >= self.settings.max_tokens or self.steps == self.settings.documents

    def _progress(self) -> float:
        """The share of the heads' budget that is used up."""
        progress = (self.tokens - self.lens_budget) / (self.settings.max_tokens - self.lens_budget)
        return max(progress, self.steps / self.settings.documents) if self.settings.documents else progress

    def _begin_again(self) -> None:
        """Begin the second pass when its share of the budget is what is left, or the first has nothing to add."""
        if self.again or not self.settings.on_policy:
            return
        stopped = all(one.stopped for one in self.learners.values())
        if stopped or self._progress() >= 1 - self.settings.on_policy:
            self.again = True
            for learner in self.learners.values():
                learner.begin_again()
            self._evaluate()  # what the first pass is worth on policy, to compare with

    def _step(self, batch: Batch) -> None:
        """One batch through lens or heads, and an evaluation where one is due."""
        if self.lens and self.tokens < self.lens_budget:
            self.lens.step(batch, self.tokens / self.lens_budget)
        else:
            if self.lens and "after" not in self.divergence:
                self.divergence["after"] = self.lens.measure(self.held.batches)
            self._learn(batch)
        self.tokens += batch.tokens
        self.steps += 1
        if self.tokens >= self.next_evaluation or self._spent():
            self._evaluate()
            while self.next_evaluation <= self.tokens:
                self.next_evaluation += self.settings.eval_every

    def _harvest_again(self, estimator: ConfidenceEstimator, batch: Batch, draw: ThresholdSample) -> ExitBatch:
        return collect_on_policy(self.backbone, self.readout, estimator, batch, draw)

    def _learn(self, batch: Batch) -> None:
        """One step of every head that still learns, from this process's share of the batch."""
        self._begin_again()
        own = self.group.share(batch)
        made = None if self.again else self._harvest(own)
        draw = ThresholdSample.sample(batch.mask, self.settings.never, self.generator).rows(
            self.group.rows(len(batch.ids))
        )
        progress = self._progress()

        def work() -> None:
            for learner in self.learners.values():
                if not learner.stopped:
                    met = self._harvest_again(learner.heads, own, draw) if made is None else made
                    learner.step(met, draw, progress)

        self.aside.run(work, made)

    def _evaluate(self) -> None:
        self.aside.join()
        active = {name: learner for name, learner in self.learners.items() if not learner.stopped}
        estimators = {name: learner.heads for name, learner in active.items()}
        weights = {name: learner.weights() for name, learner in active.items()}
        settings = self.settings
        again = self._harvest_again if self.again else None
        with ExitStack() as stack:
            for learner in active.values():
                stack.enter_context(averaged(learner.optimiser))
            reports = evaluate(estimators, weights, self.held, self.config, settings.never, settings.agreement, again)
            for name, learner in active.items():
                learner.decide_by({"on_policy": self.again, **reports[name]}, self.tokens)

    def _note(self) -> tuple[str, str]:
        """What the bar says: the phase, and the latest figures. Waits for the device."""
        self.aside.join()
        if self.lens and self.tokens < self.lens_budget:
            return "lens", f"KL {sum(self.lens.divergence) / len(self.lens.divergence):.3f}"
        notes = []
        for name, learner in self.learners.items():
            latest = learner.history[-1] if learner.history else None
            shown = f"{name or learner.config.head}: loss {learner.train_loss or 0:.3f}"
            notes.append(shown if latest is None else f"{shown}, depth {latest['depth']:.3f}")
        return "heads", "; ".join(notes)

    def save(self) -> None:
        """Write the checkpoint."""
        if not self.group.main:
            return
        self.aside.join()
        tensors: dict[str, Tensor] = {"generator": self.generator.get_state()}
        for name, learner in self.learners.items():
            tensors |= {f"learner.{name}.{key}": value for key, value in learner.tensors().items()}
        if self.lens:
            tensors |= {f"translators.{key}": value for key, value in self.lens.tensors().items()}
        state = {
            "position": [self.position.epoch, self.position.document, self.position.batch],
            "learners": {name: learner.state() for name, learner in self.learners.items()},
            **{name: getattr(self, name) for name in _COUNTERS},
        }
        self.checkpoint.save(tensors, state)

    def _restore(self) -> None:
        """Go on where the checkpoint left off, if there is one."""
        found = self.checkpoint.load()
        if found is None:
            return
        tensors, state = found
        self.generator.set_state(tensors["generator"])
        for name, learner in self.learners.items():
            learner.restore(part(tensors, f"learner.{name}."), state["learners"][name])
        if self.lens:
            self.lens.restore(part(tensors, "translators."))
        self.position = Position(*state["position"])
        for name in _COUNTERS:
            setattr(self, name, state[name])

    def _exits(self, name: str) -> Exits:
        self.aside.join()
        learner = self.learners[name]
        heads = learner.finished()
        best = next((report for report in learner.history if report["loss"] == learner.best_loss), {})
        held_out = dict(best)
        if heads.recurrent:
            found = on_policy(heads, self.held, self.config, self.settings.agreement)
            held_out |= {"depth": found["depth"], "threshold": found["threshold"]}
        lens = self.lens.weights.requires_grad_(False).eval() if self.lens else None
        provenance = {
            "model": self.backbone.model.config.name_or_path,
            "data": self.source.spec,
            "tokens": self.tokens,
            "steps": self.steps,
            "seed": self.settings.seed,
            "settings": self.settings.deciding(),
            "processes": self.group.size,
            "train_loss": learner.train_loss,
            "held_out": held_out,
            "history": learner.history,
            "lens_divergence": self.divergence,
            "wall_seconds": self.seconds,
            "versions": _versions(),
        }
        exits = Exits.of(self.backbone, learner.config, heads, lens, provenance)
        if learner.config.labels.kind != "topk":  # whose confidence is not about agreement: nothing can be taken off it
            readout = exits.readout(self.backbone)
            exits.drift_penalty = {"propagate": drift_penalty(self.backbone, readout, heads, self.held.batches)}
        return exits


#: Attributes of a run that a checkpoint keeps as they are.
_COUNTERS = ("tokens", "steps", "seconds", "next_evaluation", "divergence", "again")


def _common(configs: Mapping[str, ExitConfig]) -> ExitConfig:
    """A configuration that stands for all in what they share, and reads what any of them does. Raises UsageError
    where they differ."""
    first = next(iter(configs.values()), None)
    if first is None:
        raise UsageError("no exit configuration to train: give at least one.")
    for name, config in configs.items():
        if config.head is None:
            raise UsageError(
                f"exits {name!r} have head None, nothing to train. Name a head: linear, mlp, transformer, mamba."
            )
        for field in SHARED:
            if getattr(config, field) != getattr(first, field):
                raise UsageError(
                    f"exits {name!r} have {field} {getattr(config, field)!r}, others {getattr(first, field)!r}. Heads "
                    "that are trained together share exits, readout and labels: train these in a run of their own."
                )
    inputs = tuple(kind for kind in INPUTS if any(kind in config.inputs for config in configs.values()))
    return replace(first, inputs=inputs)


def _identity(
    backbone: Backbone, source: Source, configs: Mapping[str, ExitConfig], settings: TrainSettings
) -> dict[str, Any]:
    """Everything that decides the result of a run, for its checkpoint."""
    return {
        "backbone": fingerprint(backbone.model),
        "data": source.spec,
        "text_field": source.text_field,
        "data_bytes": sum(path.stat().st_size for path in source.files),
        "exits": {name: config.to_json() for name, config in configs.items()},
        "settings": settings.deciding(),
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in ("torch", "transformers")}}
