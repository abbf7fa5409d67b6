"""Exact state: hidden states of tokens that left wait in a window until a token goes deeper and takes them along.

The stack is cut at the exits into segments. A token that leaves at depth e leaves its h_e waiting at e. When a later
token passes e, the layers above run over everything that waits there and over that token, in one multi-token pass, so
each layer's state is what it would have been had no token ever left. (Catching up skipped layers in the next deep
token's forward is the idea of EE-LLM, arXiv 2312.04916, and FREE, arXiv 2310.05424, for attention.)

    exits after 2 and 3 of 5 layers; tokens a and b left at 2, c at 3, d runs to the end
    after b:   at 2 wait a b                  layers 0-1 have read a b
    c passes:  at 3 wait a b c                layer 2 ran once, over a b c
    d passes:  nothing waits                  layer 2 ran over d, layers 3-4 ran once, over a b c d

The rows of a batch share the passes: a row that left goes along with its true h while another row goes deeper. It
costs arithmetic, not a second reading of the weights, and leaves less waiting; the row's own token is not changed.
Under ``verify`` the last segment's outputs give the full model's logits of the whole window, and ``keep`` rolls back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone, Context
from dynamax_llm.engines.base import DecodeStats
from dynamax_llm.engines.eager.exit_check import Token
from dynamax_llm.engines.eager.journal import Journal
from dynamax_llm.engines.eager.session import EagerSession, PromptState
from dynamax_llm.engines.plan import ExitPlan
from dynamax_llm.exits.state import ExitState
from dynamax_llm.shapes import Logits, NextLogits, RowFlags


class WaitingSession(EagerSession):
    """A session whose layers may have read different numbers of tokens (``defer``, ``verify``)."""

    def __init__(self, backbone: Backbone, plan: ExitPlan, slots: int) -> None:
        super().__init__(backbone, plan, slots)
        self.waiting: list[list[Tensor]] = [[] for _ in self.starts]  # before each segment, (B, T, d) each
        self.work = DecodeStats(layer_macs=0)
        self.live = 0  # rows that have not ended
        costs = backbone.costs().layers
        self._layer_macs, self._state_macs = [cost.layer for cost in costs], [cost.state for cost in costs]
        self._embedded: list[Tensor] = []  # of the tokens in the window, for backbones whose layers read them
        self._context: tuple[int, int, Context] | None = None  # slots past, tokens, and the context made for them
        self._journal = (
            Journal(backbone, self.cache, *plan.cuts(backbone.n_layers)) if plan.policy.exact_output else None
        )
        self._history: list[ExitState] = []  # what exits remembered after each token of the window
        # Under ``verify`` the readout reads the window's tokens anew once every layer has read them.
        self._observes = self._journal is not None and plan.active > 0 and bool(plan.readout.taps)
        self._before_window = self.exit_check.states
        self._entered: list[Tensor] = []  # embeddings of the window's tokens, where the readout observes them
        self._window: Tensor | None = None  # (B, W, d), the last layer's outputs over the window
        self._logits: Tensor | None = None

    def _enter(self, h: Tensor, idle: RowFlags | None) -> None:
        self.length += 1
        self.waiting[0].append(h)
        if self.backbone.needs_embedding:
            self._embedded.append(h)
        if self._observes:
            if not self._entered:
                self._before_window = self.exit_check.states
                self._tapped = {tap: [] for tap in self.plan.readout.taps}
            self._entered.append(h)
        self.token = Token(h, idle, self.plan.full)
        self.live = self.slots - (int(idle.sum()) if idle is not None else 0)
        self._logits = self._window = None

    def segment(self, index: int) -> None:
        """Run the segment over all that waits before it; the outputs wait before the next, if there is one."""
        token = self.token
        assert token is not None
        outputs, before = self._advance(index)
        if index == self.plan.active:
            self._window = outputs
            return
        token.before = before
        # A row that left is not evaluated again: later exits read it as it was, though its true h moves on.
        token.h = (
            torch.where(token.left.view(-1, 1, 1), token.h, outputs[:, -1:]) if token.some_left else outputs[:, -1:]
        )
        self.exit_check.decide(token, index)

    def leave(self, index: int) -> None:
        assert self.token is not None
        self.exit_check.advance(self.token, index + 1)
        self._note()
        self._logits = self.token.logits
        if self._logits is None:  # the rows' own readout was not made: idle rows only
            self._logits = self.backbone.readout(self.token.h)[:, 0]

    def finish(self) -> None:
        token = self.token
        assert token is not None and self._window is not None
        self._note()
        if self._journal is None:
            self._logits = token.keep_logits(~token.left, self.backbone.readout(self._window[:, -1:])[:, 0])
            self._settle()

    def _note(self) -> None:
        if self._journal is not None:
            self._history.append(self.exit_check.states)

    def logits(self) -> NextLogits:
        if self._logits is None:
            return self.window_logits()[:, -1]
        return self._logits

    def window_logits(self) -> Logits:
        assert self._window is not None, "the window is open"
        return self.backbone.readout(self._window)

    def pending(self) -> int:
        return sum(part.shape[1] for parts in self.waiting for part in parts)

    def catch_up(self) -> None:
        lowest = next((segment for segment, parts in enumerate(self.waiting) if parts), None)
        if lowest is None:
            return
        for segment in range(lowest, len(self.starts)):
            self._window, _ = self._advance(segment)
        if self._journal is None:
            self._settle()

    def keep(self, counts: Sequence[int]) -> None:
        """Attention is cropped to the longest row, and in the others the slots rolled back are marked as holding no
        token; recurrent state is restored and replayed."""
        assert self._journal is not None and self.pending() == 0
        width, longest, shortest = self._journal.width, max(counts), min(counts)
        start = self.length - width
        kept = torch.tensor(list(counts), device=self.backbone.device)
        if shortest < width:
            replayed = self._journal.roll_back(kept, start, self._context_at)
            for layer, tokens in replayed.items():
                self.work.replayed += self.live * tokens
                self.work.layer_macs = (self.work.layer_macs or 0) + self.live * tokens * self._state_macs[layer]
            self.exit_check.states = ExitState.after(self._history, kept)
        if self._observes:
            counted = None if shortest == width else kept
            window, self._entered = torch.cat(self._entered, dim=1), []
            self.exit_check.observe(self._before_window, window, self._take_tapped(), counts=counted)
        self.exit_check.end_chain()
        self.length = start + longest
        self.cache.set_length(0, self.backbone.n_layers, self.length)
        if self.padding is not None or shortest < longest:
            padding = kept.new_ones(self.slots, start) if self.padding is None else self.padding[:, :start]
            own = torch.arange(longest, device=kept.device) < kept.unsqueeze(1)
            self.padding = torch.cat((padding, own.to(padding.dtype)), dim=1)
        self._context = None
        self._settle()

    def stats(self) -> DecodeStats:
        self.work.passes = self.passes
        return self.work

    def adopt(self, prompt: PromptState) -> None:
        super().adopt(prompt)
        if self._journal is not None:
            self._journal.cache = self.cache

    def _rows_changed(self) -> None:
        self._context = None

    def _settle(self) -> None:
        """Every layer has read every token, and none will be rolled back."""
        self._embedded, self._history = [], []
        if self._journal is not None:
            self._journal.close()

    def _advance(self, segment: int) -> tuple[Tensor, Tensor]:
        """Run a segment over all that waits before it: outputs (B, W, d), and (B, 1, d) of the newest token before
        the segment's last layer."""
        first, stop = self.starts[segment], self.stops[segment]
        parts, self.waiting[segment] = self.waiting[segment], []
        h = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        ctx = self._shared_context(h)
        if self._journal is not None:
            self._journal.open(segment, h.shape[1])
        before = h
        for index in range(first, stop):
            before = h
            if self._journal is not None:
                self._journal.note(index, h)
            h = self.backbone.layer(index, h, self.cache, ctx)
            self._tap(index + 1, h)
        self.passes += stop - first
        self.work.layer_macs = (self.work.layer_macs or 0) + self.live * h.shape[1] * sum(self._layer_macs[first:stop])
        if segment + 1 < len(self.waiting):
            self.waiting[segment + 1].append(h)
        self.work.window_bytes = max(self.work.window_bytes, self._window_bytes())
        return h, before[:, -1:]

    def _window_bytes(self) -> int:
        """Memory of what waits and of what is kept for rolling back."""
        held = sum(part.nbytes for parts in self.waiting for part in parts)
        return held + (0 if self._journal is None else self._journal.nbytes())

    def _shared_context(self, h: Tensor) -> Context:
        """Segments that run over the same tokens share one context."""
        count = h.shape[1]
        past = self.length - count
        if self._context is None or self._context[:2] != (past, count):
            self._context = (past, count, self._context_at(h, past, slice(-count, None)))
        return self._context[2]

    def _context_at(self, h: Tensor, past: int, tokens: slice) -> Context:
        """The context of tokens h (B, T, d) in slots ``past`` and after: the ``tokens`` of the window."""
        padding = None if self.padding is None else self.padding[:, : past + h.shape[1]]
        if self.backbone.needs_embedding:
            embedded = torch.cat(self._embedded[tokens], dim=1)
            return self.backbone.context(h, past=past, padding=padding, embedded=embedded)
        return self.backbone.context(h, past=past, padding=padding)
