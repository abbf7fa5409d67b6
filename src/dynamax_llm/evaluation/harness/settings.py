"""The settings of an evaluation: what decides where tokens leave, and the baselines they are compared with.

full       the stock model
head       a trained exit head at a threshold
measure    a confidence measure at a threshold (``softmax_margin``: the margin rule)
static     every token leaves at one exit, unasked
pruned     the n layers before the last removed, for prompt and answer: the paper's baseline
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.decoding.state import DEFAULT_WINDOW, POLICIES
from dynamax_llm.decoding.thresholds import NEVER, Threshold, Thresholds
from dynamax_llm.errors import UsageError
from dynamax_llm.evaluation.harness.baselines import pruned as pruned_model
from dynamax_llm.evaluation.harness.prompts import PromptSharing, SharedPrompts
from dynamax_llm.evaluation.harness.results import Setting
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import DEFAULT_EXITS

#: Costs nothing and needs no readout: judges exits that are taken unasked, and those that never are.
UNASKED = "state_similarity"


@dataclass(frozen=True)
class Subject:
    """Who is evaluated: a name, a loaded stock model, and its tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def backbone(self) -> Backbone:
        """An adapter of the model."""
        return adapt(self.model)


@dataclass(frozen=True)
class Variant:
    """One setting: what the document says of it, and how to decode under it.

    ``model`` is what decodes (the subject's, or a pruned one), ``options`` are EarlyExit's.
    """

    facts: Setting
    model: PreTrainedModel
    exits: Exits
    options: Mapping[str, Any]

    def on(self, engine: str | None) -> Variant:
        """The same setting on a named engine; None leaves the choice to ``EarlyExit``."""
        return self if engine is None else replace(self, options={**self.options, "engine": engine})

    def early_exit(self, prompts: SharedPrompts) -> PromptSharing:
        """A decoding under this setting that shares prompts with the others."""
        return PromptSharing(self.exits, prompts=prompts, **self.options)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its outcome, as JSON types: the setting and whatever was learned."""
        learned = {name: self.exits.provenance.get(name) for name in ("data", "tokens", "seed")}
        config = self.exits.config.to_json()
        named = {name: value for name, value in self.options.items() if name == "engine"}
        what = {"setting": self.facts.model_dump(), "exits": config, "learned": learned}
        return {**what, "weights": _digest(self.exits), **named}


def full(subject: Subject, exits: Exits | None = None) -> Variant:
    """The stock model, in the engine that the others run in. ``exits`` say where the document draws them."""
    exits = _ready(subject, exits)
    facts = _facts("full", "full", "full", exits, [None] * len(exits.config.layers))
    return Variant(facts, subject.model, exits, {"threshold": NEVER, "measure": UNASKED})


def by_head(
    subject: Subject,
    exits: Exits,
    threshold: Threshold | Sequence[Threshold],
    *,
    family: str | None = None,
    policy: str = "propagate",
    window: int = DEFAULT_WINDOW,
    promise: str | None = None,
) -> Variant:
    """The trained heads of ``exits`` at a threshold, one or one per exit. ``promise`` is its text, if it keeps one."""
    exits.estimator()
    return _judged(
        subject, exits, threshold, "head", family or f"{exits.config.head} head", None, policy, window, promise
    )


def by_measure(
    subject: Subject,
    exits: Exits | None,
    measure: str,
    threshold: Threshold | Sequence[Threshold],
    *,
    family: str | None = None,
    policy: str = "propagate",
    window: int = DEFAULT_WINDOW,
) -> Variant:
    """A confidence measure at a threshold, at the places of ``exits`` and with their readout."""
    exits = _ready(subject, exits)
    exits.estimator(measure)
    return _judged(subject, exits, threshold, "measure", family or measure, measure, policy, window, None)


def by_promise(subject: Subject, exits: Exits, promise: str) -> Variant:
    """The thresholds, policy, window and judge with which ``exits`` keep a recorded promise. Raises PromiseError."""
    record = exits.promise(promise)
    bars = [NEVER if bar is None else bar for bar in record.thresholds]
    how: dict[str, Any] = {"policy": record.policy, "window": record.window}
    measure = None if record.estimator == exits.config.head else record.estimator
    family = measure or f"{exits.config.head} head"
    kind = "head" if measure is None else "measure"
    return _judged(subject, exits, bars, kind, family, measure, promise=record.text, **how)


def static(subject: Subject, layer: int, policy: str = "propagate") -> Variant:
    """Every token but the first, which the prompt's own pass gives, leaves after ``layer`` layers; nothing is asked."""
    exits = _ready(subject, Exits.untrained(subject.backbone, (layer,)))
    facts = _facts(f"static@{layer}", "static", "static depth", exits, [0.0], policy)
    return Variant(facts, subject.model, exits, {"threshold": 0.0, "measure": UNASKED, "policy": policy})


