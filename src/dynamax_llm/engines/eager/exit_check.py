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
        self.seen = h  # what estimators read: h, or what the readout made of it
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
        self._holds: Tensor | None = None  # the probability (B,) that every token of the open chain is accepted

    def empty(self, batch: int, device: torch.device) -> ExitState:
        """What exits remember of ``batch`` new sequences."""
        if not self.plan.active:
            return ExitState()
        return ExitState.initial(self.plan.estimator, self.plan.readout, batch, device)

    @property
    def recurrent(self) -> bool:
        """Whether exits remember anything."""
        return self.states.estimator is not None or self.states.readout is not None

    @property
    def reads_prompts(self) -> bool:
        """Whether exits read prompts one by one: not where the readout observes them and heads have no memory."""
        return self.states.estimator is not None or (self.states.readout is not None and not self.plan.readout.taps)

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
        if readout.drafts:
            self._draft(token, index, self._limits[index])
            return
        if not self.recurrent and all(limit is None for limit in self._limits[index:]):
            return  # neither this token nor a later one needs to know what is said here
        logits, moved = None, self.transform(index, token.h)
        if plan.estimator.needs_logits:
            features, logits = readout.read(index, token.h, token.before, token.features, moved)
        else:
            features = exit_features(token.h, token.before, None, token.features)
        seen = moved if readout.heads_read_output else token.h
        if token.some_left and token.features is not None:
            features = select(token.left.unsqueeze(1), token.features, features)
            seen = torch.where(token.left.view(-1, 1, 1), token.seen, seen)
        token.features, token.seen = features, seen
        confidence = self.confidence(index, seen, features)[:, 0]
        limit = self._limits[index]
        if limit is None:
            return
        leaving = (confidence >= limit) & ~token.left
        if token.leave(index, leaving) and readout.tail_layers == 0:
            token.keep_logits(leaving, (readout.logits(index, moved) if logits is None else logits)[:, 0])

    def _draft(self, token: Token, index: int, limit: float | Tensor | None) -> None:
        """Exit ``index``, of depth 0, proposes a token, unless the chain of proposals has become too unlikely."""
        readout = self.plan.readout
        if limit is None:
            return
        likely = 1.0 if self._holds is None else self._mean_holds(token)
        goes_on = torch.as_tensor(likely >= limit, device=token.h.device)
        if not bool((goes_on | token.left).all()):  # a row that rests has no limit of its own
            return
        moved = self.transform(index, token.h)
        features, logits = readout.read(index, token.h, token.before, None, moved)
        token.features, token.seen = features, moved
        confidence = self.confidence(index, moved, features)[:, 0]
        self._holds = confidence if self._holds is None else self._holds * confidence
        leaving = ~token.left
        if token.leave(index, leaving):
            assert logits is not None
            token.keep_logits(leaving, logits[:, 0])

    def _mean_holds(self, token: Token) -> Tensor:
        """The probability that the chain is accepted so far, the mean over the rows that draft: rows share the passes,
        so they go on, or stop, together."""
        assert self._holds is not None
        drafting = ~token.left
        return (self._holds * drafting).sum() / drafting.sum().clamp(min=1)

    def transform(self, index: int, h: Tensor, padding: Tensor | None = None) -> Tensor:
        """h (B, T, d) as the readout transforms it at an exit; what the readout remembers there advances."""
        moved, after = self.plan.readout.transform(index, h, self.states.of(index)[1], padding)
        self.states = self.states.with_exit(index, None, after)
        return moved

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
            self.states = self.states.advanced(first, token.h, token.features, plan.estimator, plan.readout, token.seen)

    def observe(
        self,
        before: ExitState,
        embedded: Tensor,
        tapped: Sequence[Tensor],
        padding: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> None:
        """The readout remembers tokens that every layer has read (see ``Readout.observe``), from ``before`` on."""
        if before.readout is not None:
            read = self.plan.readout.observe(embedded, tapped, before.readout, padding, counts)
            self.states = ExitState(self.states.estimator, read)

    def end_chain(self) -> None:
        """The window is closed: the next proposals begin a chain of their own."""
        self._holds = None

    def read_prompt(
        self, index: int, h: Tensor, before: Tensor, earlier: ExitFeatures | None, padding: Tensor | None
    ) -> ExitFeatures:
        """Exit ``index`` reads a whole prompt h (B, T, d): its features, for the next exit."""
        moved = self.transform(index, h, padding)
        if self.plan.estimator.needs_logits:
            features, _ = self.plan.readout.features(index, h, before, earlier, moved)
        else:
            features = exit_features(h, before, None, earlier)
        self.confidence(index, moved if self.plan.readout.heads_read_output else h, features, padding)
        return features
