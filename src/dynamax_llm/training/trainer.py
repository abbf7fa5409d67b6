"""Training exits on a frozen backbone: one streaming pass, any number of heads, resumable at any moment.

Each batch is used as soon as it is collected; only checkpoints are written to disk. Heads that share exits, readout and
labels share the exit batch, because the frozen forward is the cost. Started by ``accelerate launch``, several processes
share every batch (``parallel``); the first of them writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynamax_llm.backbones import Backbone
from dynamax_llm.engines.plan import POLICIES, ExitPlan
from dynamax_llm.errors import UsageError
from dynamax_llm.exits.artifact import MANIFEST, TENSORS, Exits
from dynamax_llm.exits.config import INPUTS, ExitConfig
from dynamax_llm.exits.files import prepare_folder
from dynamax_llm.exits.readouts.base import build_readout
from dynamax_llm.exits.registries import READOUTS
from dynamax_llm.progress import TokenBar
from dynamax_llm.text.batches import Batch, first_batches
from dynamax_llm.text.sources import Source
from dynamax_llm.traces.drift import drift_penalty
from dynamax_llm.training.held_out import decoded_report, on_policy
from dynamax_llm.training.learner import HeadLearner
from dynamax_llm.training.parallel import Group
from dynamax_llm.training.phases import READOUT_LEARNERS, Heads, LearnReadout, Phases
from dynamax_llm.training.run import Checkpoint, Counters, identity, run, splits, versions
from dynamax_llm.training.settings import TrainSettings

#: What heads must have in common to learn from one exit batch.
SHARED = ("layers", "n_layers", "readout", "readout_options", "candidates", "shortlist")
#: Held-out tokens that the drift penalty is measured on.
DRIFT_TOKENS = 4_000


def train(
    backbone: Backbone, tokenizer: Any, source: Source, config: ExitConfig, settings: TrainSettings, out: str | Path
) -> Exits:
    """Train the heads of one configuration and save the exits in ``out``; the same call again resumes.

    ``provenance["decoded"]`` reports held-out text decoded with exits on. A call whose result is in ``out`` already
    only reads it.

    Raises DataError for unusable text, UsageError for settings that cannot be used or a folder that holds another
    run, ArtifactError for a folder that cannot be written.
    """
    folder = prepare_folder(out, (MANIFEST, TENSORS))
    return _Training(backbone, source, {"": config}, settings).run(tokenizer, folder, {"": folder}, decode=True)[""]


def train_many(
    backbone: Backbone,
    tokenizer: Any,
    source: Source,
    configs: Mapping[str, ExitConfig],
    settings: TrainSettings,
    out: str | Path,
) -> dict[str, Exits]:
    """Train several configurations in one pass over the data; each is saved in ``out``/name. Otherwise as ``train``,
    without the report on decoded text."""
    folders = {name: prepare_folder(Path(out) / name, (MANIFEST, TENSORS)) for name in configs}
    return _Training(backbone, source, configs, settings).run(tokenizer, Path(out), folders, decode=False)


class _Training:
    """One training: the arguments that decide its result."""

    def __init__(
        self, backbone: Backbone, source: Source, configs: Mapping[str, ExitConfig], settings: TrainSettings
    ) -> None:
        self.backbone, self.source, self.configs, self.settings = backbone, source, configs, settings
        self.config = _common(configs)
        if settings.documents and READOUTS.lookup(self.config.readout).learner:
            raise UsageError(
                f"the readout {self.config.readout!r} learns from its share of a budget in tokens: leave documents "
                "out, or take another readout."
            )
        self.group = Group.join(backbone.device.type == "cpu")

    def run(self, tokenizer: Any, out: Path, folders: Mapping[str, Path], decode: bool) -> dict[str, Exits]:
        """From the text to the exits, saved in ``folders``; ``decode``: with the report on decoded text."""
        backbone, source, settings, writes = self.backbone, self.source, self.settings, self.group.main
        exits = {name: config.to_json() for name, config in self.configs.items()}
        checkpoint = Checkpoint(out, identity(backbone, source, settings, exits=exits))
        if checkpoint.finished and (saved := self._saved(folders)):
            return saved
        stream, held_stream = splits(source, tokenizer, backbone, settings, alone=settings.documents is not None)
        self.group.check(stream.sequence, settings.batch_tokens)
        held = first_batches(held_stream, settings.eval_tokens)
        with TokenBar(settings.max_tokens, 0, settings.quiet or not writes) as bar:
            phases = self._phases(held)
            counters = run(phases, stream, checkpoint, settings, bar, writes)
            made = {name: self._exits(name, phases, counters, bar, decode) for name in self.configs}
        for name, one in made.items() if writes else ():
            one.save(folders[name])
        if writes:
            checkpoint.finish()
        return made

    def _saved(self, folders: Mapping[str, Path]) -> dict[str, Exits] | None:
        """The exits that this training saved; None if a folder no longer holds them."""
        if not all((folder / name).is_file() for folder in folders.values() for name in (MANIFEST, TENSORS)):
            return None
        saved = {name: Exits.from_pretrained(folder) for name, folder in folders.items()}
        for exits in saved.values():
            if exits.heads is not None:
                exits.heads.to(self.backbone.device)
        same = all(saved[name].config == config for name, config in self.configs.items())
        return saved if same else None

    def _phases(self, held: list[Batch]) -> Phases:
        """What is learned one after another."""
        backbone, settings = self.backbone, self.settings
        learned = None
        if name := READOUTS.lookup(self.config.readout).learner:
            learner = READOUT_LEARNERS.lookup(name)(backbone, self.config, settings, self.group)
            learned = LearnReadout(learner, held, settings.lens_share)
        readout = build_readout(backbone, self.config, learned.learner.weights if learned else None)
        return Phases(learned, Heads(backbone, readout, self.configs, settings, held, self.group), settings)

    def _exits(self, name: str, phases: Phases, counters: Counters, bar: TokenBar, decode: bool) -> Exits:
        """The best heads of one configuration, with everything that is measured of them after training."""
        backbone, settings, heads = self.backbone, self.settings, phases.heads
        heads.side.join()
        learner = heads.learners[name]
        trained = learner.finished()
        held_out = dict(next((report for report in learner.history if report["loss"] == learner.best_loss), {}))
        if trained.recurrent:
            depth = on_policy(trained, heads.held, self.config, settings.agreement, bar.stage("measuring depth"))
            held_out |= {"depth": depth["depth"], "threshold": depth["threshold"]}
        weights = phases.readout.learner.weights.requires_grad_(False).eval() if phases.readout else None
        exits = Exits.of(backbone, learner.config, trained, weights)
        if heads.label.is_agreement:  # otherwise a penalty cannot be taken off the confidence
            advance = bar.stage("measuring the drift penalty")
            plan = ExitPlan(learner.config.layers, trained, exits.readout(backbone), POLICIES.lookup("propagate"))
            batches = [(batch, 0) for batch in heads.held.batches]
            penalty = drift_penalty(backbone, plan, batches, DRIFT_TOKENS, advance)
            exits.drift_penalty = {"propagate": penalty}
        exits.provenance = self._provenance(learner, phases, counters, held_out)
        if decode:
            advance = bar.stage("measuring decoded text")
            report = decoded_report(backbone, exits, heads.held.batches, settings.agreement, advance)
            exits.provenance["decoded"] = report
        return exits

    def _provenance(
        self, learner: HeadLearner, phases: Phases, counters: Counters, held_out: dict[str, Any]
    ) -> dict[str, Any]:
        """How the heads came about, as JSON types."""
        return {
            "model": self.backbone.model.config.name_or_path,
            "data": self.source.spec,
            "tokens": counters.tokens,
            "steps": counters.steps,
            "seed": self.settings.seed,
            "settings": self.settings.deciding(),
            "processes": self.group.size,
            "train_loss": learner.last_loss(),
            "held_out": held_out,
            "history": learner.history,
            "lens_divergence": phases.readout.losses if phases.readout else {},
            "wall_seconds": counters.seconds,
            "versions": versions(),
        }


def _common(configs: Mapping[str, ExitConfig]) -> ExitConfig:
    """A configuration that stands for all in what they share, with the inputs of all. Raises UsageError where they
    differ."""
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
