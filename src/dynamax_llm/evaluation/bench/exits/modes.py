"""The modes that saved exits and a backbone support, and those that are left out with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.decoding.draft_choice import kept_choices
from dynamax_llm.decoding.thresholds import NEVER
from dynamax_llm.engines.plan import POLICIES
from dynamax_llm.errors import ArtifactMismatchError, UsageError
from dynamax_llm.evaluation.bench.exits.document import LeftOut
from dynamax_llm.evaluation.bench.exits.settings import ExitBenchSettings
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.promise import Promise


@dataclass(frozen=True)
class Mode:
    """A way to decode: its name, and its EarlyExit. ``kind`` as ``document.ModeRow.mode``."""

    label: str
    kind: str
    early: EarlyExit
    threshold: float | None = None

    @property
    def exact(self) -> bool:
        """Whether the text is the full model's."""
        return self.kind == "never" or self.early.policy.exact_output


def modes(exits: Exits, backbone: Backbone, settings: ExitBenchSettings) -> tuple[list[Mode], list[LeftOut]]:
    """Full depth first, then a draft as it was calibrated, promises, and thresholds under every policy.

    Raises UsageError for exits without heads where no measure is named, ArtifactMismatchError for another backbone's.
    """
    exits.check_backbone(backbone)
    common: dict[str, Any] = {"measure": settings.measure, "engine": settings.engine}
    full = EarlyExit(exits, threshold=NEVER, **common)
    full.attach(backbone.model)
    found, left_out = [Mode("never exit", "never", full)], []
    for label, kind, options in _wanted(exits, settings):
        try:
            early = EarlyExit(**{"exits": exits, **common, **options})
            early.policy.check(backbone, exits.readout(backbone))
        except (UsageError, ArtifactMismatchError) as error:
            left_out.append(LeftOut(label=label, reason=str(error).rstrip(".")))
            continue
        if early.thresholds.active == 0 and not early.drafting.threshold:
            left_out.append(LeftOut(label=label, reason="no exit can fire at this threshold, so it is full depth"))
            continue
        found.append(Mode(label, kind, early, options.get("threshold")))
    return found, left_out


def _wanted(exits: Exits, settings: ExitBenchSettings) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Label, kind and EarlyExit's own arguments of every mode beside full depth."""
    if kept_choices(exits) and settings.measure is None:
        yield "draft as calibrated", "threshold", {}
    for promise in exits.promises:
        # Alone among its exits it is found by its text, whatever else was recorded.
        alone = replace(exits, promises=(promise,))
        yield _promise_label(promise, exits), "promise", {"exits": alone, "promise": promise.text, "measure": None}
    for threshold in settings.thresholds:
        for policy in settings.policies:
            waits = POLICIES[policy].exact_state
            for window in settings.windows if waits else (None,):
                several = f", window {window}" if waits and len(settings.windows) > 1 else ""
                options = {"threshold": threshold, "policy": policy, "window": window}
                yield f"{policy} at {threshold:g}{several}", "threshold", options


def _promise_label(promise: Promise, exits: Exits) -> str:
    """Its text, with policy and estimator where another promise has the same text."""
    alike = sum(other.text == promise.text for other in exits.promises) > 1
    return promise.text + (f" ({promise.policy}, {promise.estimator})" if alike else "")
