"""The settings of an evaluation: how it is decided where tokens leave, and the baselines to compare with.

full       the stock model
head       a trained exit head at a threshold
measure    a confidence measure at a threshold (``softmax_margin``: the margin rule)
static     every token leaves at one exit, without a check
pruned     the n layers before the last removed, for prompt and answer: the paper's baseline
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.decoding.thresholds import NEVER, Threshold, Thresholds
from dynamax_llm.engines.plan import DEFAULT_WINDOW, POLICIES
from dynamax_llm.errors import UsageError
from dynamax_llm.evaluation.common import FREE_MEASURE
from dynamax_llm.evaluation.harness.baselines import pruned as pruned_model
from dynamax_llm.evaluation.harness.prompts import PromptSharing, SharedPrompts
from dynamax_llm.evaluation.harness.results import Setting
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import DEFAULT_EXITS


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a name, a loaded stock model, and its tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def backbone(self) -> Backbone:
        """An adapter of the model."""
        return adapt(self.model)


@dataclass(frozen=True)
class Variant:
    """One setting: its entry in the document, and how to decode under it.

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
    """The stock model, in the engine that the others run in; the document lists the layers of ``exits`` for it."""
    exits = _ready(subject, exits)
    thresholds = [None] * len(exits.config.layers)
    return _variant(subject, exits, "full", "full", thresholds, measure=FREE_MEASURE, name="full")


def by_head(
    subject: Subject,
    exits: Exits,
    threshold: Threshold | Sequence[Threshold],
    *,
    measure: str | None = None,
    family: str | None = None,
    policy: str = "propagate",
    window: int = DEFAULT_WINDOW,
    promise: str | None = None,
) -> Variant:
    """The trained heads of ``exits``, or ``measure`` in their place, at a threshold, one or one per exit.

    ``promise`` is the text of the promise that the thresholds keep, if any.
    """
    exits.estimator(measure)
    backbone = _ready(subject, exits).drive(subject.model)
    POLICIES.lookup(policy).check(backbone, exits.readout(backbone))
    values = Thresholds.parse(threshold, len(exits.config.layers)).values
    kind, family = ("measure", family or measure) if measure else ("head", family or f"{exits.config.head} head")
    options: dict[str, Any] = {"policy": policy, "window": window, "promise": promise}
    return _variant(subject, exits, kind, str(family), values, measure=measure, **options)


def by_measure(
    subject: Subject, exits: Exits | None, measure: str, threshold: Threshold | Sequence[Threshold], **options: Any
) -> Variant:
    """A confidence measure at a threshold, at the layers of ``exits`` and with their readout; see ``by_head``."""
    return by_head(subject, _ready(subject, exits), threshold, measure=measure, **options)


def by_promise(subject: Subject, exits: Exits, promise: str) -> Variant:
    """Thresholds, policy, window and estimator with which ``exits`` keep a recorded promise. Raises PromiseError."""
    record = exits.promise(promise)
    thresholds = [NEVER if value is None else value for value in record.thresholds]
    options: dict[str, Any] = {"policy": record.policy, "window": record.window, "promise": record.text}
    measure = None if record.estimator == exits.config.head else record.estimator
    return by_head(subject, exits, thresholds, measure=measure, **options)


def static(subject: Subject, layer: int, policy: str = "propagate") -> Variant:
    """Every token but the first, which the prompt's own pass gives, leaves after ``layer`` layers, without a check."""
    exits = _ready(subject, Exits.untrained(subject.backbone, (layer,)))
    options: dict[str, Any] = {"measure": FREE_MEASURE, "policy": policy, "name": f"static@{layer}"}
    return _variant(subject, exits, "static", "static depth", [0.0], **options)


def pruned(subject: Subject, removed: int) -> Variant:
    """The subject without the ``removed`` layers before its last. Raises UsageError where that cannot be done."""
    model = pruned_model(subject.model, removed)
    backbone = adapt(model)
    exits = Exits.untrained(backbone, (backbone.n_layers - 1,))
    exits.check_backbone(backbone)
    depth = backbone.n_layers
    options: dict[str, Any] = {"measure": FREE_MEASURE, "policy": "none", "window": 0, "name": f"pruned@{depth}"}
    variant = _variant(subject, exits, "pruned", "pruned layers", [None], **options)
    facts = variant.facts.model_copy(update={"layers": (depth,)})
    return Variant(facts, model, exits, {"threshold": NEVER, "measure": FREE_MEASURE})


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

    ``heads`` are trained exits by the name their family gets; measures are used at the layers of ``at``, by default
    those of the first head. The baselines are static depth at every exit and as many layers pruned as those exits save.
    ``engine`` runs all of them. Raises UsageError, ArtifactMismatchError.
    """
    places = at if at is not None else next(iter(heads.values()), None)
    places = _ready(subject, places)
    variants = [full(subject, places)]
    for name in measures:
        options: dict[str, Any] = {"policy": policy, "window": window}
        variants += [by_measure(subject, places, name, value, **options) for value in measure_thresholds or thresholds]
    if baselines:
        variants += [static(subject, layer) for layer in places.config.layers]
    for name, exits in heads.items():
        variants += [by_head(subject, exits, value, family=name, policy=policy, window=window) for value in thresholds]
    if baselines:
        n_layers = places.config.n_layers
        removed = sorted({n_layers - layer for layer in places.config.layers} & set(range(1, n_layers - 1)))
        variants += [pruned(subject, count) for count in removed]
    return check_ids([item.on(engine) for item in variants])


def check_ids(variants: list[Variant]) -> list[Variant]:
    """The same variants, if no two have the same id and the first is the full model. Raises UsageError."""
    ids = [variant.facts.id for variant in variants]
    for name in ids:
        if ids.count(name) > 1:
            raise UsageError(f"the setting {name!r} is given twice: name each threshold once.")
    if not variants or variants[0].facts.kind != "full":
        raise UsageError("an evaluation compares with the full model: let the first of its settings be full(…).")
    return variants


def _variant(
    subject: Subject,
    exits: Exits,
    kind: str,
    family: str,
    thresholds: Sequence[float | None],
    *,
    measure: str | None = None,
    policy: str = "propagate",
    window: int = DEFAULT_WINDOW,
    promise: str | None = None,
    name: str | None = None,
) -> Variant:
    """``name`` is by default the family with its promise or its thresholds."""
    named = [NEVER if value is None else f"{value:g}" for value in thresholds]
    facts = Setting(
        id=name or f"{family}@{promise or (named[0] if len(set(thresholds)) == 1 else ','.join(named))}",
        kind=kind,
        family=family,
        layers=exits.config.layers,
        thresholds=tuple(thresholds),
        policy=policy,
        window=window,
        readout=exits.config.readout,
        promise=promise,
    )
    values = [NEVER if value is None else value for value in thresholds]
    options = {"threshold": values, "measure": measure, "policy": policy, "window": window}
    return Variant(facts, subject.model, exits, options)


def _ready(subject: Subject, exits: Exits | None) -> Exits:
    """The exits, or untrained ones at the default places, checked against the subject's model."""
    backbone = subject.backbone
    exits = exits if exits is not None else Exits.untrained(backbone, DEFAULT_EXITS)
    exits.check_backbone(backbone)
    return exits


def _digest(exits: Exits) -> str | None:
    """sha256 of the learned tensors' bytes; None if nothing was learned."""
    learned = [module for module in (exits.heads, exits.readout_weights) if module is not None]
    if not learned:
        return None
    digest = hashlib.sha256()
    for module in learned:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
