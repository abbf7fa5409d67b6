"""Exact state: hidden states of tokens that left wait in a window until a token goes deeper and takes them along.

The stack is cut at the exits into segments. A token that leaves at depth e leaves its h_e waiting at e. When a later
token passes e, the layers above run over everything that waits there and over that token, in one multi-token pass, so
each layer's state is what it would have been had no token ever left. (Catching up skipped layers in the next deep
token's forward is the idea of EE-LLM, arXiv 2312.04916, and FREE, arXiv 2310.05424, for attention.)

    exits after 2 and 3 of 5 layers; tokens a and b left at 2, c at 3, d runs to the end
    after b:   at 2 wait a b                  layers 0-1 have seen a b
    c passes:  at 3 wait a b c                layer 2 ran once, over a b c
    d passes:  nothing waits                  layer 2 ran over d, layers 3-4 ran once, over a b c d

The rows of a batch share the passes: a row that left rides along with its true h while another row goes deeper. It
costs arithmetic, not a second reading of the weights, and leaves less waiting; what the row says is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone, Context
from dynamax_llm.engines.eager import EagerEngine
from dynamax_llm.engines.journal import Journal


@dataclass
class Ledger:
    """What decoding really did, prompt apart."""

    layer_macs: int = 0  # multiply-accumulates in layers, of rows that had not ended
    window_bytes: int = 0  # most that waited and was kept for rolling back, at any one time
    replayed: int = 0  # tokens whose recurrent state was computed again after a rejection, times layers


class DeferredEngine(EagerEngine):
    """An EagerEngine whose layers may have seen different numbers of tokens.

    ``exits`` are depths; ``journal`` keeps what rolling back needs. Slots are positions in the caches: a slot is one
    token of every row, or none where ``padding`` is 0.
    """

    def __init__(
        self, backbone: Backbone, exits: Sequence[int], padding: Tensor | None = None, *, journal: bool = False
    ) -> None:
        super().__init__(backbone, padding)
        self.starts = (0, *exits)  # of the segments
        self.stops = (*exits, backbone.n_layers)
        self.waiting: dict[int, list[Tensor]] = {start: [] for start in self.starts}  # each (B, T, d)
        self.ledger = Ledger()
        self.live = 0  # rows that have not ended
        costs = backbone.costs().layers
        self._layer_macs, self.state_macs = [cost.layer for cost in costs], [cost.state for cost in costs]
        self._embedded: list[Tensor] = []  # of the slots in the window, for backbones whose layers read them
        self._context: tuple[int, int, Context] | None = None  # slots past, tokens, and the context made for them
        self._journal = Journal(self) if journal else None

    @property
    def pending(self) -> int:
        """Tokens per row that some layer has not seen."""
        return sum(part.shape[1] for start in self.starts for part in self.waiting[start])

    @property
    def settled(self) -> int:
        """Slots that every layer has seen."""
        return self.length - self.pending

    def enter_window(self, ids: Tensor, live: int) -> None:
        """Embed ids (B, 1) and let them wait before layer 0; ``live`` rows have not ended."""
        h = self.backbone.embed(ids)
        self.length, self.live = self.length + 1, live
        self.waiting[0].append(h)
        if self.backbone.needs_embedding:
            self._embedded.append(h)

    def advance(self, segment: int) -> tuple[Tensor, Tensor]:
        """Run a segment over all that waits before it: outputs (B, W, d), and (B, 1, d) of the newest token before
        the segment's last layer. The outputs wait before the next segment, if there is one."""
        first, stop = self.starts[segment], self.stops[segment]
        h = _join(self.waiting[first])
        self.waiting[first] = []
        ctx = self._context_for(h)
        if self._journal is not None:
            self._journal.open(segment, h.shape[1])
        before = h
        for index in range(first, stop):
            before = h
            if self._journal is not None:
                self._journal.note(index, h)
            h = self.backbone.layer(index, h, self.cache, ctx)
        self.passes += stop - first
        self.ledger.layer_macs += self.live * h.shape[1] * sum(self._layer_macs[first:stop])
        if stop in self.waiting:
            self.waiting[stop].append(h)
        self.ledger.window_bytes = max(self.ledger.window_bytes, self.window_bytes())
        return h, before[:, -1:]

    @property
    def newest(self) -> Tensor:
        """The token just entered, (B, 1, d)."""
        return self.waiting[0][-1]

    def catch_up(self) -> Tensor:
        """Run every segment over what waits before it; returns the last layer's outputs (B, W, d)."""
        h, lowest = None, next(i for i, start in enumerate(self.starts) if self.waiting[start])
        for segment in range(lowest, len(self.starts)):
            h, _ = self.advance(segment)
        assert h is not None
        return h

    def settle(self) -> None:
        """Every layer has seen every slot, and none will be taken back."""
        self._embedded = []
        if self._journal is not None:
            self._journal.close()

    def keep(self, counts: Tensor) -> None:
        """Of the W tokens since the last ``settle``, all seen by every layer, keep each row's first ``counts`` (B,).

        Attention is cropped to the longest row, and in the others the slots taken back are marked as holding no
        token; recurrent state is restored and replayed. Every count is at least 1.
        """
        assert self._journal is not None and self.pending == 0
        width = self._journal.width
        longest = int(counts.max())
        if int(counts.min()) < width:
            self._journal.roll_back(counts, self._embedded)
        start, self.length = self.length - width, self.length - width + longest
        self.cache.set_length(0, self.backbone.n_layers, self.length)
        if self.padding is not None or int(counts.min()) < longest:
            padding = self.padding
            if padding is None:
                padding = counts.new_ones(len(counts), self.length)
            kept = torch.arange(longest, device=counts.device) < counts.unsqueeze(1)
            self.padding = torch.cat((padding[:, :start], kept.to(padding.dtype)), dim=1)
        self._context = None
        self.settle()

    def window_bytes(self) -> int:
        """Memory of what waits and of what is kept for rolling back."""
        held = sum(part.nbytes for parts in self.waiting.values() for part in parts)
        return held + (0 if self._journal is None else self._journal.nbytes())

    def context_at(self, h: Tensor, past: int, embedded: list[Tensor]) -> Context:
        """The context of tokens h (B, T, d) in slots ``past`` and after, whose embeddings are ``embedded``."""
        padding = None if self.padding is None else self.padding[:, : past + h.shape[1]]
        if self.backbone.needs_embedding:
            return self.backbone.context(h, past=past, padding=padding, embedded=_join(embedded))
        return self.backbone.context(h, past=past, padding=padding)

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        for start, parts in self.waiting.items():
            self.waiting[start] = [part[rows] for part in parts]
        self._embedded = [part[rows] for part in self._embedded]
        self._context = None

    def _context_for(self, h: Tensor) -> Context:
        """Segments that run over the same tokens share one context."""
        count = h.shape[1]
        past = self.length - count
        if self._context is None or self._context[:2] != (past, count):
            self._context = (past, count, self.context_at(h, past, self._embedded[-count:]))
        return self._context[2]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