def pruned(subject: Subject, removed: int) -> Variant:
    """The subject without the ``removed`` layers before its last. Raises UsageError where that cannot be done."""
    model = pruned_model(subject.model, removed)
    backbone = adapt(model)
    exits = Exits.untrained(backbone, (backbone.n_layers - 1,))
    exits.check_backbone(backbone)
    facts = Setting(
        id=f"pruned@{backbone.n_layers}",
        kind="pruned",
        family="pruned layers",
        layers=(backbone.n_layers,),
        thresholds=(None,),
        policy="none",
        window=0,
        readout="head",
    )
    return Variant(facts, model, exits, {"threshold": NEVER, "measure": UNASKED})


def grid(
    subject: Subject,
    heads: Mapping[str, Exits],
    thresholds: Sequence[Threshold],
    *,
    measures: Sequence[str] = (),
    measure_thresholds: Sequence[Threshold] | None = None,
    at: Exits | None = None,
    policy: str = "propagate",
    window: int = DEFAULT_WINDOW,
    baselines: bool = True,
    engine: str | None = None,
) -> list[Variant]:
    """The full model, every head and measure at every threshold, and the baselines; settings of a family side by side.

    ``heads`` are trained exits by the name their family gets; measures judge at the places of ``at``, by default those
    of the first head. The baselines are static depth at every exit and as many layers pruned as those exits save.
    ``engine`` runs all of them. Raises UsageError, ArtifactMismatchError.
    """
    places = at if at is not None else next(iter(heads.values()), None)
    places = _ready(subject, places)
    found = [full(subject, places)]
    for name in measures:
        options: dict[str, Any] = {"policy": policy, "window": window}
        found += [by_measure(subject, places, name, value, **options) for value in measure_thresholds or thresholds]
    if baselines:
        found += [static(subject, layer) for layer in places.config.layers]
    for name, exits in heads.items():
        found += [by_head(subject, exits, value, family=name, policy=policy, window=window) for value in thresholds]
    if baselines:
        n_layers = places.config.n_layers
        removed = sorted({n_layers - layer for layer in places.config.layers} & set(range(1, n_layers - 1)))
        found += [pruned(subject, count) for count in removed]
    return check_ids([item.on(engine) for item in found])


def check_ids(variants: list[Variant]) -> list[Variant]:
    """The same variants, if no two have the same id and the first is the full model. Raises UsageError."""
    seen: set[str] = set()
    for variant in variants:
        if variant.facts.id in seen:
            raise UsageError(f"the setting {variant.facts.id!r} is asked for twice: name each threshold once.")
        seen.add(variant.facts.id)
    if not variants or variants[0].facts.kind != "full":
        raise UsageError("an evaluation compares with the full model: let the first of its settings be full(…).")
    return variants


def _judged(
    subject: Subject,
    exits: Exits,
    threshold: Threshold | Sequence[Threshold],
    kind: str,
    family: str,
    measure: str | None,
    policy: str,
    window: int,
    promise: str | None,
) -> Variant:
    exits = _ready(subject, exits)
    values = Thresholds.parse(threshold, len(exits.config.layers)).values
    POLICIES.lookup(policy).check(exits.drive(subject.model), exits.readout(exits.drive(subject.model)))
    if promise is not None:
        shown = promise
    elif len(set(values)) == 1:
        shown = NEVER if values[0] is None else f"{values[0]:g}"
    else:
        shown = ",".join(NEVER if value is None else f"{value:g}" for value in values)
    facts = _facts(f"{family}@{shown}", kind, family, exits, values, policy, window, promise)
    options = {"threshold": [NEVER if value is None else value for value in values], "measure": measure}
    return Variant(facts, subject.model, exits, {**options, "policy": policy, "window": window})


def _facts(
    name: str,
    kind: str,
    family: str,
    exits: Exits,
    thresholds: Sequence[float | None],
    policy: str = "propagate",
    window: int = DEFAULT_WINDOW,
    promise: str | None = None,
) -> Setting:
    return Setting(
        id=name,
        kind=kind,
        family=family,
        layers=exits.config.layers,
        thresholds=tuple(thresholds),
        policy=policy,
        window=window,
        readout=exits.config.readout,
        promise=promise,
    )


def _ready(subject: Subject, exits: Exits | None) -> Exits:
    """The exits, or untrained ones at the default places, checked against the subject's model."""
    backbone = subject.backbone
    exits = exits if exits is not None else Exits.untrained(backbone, DEFAULT_EXITS)
    exits.check_backbone(backbone)
    return exits


def _digest(exits: Exits) -> str | None:
    """sha256 of the learned tensors' bytes; None if nothing was learned."""
    import hashlib

    learned = [module for module in (exits.heads, exits.lens) if module is not None]
    if not learned:
        return None
    digest = hashlib.sha256()
    for module in learned:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
