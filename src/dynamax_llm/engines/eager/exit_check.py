"""The estimator and the readout at the exits of an eager session, for one token per row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamax_llm.engines.plan import ExitPlan, RowThresholds
from dynamax_llm.exits.features import ExitFeatures, exit_features, select
from dynamax_llm.exits.state import ExitState


class Token:
    """One token per row on its way through the layers: its h, its features, and which rows have left."""

    def __init__(self, h: Tensor, idle: Tensor | None, full: int) -> None:
        self.h, self.before = h, h  # h now and before the last layer, each (B, 1, d)
        none = torch.zeros(len(h), dtype=torch.bool, device=h.device)
        self.left = none if idle is None else idle.clone()  # (B,)
        self.exit_index = torch.full((len(h),), full, device=h.device)
        self.features: ExitFeatures | None = None
        self.logits: Tensor | None = None  # (B, V) of rows that left
        self.some_left = idle is not None and bool(idle.any())
        self.all_left = self.some_left and bool(self.left.all())

    def leave(self, index: int, leaving: Tensor) -> bool:
        """Rows ``leaving`` (B,) leave by exit ``index``; returns whether there were any."""
        if not bool(leaving.any()):
            return False
        self.exit_index = torch.where(leaving, index, self.exit_index)
        self.left = self.left | leaving
        self.some_left, self.all_left = True, bool(self.left.all())
        return True

    def keep_logits(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Remember logits (B, V) for ``rows`` (B,); returns those of all rows."""
        self.logits = logits if self.logits is None else torch.where(rows.unsqueeze(1), logits, self.logits)
        return self.logits


class ExitCheck:
    """What exits remember of a session's rows, and the decision at each exit."""

    def __init__(self, plan: ExitPlan, batch: int, device: torch.device) -> None:
        self.plan = plan
        self.states = self.empty(batch, device)
        self._thresholds: Sequence[RowThresholds] = ()
        self._limits: list[float | Tensor | None] = []  # per exit: one limit, or one per row (B,)

    def empty(self, batch: int, device: torch.device) -> ExitState:
        """What exits remember of ``batch`` new sequences."""
        if not self.plan.active:
            return ExitState()
        return ExitState.initial(self.plan.estimator, self.plan.readout, batch, device)

    @property
    def recurrent(self) -> bool:
        """Whether exits remember anything."""
        return self.states.estimator is not None or self.states.readout is not None

    def set_thresholds(self, thresholds: Sequence[RowThresholds], device: torch.device) -> None:
        """The least confidence per row and exit from now on; None: the row may not leave there."""
        if thresholds == self._thresholds:
            return
        self._thresholds, self._limits = list(thresholds), []
        for index in range(self.plan.active):
            limits = [row[index] for row in thresholds]
            if len(set(limits)) == 1:
                self._limits.append(limits[0])
            else:
                values = [torch.inf if limit is None else limit for limit in limits]
                self._limits.append(torch.tensor(values, device=device))

    def decide(self, token: Token, index: int) -> None:
        """Evaluate exit ``index`` on the token; rows that are confident enough leave."""
        plan, readout = self.plan, self.plan.readout
        logits = None
        if plan.estimator.needs_logits:
            features, logits = readout.read(index, token.h, token.before, token.features)
        else:
            features = exit_features(token.h, token.before, None, token.features)
        if token.some_left and token.features is not None:
            features = select(token.left.unsqueeze(1), token.features, features)
        token.features = features
        confidence = self.confidence(index, token.h, features)
        limit = self._limits[index]
        if limit is None:
            return
        leaving = (confidence[:, 0] >= limit) & ~token.left
        if token.leave(index, leaving) and readout.tail_layers == 0:
            token.keep_logits(leaving, (readout.logits(index, token.h) if logits is None else logits)[:, 0])

    def confidence(self, index: int, h: Tensor, features: ExitFeatures, padding: Tensor | None = None) -> Tensor:
        """The estimator's confidence (B, T) at an exit; what it remembers there advances."""
        before, readout_state = self.states.of(index)
        confidence, after = self.plan.estimator.confidence(index, h, features, before, padding)
        if before is not None:
            self.states = self.states.with_exit(index, after, readout_state)
        return confidence

    def advance(self, token: Token, first: int) -> None:
        """Exits ``first`` and later read what every row left with."""
        if self.recurrent:
            assert token.features is not None
            plan = self.plan
            self.states = self.states.advanced(first, token.h, token.features, plan.estimator, plan.readout)

    def read_prompt(
        self, index: int, h: Tensor, before: Tensor, earlier: ExitFeatures | None, padding: Tensor | None
    ) -> ExitFeatures:
        """Exit ``index`` reads a whole prompt h (B, T, d): its features, for the next exit."""
        if self.plan.estimator.needs_logits:
            features, _ = self.plan.readout.features(index, h, before, earlier)
        else:
            features = exit_features(h, before, None, earlier)
        self.confidence(index, h, features, padding)
        return features
