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
from dynamax_llm.text.answer_source import AnySource
from dynamax_llm.text.batches import Batch, Stream, first_batches
from dynamax_llm.traces.chain_choice import choose, prompts_of, record
from dynamax_llm.traces.drift import drift_penalty
from dynamax_llm.training.blocks import TrainedLearner
from dynamax_llm.training.held_out import decoded_report, on_policy
from dynamax_llm.training.learner import HeadLearner
from dynamax_llm.training.parallel import Group
from dynamax_llm.training.phases import READOUT_LEARNERS, Heads, LearnReadouts, Phases, ReadoutLearner
from dynamax_llm.training.run import Checkpoint, Counters, identity, run, splits, versions
from dynamax_llm.training.settings import TrainSettings

#: What heads must have in common to learn from one exit batch.
SHARED = ("layers", "n_layers", "readout", "readout_options", "candidates", "shortlist")
#: Held-out tokens that the drift penalty is measured on.
DRIFT_TOKENS = 4_000
#: Tokens of training text from which a readout's vocabulary is counted.
COUNTED_TOKENS = 2_000_000


def train(
    backbone: Backbone, tokenizer: Any, source: AnySource, config: ExitConfig, settings: TrainSettings, out: str | Path
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
    source: AnySource,
    configs: Mapping[str, ExitConfig],
    settings: TrainSettings,
    out: str | Path,
    *,
    decode: bool = False,
) -> dict[str, Exits]:
    """Train several configurations in one pass over the data; each is saved in ``out``/name. Otherwise as ``train``;
    ``decode``: with the report on decoded text."""
    folders = {name: prepare_folder(Path(out) / name, (MANIFEST, TENSORS)) for name in configs}
    return _Training(backbone, source, configs, settings).run(tokenizer, Path(out), folders, decode)


class _Training:
    """One training: the arguments that decide its result."""

    def __init__(
        self, backbone: Backbone, source: AnySource, configs: Mapping[str, ExitConfig], settings: TrainSettings
    ) -> None:
        self.backbone, self.source, self.settings = backbone, source, settings
        self.configs = {
            name: READOUTS.lookup(config.readout).fitted(config, backbone) for name, config in configs.items()
        }
        #: Configurations that learn from one exit batch, by their readout.
        self.groups = _groups(self.configs)
        for config in self.configs.values():
            _check(config, settings)
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
            phases = self._phases(stream, held)
            counters = run(phases, stream, checkpoint, settings, bar, writes)
            phases.close()
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

    def _phases(self, stream: Stream, held: list[Batch]) -> Phases:
        """What is learned one after another."""
        backbone, settings = self.backbone, self.settings
        learners: dict[int, ReadoutLearner] = {}
        heads = []
        for number, configs in enumerate(self.groups):
            config = _common(configs)
            if name := READOUTS.lookup(config.readout).learner:
                learners[number] = READOUT_LEARNERS.lookup(name)(backbone, config, settings, self.group)
            weights = learners[number].weights if number in learners else None
            readout = build_readout(backbone, config, weights)
            heads.append(Heads(backbone, readout, configs, settings, held, self.group))
        trained = [learner for learner in learners.values() if isinstance(learner, TrainedLearner)]
        if trained:
            counted = first_batches(stream, COUNTED_TOKENS)
            for learner in trained:
                learner.prepare(counted)
        share = settings.block_share if trained else settings.lens_share
        return Phases(LearnReadouts(learners, held, share) if learners else None, heads, settings)

    def _exits(self, name: str, phases: Phases, counters: Counters, bar: TokenBar, decode: bool) -> Exits:
        """The best heads of one configuration, with everything that is measured of them after training."""
        backbone, settings = self.backbone, self.settings
        number = next(index for index, configs in enumerate(self.groups) if name in configs)
        heads = phases.heads[number]
        heads.side.join()
        learner = heads.learners[name]
        trained = learner.finished()
        held_out = dict(next((report for report in learner.history if report["loss"] == learner.best_loss), {}))
        if trained.recurrent:
            depth = on_policy(trained, heads.held, learner.config, settings.agreement, bar.stage("measuring depth"))
            held_out |= {"depth": depth["depth"], "threshold": depth["threshold"]}
        weights = heads.readout.weights
        if weights is not None:
            weights.requires_grad_(False).eval()
        exits = Exits.of(backbone, learner.config, trained, weights)
        drafts = heads.readout.drafts
        if heads.label.is_agreement and not drafts:  # otherwise a penalty cannot be taken off the confidence
            advance = bar.stage("measuring the drift penalty")
            plan = ExitPlan(learner.config.layers, trained, exits.readout(backbone), POLICIES.lookup("propagate"))
            batches = [(batch, 0) for batch in heads.held.batches]
            penalty = drift_penalty(backbone, plan, batches, DRIFT_TOKENS, advance)
            exits.drift_penalty = {"propagate": penalty}
        losses = phases.readout.losses.get(number, {}) if phases.readout else {}
        exits.provenance = self._provenance(learner, losses, counters, held_out)
        if drafts:
            prompts, advance = prompts_of(heads.held.batches), bar.stage("measuring the draft")
            if self.group.main and record(backbone, exits, prompts, advance):
                choose(backbone, exits)
        elif decode:
            advance = bar.stage("measuring decoded text")
            report = decoded_report(backbone, exits, heads.held.batches, settings.agreement, advance)
            exits.provenance["decoded"] = report
        return exits

    def _provenance(
        self, learner: HeadLearner, losses: dict[str, list[float]], counters: Counters, held_out: dict[str, Any]
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
            "readout_losses": losses,
            "wall_seconds": counters.seconds,
            "versions": versions(),
        }


def _check(config: ExitConfig, settings: TrainSettings) -> None:
    """Raise UsageError for settings that this configuration cannot be trained with."""
    kind = READOUTS.lookup(config.readout)
    if settings.documents and kind.learner:
        raise UsageError(
            f"the readout {config.readout!r} learns from its share of a budget in tokens: leave documents out, or take "
            "another readout."
        )
    if kind.drafts and settings.on_policy:
        raise UsageError(
            f"on_policy {settings.on_policy}: a draft leaves no state behind, so there is nothing to learn on policy. "
            "Leave it out, or train the draft by itself."
        )


def _groups(configs: Mapping[str, ExitConfig]) -> list[dict[str, ExitConfig]]:
    """Configurations by what they share, a group for every readout. Raises UsageError if there is none to train, or
    if those with one readout differ in more than the head."""
    if not configs:
        raise UsageError("no exit configuration to train: give at least one.")
    groups: dict[str, dict[str, ExitConfig]] = {}
    for name, config in configs.items():
        groups.setdefault(config.readout, {})[name] = config
    for group in groups.values():
        _common(group)
    return list(groups.values())


def _common(configs: Mapping[str, ExitConfig]) -> ExitConfig:
    """A configuration that stands for all in what they share, with the inputs of all. Raises UsageError where they
    differ."""
    first = next(iter(configs.values()))
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
