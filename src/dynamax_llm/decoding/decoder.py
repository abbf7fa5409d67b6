"""The decode step: one token per row through as many layers as it needs, over any engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dynamax_llm.engines.base import DecodeStats, EngineSession
from dynamax_llm.engines.plan import RowThresholds, is_open
from dynamax_llm.shapes import RowFlags, RowIds


class Decoder:
    """Drives an engine session token by token under its plan's state policy.

    Under ``verify`` steps draft until one returns True: every layer has then read the window, whose tokens are
    accepted or replaced by the caller, who then calls ``keep``.
    """

    def __init__(self, session: EngineSession) -> None:
        self.session, self.plan = session, session.plan
        self.drafted = 0  # tokens in the open window, under ``verify``
        self._closed: list[RowThresholds] = [(None,) * self.plan.full] * session.slots
        self._left_at: list[Tensor] = []  # (B,) each: where every decoded token left, -1 for idle rows
        self._readouts = 0

    def step(self, ids: RowIds | None, thresholds: Sequence[RowThresholds], idle: RowFlags | None = None) -> bool:
        """One token (B,) per row, None: the tokens the session chose last. Returns whether every layer has read it.

        ``thresholds`` has one entry per row; ``idle`` (B,) rows need no logits.
        """
        session, plan = self.session, self.plan
        thresholds = self._limits(thresholds)
        session.begin(ids, thresholds, idle)
        self.drafted += 1
        for index in range(plan.active):
            session.segment(index)
            if is_open(thresholds, index) and session.running(index) == 0:
                session.leave(index)
                if plan.policy.exact_state and not plan.policy.exact_output and session.pending() >= plan.window:
                    session.catch_up()
                return False
        session.segment(plan.active)
        session.finish()
        return True

    def begin_ahead(self, thresholds: Sequence[RowThresholds], idle: RowFlags | None) -> None:
        """Let the engine start the next step with the tokens it is about to choose."""
        self.session.begin(None, self._limits(thresholds), idle, ahead=True)

    def check(self) -> None:
        """``verify``: let every layer read the open window, all of whose tokens have left."""
        self.session.catch_up()

    def keep(self, counts: Sequence[int]) -> None:
        """``verify``: close the window; of its tokens every row keeps its first ``counts``, at least 1."""
        self.session.keep(counts)
        self.drafted = 0

    def note(self, exits: Sequence[int] | Tensor, idle: RowFlags | None, readouts: int = 0) -> None:
        """Count a decoded token: its exit index in every row; ``readouts``: complete readouts besides."""
        if self.plan.policy.exact_state:
            left_at = torch.as_tensor(exits).cpu()
            self._left_at.append(left_at if idle is None else torch.where(idle.cpu(), -1, left_at))
        self.note_readouts(readouts)

    def note_readouts(self, readouts: int) -> None:
        """Count complete readouts beside those of single tokens."""
        self._readouts += readouts

    def stats(self) -> DecodeStats:
        """What was done since the prompt."""
        found = self.session.stats()
        if not self.plan.policy.exact_state:
            return found
        left_at = torch.stack(self._left_at) if self._left_at else None
        return replace(found, left_at=left_at, readouts=self._readouts)

    def _limits(self, thresholds: Sequence[RowThresholds]) -> Sequence[RowThresholds]:
        """The token that would fill the window of ``verify`` goes deep: its own token is then the full model's."""
        fills = self.plan.policy.exact_output and self.drafted + 1 >= self.plan.window
        return self._closed if fills else thresholds
