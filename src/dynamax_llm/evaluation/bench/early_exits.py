"""The EarlyExit of every setting of a benchmark."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from dynamax_llm.decoding import EarlyExit
from dynamax_llm.decoding.thresholds import NEVER
from dynamax_llm.engines.plan import DEFAULT_WINDOW
from dynamax_llm.evaluation.bench.estimators import DrawnConfidence, draw
from dynamax_llm.evaluation.bench.plan import BenchSettings, Setting
from dynamax_llm.evaluation.common import FREE_MEASURE
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.registries import HEADS

#: A threshold that neither random heads nor measures of random weights reach.
UNREACHED = 1.0


class EarlyExits:
    """Call it with a Setting to get its EarlyExit. ``exits`` are the backbone's, without heads."""

    def __init__(self, exits: Exits, settings: BenchSettings, width: int, device: torch.device) -> None:
        self.exits, self.settings, self.width, self.device = exits, settings, width, device
        self._made: dict[Setting, EarlyExit] = {}

    def __call__(self, setting: Setting) -> EarlyExit:
        """Made once per setting, as engines keep what they built for its estimator."""
        if setting not in self._made:
            self._made[setting] = self._make(setting)
        return self._made[setting]

    def _make(self, setting: Setting) -> EarlyExit:
        layers, engine = setting.exits or self.exits.config.layers, setting.engine
        exits = dataclasses.replace(self.exits, config=dataclasses.replace(self.exits.config, layers=layers))
        if setting.kind == "checks":
            return self._checks(exits, engine)
        window = DEFAULT_WINDOW if setting.window is None else setting.window
        options: dict[str, Any] = {"policy": setting.policy, "window": window, "engine": engine}
        threshold = NEVER if setting.kind == "full" else 0.5 if setting.kind == "spread" else 0.0
        early = EarlyExit(exits, threshold=threshold, measure=FREE_MEASURE, **options)
        if setting.together is not None:
            pattern = draw(setting.batch, len(layers), self.settings.leave, setting.together, self.settings.seed)
            early.estimator = DrawnConfidence(pattern.to(self.device), len(layers))
        return early

    def _checks(self, exits: Exits, engine: str | None) -> EarlyExit:
        """Exits that are checked and by which no token leaves: random heads, or a measure of random weights."""
        estimator = self.settings.estimator
        if estimator not in HEADS:
            return EarlyExit(exits, threshold=UNREACHED, measure=estimator, engine=engine)
        config = ExitConfig(exits.config.layers, exits.config.n_layers, estimator, self.settings.inputs)
        torch.manual_seed(self.settings.seed)
        heads = ExitHeads(config, self.width).to(self.device).eval()
        return EarlyExit(dataclasses.replace(exits, config=config, heads=heads), threshold=UNREACHED, engine=engine)
