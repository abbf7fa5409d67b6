"""``propagate``, ``copy`` and ``stale``: a skipped layer gets its state at once; all three are approximate.

Rows that left keep their h while others go on. The whole batch passes through each layer: at small batches a layer's
cost is reading its weights, which the rows that go on pay anyway. A row that left is thereby updated from its own
frozen h, which is ``propagate``; the other policies then restore what that row should hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone, Context
from dynamax_llm.engines.eager.exit_check import Token
from dynamax_llm.engines.eager.session import EagerSession
from dynamax_llm.engines.plan import ExitPlan
from dynamax_llm.shapes import NextLogits, RowFlags


class InPlaceSession(EagerSession):
    """A session whose skipped layers are accounted for as soon as every row has left."""

    def __init__(self, backbone: Backbone, plan: ExitPlan, slots: int) -> None:
        super().__init__(backbone, plan, slots)
        self._update = UPDATES[plan.policy.name]
        self._maps = plan.policy.updates_state
        self._codes: dict[int, Tensor] = {}

    def _enter(self, h: Tensor, idle: RowFlags | None) -> None:
        self._context = self.backbone.context(h, past=self.length, padding=self.padding)
        self.length += 1
        self._codes = {}
        self.token = Token(h, idle, self.plan.full)

    def segment(self, index: int) -> None:
        token, first, stop = self.current, self.starts[index], self.stops[index]
        if index == self.plan.active:
            return  # ``finish`` runs it, the tail of a readout apart
        for begin, end in ((first, stop - 1), (stop - 1, stop)):
            token.before = token.h
            token.h = self._run(begin, end, token.h)
        before = token.left
        self.exit_check.decide(token, index)
        if self._maps and token.left is not before:
            code = self.plan.readout.skip_code(index, token.h, token.seen)
            if code is not None:
                self._codes[index] = code

    def leave(self, index: int) -> None:
        token = self.current
        self.exit_check.advance(token, index + 1)
        resumed = self.backbone.n_layers - self.plan.readout.tail_layers
        self._update.skip(self, self.stops[index], resumed, token.h, self._context)
        self._read_out(resumed)

    def finish(self) -> None:
        token = self.current
        resumed = self.backbone.n_layers - self.plan.readout.tail_layers
        token.h = self._run(self.starts[self.plan.active], resumed, token.h)
        self._read_out(resumed)

    def logits(self) -> NextLogits:
        assert self.current.logits is not None
        return self.current.logits

    def _read_out(self, resumed: int) -> None:
        """From layer ``resumed``, which every row runs, to the logits of rows that have none yet."""
        token = self.current
        token.h = self._layers(resumed, self.backbone.n_layers, token.h, self._context)
        if not token.all_left or token.logits is None:
            token.keep_logits(~token.left, self.backbone.readout(token.h)[:, 0])

    @property
    def current(self) -> Token:
        """The token on its way."""
        assert self.token is not None
        return self.token

    def codes(self) -> dict[int, Tensor]:
        """What the learned state update reads of rows that left, by exit; empty where there is none."""
        return self._codes

    def _run(self, first: int, stop: int, h: Tensor) -> Tensor:
        """Layers ``first`` to ``stop - 1`` for the rows that have not left."""
        token, ctx = self.current, self._context
        if not token.some_left:
            return self._layers(first, stop, h, ctx)
        frozen = token.left.view(-1, 1, 1)
        for index in range(first, stop):
            kept = self._update.before(self, index)
            entering = self._update.entering(self, index, h)
            h = torch.where(frozen, h, self._layers(index, index + 1, entering, ctx))
            self._update.after(self, index, token.left, kept)
        return h


class StateUpdate:
    """``propagate``: skipped layers update their state from h_e; other policies override parts of it."""

    def skip(self, session: InPlaceSession, first: int, stop: int, h: Tensor, ctx: Context) -> None:
        """Every row left with h (B, 1, d): the state of layers ``first`` to ``stop - 1``."""
        if first < stop and not session.codes():
            session.backbone.update_states(first, stop, h, session.cache, ctx)
            return
        for index in range(first, stop):
            session.backbone.update_state(index, self.entering(session, index, h), session.cache, ctx)

    def entering(self, session: InPlaceSession, index: int, h: Tensor) -> Tensor:
        """What layer ``index`` reads: h (B, 1, d), for rows that left as the readout's learned state update has it."""
        token, readout = session.current, session.plan.readout
        for exit, code in session.codes().items():
            rows = (token.exit_index == exit).view(-1, 1, 1)
            h = torch.where(rows, readout.skip_input(exit, index, token.h, code), h)
        return h

    def before(self, session: InPlaceSession, index: int) -> tuple[Tensor, ...]:
        """What ``after`` needs of layer ``index`` before it runs."""
        return ()

    def after(self, session: InPlaceSession, index: int, left: Tensor, kept: tuple[Tensor, ...]) -> None:
        """Restore in the rows that left (B,) what this policy leaves them with."""


class CopyUpdate(StateUpdate):
    """``copy``: skipped attention layers repeat their newest K/V entry."""

    def skip(self, session: InPlaceSession, first: int, stop: int, h: Tensor, ctx: Context) -> None:
        session.cache.repeat_last_kv(first, stop)

    def after(self, session: InPlaceSession, index: int, left: Tensor, kept: tuple[Tensor, ...]) -> None:
        session.cache.replace_last_kv(index, left)


class StaleUpdate(StateUpdate):
    """``stale``: skipped Mamba layers keep the state they had."""

    def skip(self, session: InPlaceSession, first: int, stop: int, h: Tensor, ctx: Context) -> None:
        return None

    def before(self, session: InPlaceSession, index: int) -> tuple[Tensor, ...]:
        return tuple(part[0].clone() for part in session.cache.recurrent(index, index + 1))

    def after(self, session: InPlaceSession, index: int, left: Tensor, kept: tuple[Tensor, ...]) -> None:
        for part, old in zip(session.cache.recurrent(index, index + 1), kept, strict=True):
            part[0, left] = old[left]


UPDATES: dict[str, StateUpdate] = {"propagate": StateUpdate(), "copy": CopyUpdate(), "stale": StaleUpdate()}
