"""Decoding with exact state: tokens that left wait, and a deeper token takes them along (``defer``, ``verify``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.decoder import Decoder, ExitPlan, Step, Token
from dynamax_llm.decoding.spent import Spent
from dynamax_llm.engines import DeferredEngine
from dynamax_llm.exits.state import State
from dynamax_llm.shapes import Ids, Logits, NextLogits, RowFlags


class DeferredDecoder(Decoder):
    """A Decoder whose skipped layers wait. Its rows share the catch-up passes, never their decisions.

    At most ``plan.window`` tokens per row wait; the token that fills the window makes all layers catch up, after it
    has left where it wanted to. The prompt never waits.
    """

    engine: DeferredEngine
    readouts = 0  # complete readouts beside those that a token's own check and voice need

    def __init__(
        self, backbone: Backbone, plan: ExitPlan, padding: Tensor | None = None, *, journal: bool = False
    ) -> None:
        self._journal = journal
        self._taken: list[Tensor] = []  # (B,) each: where every decoded token left, -1 for idle rows
        super().__init__(backbone, plan, padding)

    def _new_engine(self, padding: Tensor | None) -> DeferredEngine:
        return DeferredEngine(self.backbone, self.plan.layers, padding, journal=self._journal)

    def step(self, ids: Ids, thresholds: Sequence[float | None], idle: RowFlags | None = None) -> Step:
        token = self._decide(ids, thresholds, idle)
        if token.all_left:
            if self.engine.pending >= self.plan.window:
                self.engine.catch_up()
                self.engine.settle()
            return Step(self._spoken(token), token.exit_index)
        outputs, _ = self.engine.advance(self.n_exits)
        self.engine.settle()
        return Step(token.keep(~token.left, self.backbone.readout(outputs[:, -1:])[:, 0]), token.exit_index)

    def _decide(self, ids: Tensor, thresholds: Sequence[float | None], idle: Tensor | None) -> Token:
        """Run the token (B, 1) up to where every row has left, or past the last exit."""
        self.engine.grow()
        if idle is None or not self.n_exits:
            idle = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self.engine.enter_window(ids, int((~idle).sum()))
        token = Token(self.engine.newest, idle, self.n_exits)
        for index in range(self.n_exits):
            outputs, token.before = self.engine.advance(index)
            # A row that left is judged no more: later exits' heads see it as it was, though its true h moves on.
            token.h = torch.where(token.left.view(-1, 1, 1), token.h, outputs[:, -1:])
            self._ask(token, index, thresholds[index])
            if token.all_left:
                self._advance_estimator(token, index + 1)
                break
        self._taken.append(torch.where(idle, -1, token.exit_index))
        return token

    def spent(self) -> Spent:
        ledger, taken = self.engine.ledger, torch.stack(self._taken) if self._taken else None
        return Spent(self.engine.passes, ledger.layer_macs, taken, self.readouts, ledger.window_bytes, ledger.replayed)

    def _spoken(self, token: Token) -> Tensor:
        """Logits (B, V) of a token that left in every row."""
        return self.backbone.readout(token.h)[:, 0] if token.logits is None else token.logits


@dataclass(frozen=True)
class Checked(Step):
    """A step of ``verify``. ``window`` (B, W, V) are the full model's logits after every token of the window, once
    all layers have seen them; None while the window is open, and ``logits`` is then an exit's proposal."""

    window: Logits | None = None


class VerifyingDecoder(DeferredDecoder):
    """A DeferredDecoder that can take tokens back: ``step`` until it returns a window, then ``keep``."""

    def __init__(self, backbone: Backbone, plan: ExitPlan, padding: Tensor | None = None) -> None:
        super().__init__(backbone, plan, padding, journal=True)
        self._history: list[list[State] | None] = []  # the estimator's states after each token of the window

    @property
    def drafted(self) -> int:
        """Tokens in the open window."""
        return len(self._history)

    def prefill(self, ids: Ids) -> NextLogits:
        logits = super().prefill(ids)
        self._history = []
        return logits

    def step(self, ids: Ids, thresholds: Sequence[float | None], idle: RowFlags | None = None) -> Checked:
        # The token that would fill the window goes deep instead: its own token is then the full model's.
        if self.drafted + 1 >= self.plan.window:
            thresholds = [None] * len(thresholds)
        token = self._decide(ids, thresholds, idle)
        self._history.append(self.states)
        if token.all_left:
            return Checked(self._spoken(token), token.exit_index)
        window = self.backbone.readout(self.engine.advance(self.n_exits)[0])
        self.readouts += self.engine.live * (window.shape[1] - 1)
        full = torch.full_like(token.exit_index, self.n_exits)
        return Checked(window[:, -1], full, window)

    def check(self) -> Logits:
        """Full logits (B, W, V) after every token of the open window."""
        window = self.backbone.readout(self.engine.catch_up())
        self.readouts += self.engine.live * window.shape[1]
        return window

    def keep(self, counts: Tensor) -> None:
        """Close the window: of its tokens, every row keeps the first ``counts`` (B,), at least 1."""
        self.engine.keep(counts)
        if self.states is not None and int(counts.min()) < self.drafted:
            self.states = states_after(self._history, counts)
        self._history = []


def new_decoder(backbone: Backbone, plan: ExitPlan, padding: Tensor | None = None) -> Decoder:
    """The decoder that carries out the plan's state policy."""
    kind = VerifyingDecoder if plan.policy.exact_output else DeferredDecoder if plan.policy.exact_state else Decoder
    return kind(backbone, plan, padding)


def states_after(history: list[list[State] | None], counts: Tensor) -> list[State]:
    """The estimator's states with each row as it was after its ``counts`` (B,)-th token."""
    rows = torch.arange(len(counts), device=counts.device)
    moments = [states for states in history if states is not None]
    return [
        tuple(torch.stack(parts)[counts - 1, rows] for parts in zip(*(moment[exit] for moment in moments), strict=True))
        for exit in range(len(moments[0]))
    ]
