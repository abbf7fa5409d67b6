"""One token at a time through as many layers as it needs: the decode step, free of any generation loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone, Context
from dynamax_llm.decoding.spent import Spent
from dynamax_llm.decoding.state import DEFAULT_WINDOW, InPlace, StatePolicy
from dynamax_llm.engines import EagerEngine
from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.features import ExitFeatures, exit_features, select
from dynamax_llm.exits.readouts.base import Readout
from dynamax_llm.exits.state import ExitState, State
from dynamax_llm.shapes import Ids, NextLogits, RowFlags, RowIds


@dataclass(frozen=True)
class ExitPlan:
    """What decides and what happens then; fixed for a generation.

    ``layers`` are the depths of the exits that are asked; there may be none.
    """

    layers: tuple[int, ...]
    estimator: ConfidenceEstimator
    readout: Readout
    policy: StatePolicy
    window: int = DEFAULT_WINDOW  # tokens that may wait, under the policies that let tokens wait


@dataclass(frozen=True)
class Step:
    """One step's logits (B, V) and exit indices (B,), len(exits) for full depth."""

    logits: NextLogits
    exit_index: RowIds


class Token:
    """A token on its way through the layers: its h, its features, and which rows have left."""

    def __init__(self, h: Tensor, idle: Tensor, n_exits: int) -> None:
        self.h, self.before = h, h  # h now and before the last layer, each (B, 1, d)
        self.left = idle.clone()  # (B,) bool
        self.exit_index = torch.full((len(h),), n_exits, device=h.device)
        self.features: ExitFeatures | None = None
        self.logits: Tensor | None = None  # (B, V) of rows that left
        self.some_left, self.all_left = bool(idle.any()), bool(idle.all())

    def leave(self, index: int, leaving: Tensor) -> bool:
        """Rows ``leaving`` (B,) bool leave by exit ``index``; whether there were any."""
        if not bool(leaving.any()):
            return False
        self.exit_index = torch.where(leaving, index, self.exit_index)
        self.left = self.left | leaving
        self.some_left, self.all_left = True, bool(self.left.all())
        return True

    def keep(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Remember logits (B, V) for ``rows`` (B,) bool; returns all rows'."""
        self.logits = logits if self.logits is None else torch.where(rows.unsqueeze(1), logits, self.logits)
        return self.logits


class Decoder:
    """A batch being decoded under one ExitPlan: cache, padding, and the estimator's own state."""

    def __init__(self, backbone: Backbone, plan: ExitPlan, padding: Tensor | None = None) -> None:
        self.backbone, self.plan = backbone, plan
        self.engine = self._new_engine(padding)
        self.n_exits = len(plan.layers)
        self.states: list[State] | None = None  # per exit, of a recurrent estimator

    def _new_engine(self, padding: Tensor | None) -> EagerEngine:
        return EagerEngine(self.backbone, padding)

    def prefill(self, ids: Ids) -> NextLogits:
        """The prompt (B, T) at full depth: logits (B, V) of the next token. Recurrent heads read the whole prompt."""
        estimator = self.plan.estimator
        self.states = estimator.initial_state(len(ids), self.backbone.device) if self.n_exits else None
        padding = self.engine.padding
        h, ctx = self.engine.enter(ids)
        depth, features = 0, None
        for index, stop in enumerate(self.plan.layers if self.states is not None else ()):
            before = self.engine.run(depth, stop - 1, h, ctx)
            h = self.engine.run(stop - 1, stop, before, ctx)
            depth = stop
            if estimator.needs_logits:
                features, _ = self.plan.readout.features(index, h, before, features)
            else:
                features = exit_features(h, before, None, features)
            self._confidence(index, h, features, padding)
        h = self.engine.run(depth, self.backbone.n_layers, h, ctx)
        self.engine.passes = 0  # the prompt's are not counted
        return self.backbone.readout(h[:, -1:])[:, 0]

    def step(self, ids: Ids, thresholds: Sequence[float | None], idle: RowFlags | None = None) -> Step:
        """One token (B, 1) per row. ``thresholds`` has one entry per exit; ``idle`` (B,) rows need no logits."""
        self.engine.grow()
        h, ctx = self.engine.enter(ids)
        if idle is None or not self.n_exits:  # without exits nothing is saved by leaving a finished row out
            idle = torch.zeros(len(h), dtype=torch.bool, device=h.device)
        token = Token(h, idle, self.n_exits)
        depth = 0
        for index, stop in enumerate(self.plan.layers):
            self._run(token, depth, stop, ctx)
            depth = stop
            self._ask(token, index, thresholds[index])
            if token.all_left:
                self._advance_estimator(token, index + 1)
                break
        return Step(self._finish(token, depth, ctx), token.exit_index)

    def spent(self) -> Spent:
        """What was done since the prompt."""
        return Spent(self.engine.passes)

    def reorder(self, rows: Tensor) -> None:
        """Keep rows ``rows`` (B',) of the batch, in that order: caches, padding, and the states of recurrent heads."""
        self.engine.reorder(rows)
        self.states = ExitState(self.states).select(rows).estimator

    @property
    def _policy(self) -> InPlace:
        assert isinstance(self.plan.policy, InPlace), self.plan.policy.name
        return self.plan.policy

    def _run(self, token: Token, first: int, stop: int, ctx: Context) -> None:
        """Layers ``first`` to ``stop - 1`` for the rows that have not left."""
        for begin, end in ((first, stop - 1), (stop - 1, stop)):
            token.before = token.h
            if token.some_left:
                token.h = self._policy.run(self.engine, begin, end, token.h, token.left, ctx)
            else:
                token.h = self.engine.run(begin, end, token.h, ctx)

    def _advance_estimator(self, token: Token, first: int) -> None:
        """Recurrent heads further up read the h and the features with which the token left."""
        assert token.features is not None
        self.states = self.plan.estimator.advance(first, token.h, token.features, self.states)

    def _ask(self, token: Token, index: int, threshold: float | None) -> None:
        estimator, readout = self.plan.estimator, self.plan.readout
        logits = None
        if estimator.needs_logits:
            features, logits = readout.read(index, token.h, token.before, token.features)
        else:
            features = exit_features(token.h, token.before, None, token.features)
        if token.some_left and token.features is not None:
            features = select(token.left.unsqueeze(1), token.features, features)
        token.features = features
        confidence = self._confidence(index, token.h, features)
        if threshold is None:
            return
        leaving = (confidence[:, 0] >= threshold) & ~token.left
        if token.leave(index, leaving) and readout.tail_layers == 0:
            speaks = readout.logits(index, readout.transform(index, token.h)[0]) if logits is None else logits
            token.keep(leaving, speaks[:, 0])

    def _confidence(self, index: int, h: Tensor, features: ExitFeatures, padding: Tensor | None = None) -> Tensor:
        """The estimator's confidence (B, T) at an exit; its state there advances."""
        if self.states is None:
            return self.plan.estimator.confidence(index, h, features, None, padding)[0]
        confidence, state = self.plan.estimator.confidence(index, h, features, self.states[index], padding)
        assert state is not None
        self.states = [*self.states[:index], state, *self.states[index + 1 :]]
        return confidence

    def _finish(self, token: Token, depth: int, ctx: Context) -> Tensor:
        """From layer ``depth`` to the logits (B, V)."""
        resumed = self.backbone.n_layers - self.plan.readout.tail_layers
        if token.all_left:
            self._policy.skip(self.engine, depth, resumed, token.h, ctx)
        elif token.some_left:
            token.h = self._policy.run(self.engine, depth, resumed, token.h, token.left, ctx)
        else:
            token.h = self.engine.run(depth, resumed, token.h, ctx)
        if resumed < self.backbone.n_layers:
            token.h = self.engine.run(resumed, self.backbone.n_layers, token.h, ctx)
        if token.all_left and token.logits is not None:
            return token.logits
        return token.keep(~token.left, self.backbone.readout(token.h)[:, 0])
