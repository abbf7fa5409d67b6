"""What decides where tokens leave, setting by setting."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from dynamax_llm.decoding import EarlyExit
from dynamax_llm.decoding.state import DEFAULT_WINDOW
from dynamax_llm.decoding.thresholds import NEVER
from dynamax_llm.evaluation.bench.estimators import DrawnConfidence, draw
from dynamax_llm.evaluation.bench.plan import BenchSettings, Setting
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.registries import HEADS

#: Estimators without asking for logits, and is never below 0: with a threshold of 0 every token leaves.
FREE = "state_similarity"
#: Random heads are as sure as not; nothing is this sure.
SURE = 1.0


class Deciders:
    """Call it with a Setting to get its EarlyExit. ``exits`` are the backbone's, without heads."""

    def __init__(self, exits: Exits, settings: BenchSettings, width: int, device: torch.device) -> None:
        self.exits, self.settings, self.width, self.device = exits, settings, width, device
        self._made: dict[Setting, EarlyExit] = {}

    def __call__(self, setting: Setting) -> EarlyExit:
        """What decides under a setting; made once, as engines keep what they built for its judge."""
        if setting not in self._made:
            self._made[setting] = self._make(setting)
        return self._made[setting]

    def _make(self, setting: Setting) -> EarlyExit:
        window = DEFAULT_WINDOW if setting.window is None else setting.window
        exits, bar, measure = self.exits, NEVER if setting.kind == "full" else 0.0, FREE
        if setting.exits:
            config = dataclasses.replace(exits.config, layers=setting.exits)
            exits = dataclasses.replace(exits, config=config)
        if setting.kind == "checks":
            return self._asked(exits, setting)
        common: dict[str, Any] = {"policy": setting.policy, "window": window, "engine": setting.engine}
        early = EarlyExit(exits, threshold=bar, measure=measure, **common)
        if setting.kind == "spread":
            assert setting.together is not None
            count = len(setting.exits)
            pattern = draw(setting.batch, count, self.settings.leave, setting.together, self.settings.seed)
            early = EarlyExit(exits, threshold=0.5, measure=measure, **common)
            early.estimator = DrawnConfidence(pattern.to(self.device), count)
        return early

    def _asked(self, exits: Exits, setting: Setting) -> EarlyExit:
        """Exits that are asked and by which no token leaves: random heads, or a measure of random weights."""
        estimator = self.settings.estimator
        if estimator not in HEADS:
            return EarlyExit(exits, threshold=SURE, measure=estimator, engine=setting.engine)
        config = ExitConfig(exits.config.layers, exits.config.n_layers, estimator, self.settings.inputs)
        torch.manual_seed(self.settings.seed)
        heads = ExitHeads(config, self.width).to(self.device).eval()
        return EarlyExit(dataclasses.replace(exits, config=config, heads=heads), threshold=SURE, engine=setting.engine)
