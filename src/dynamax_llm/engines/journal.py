"""Taking tokens back from recurrent state: copies of it, and the layers' inputs since then.

An SSM state cannot be cropped. Before a segment reads a token that may be taken back, its layers' conv windows and SSM
states are copied, and from then on every input of a recurrent layer is kept. A rejection restores the nearest copy and
runs the state update over the inputs that stay. (Replaying inputs instead of keeping a state per token is the idea of
MambaInLlama, arXiv 2408.15237.)

How often to copy: a segment that drafts token by token can have a copy before each of them, and then nothing is
replayed there; a pass over a window leaves no states in between, so there one copy and a replay is all there is. A
copy per token is the cheaper way while a copy is small (on a CPU .1 ms against tens of them); it is memory and
bandwidth for every drafted token instead of arithmetic for every rejected one when it is not. ``COPY_LIMIT`` is where
we change over; ``recipes/policies/rollback.py`` measures both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dynamax_llm.engines.deferred import DeferredEngine


#: A segment whose state is at most this many bytes is copied before every drafted token, a larger one once per window.
COPY_LIMIT = 16 * 2**20


@dataclass
class _Page:
    """One segment: state copies by how many tokens of the window its layers had seen, and inputs since the first."""

    copies: dict[int, list[Tensor]]
    inputs: dict[int, list[Tensor]] = field(default_factory=dict)  # by layer, each (B, T, d)

    @property
    def offset(self) -> int:
        """Tokens seen before the inputs began."""
        return min(self.copies)

    def nearest(self, target: int) -> int:
        """The last copy that a state after ``target`` tokens can start from."""
        return max(offset for offset in self.copies if offset <= target)


class Journal:
    """What a DeferredEngine needs to take back tokens of the present window."""

    def __init__(self, engine: DeferredEngine) -> None:
        self.engine = engine
        self.pages: dict[int, _Page] = {}
        self.seen = [0] * len(engine.starts)  # tokens of this window, by segment
        self._recurrent = [kind in ("mamba", "hybrid") for kind in engine.backbone.kinds]

    @property
    def width(self) -> int:
        """Tokens in the window."""
        return self.seen[0]

    def open(self, segment: int, count: int) -> None:
        """The segment is about to run over ``count`` tokens."""
        seen, self.seen[segment] = self.seen[segment], self.seen[segment] + count
        first, stop = self.engine.starts[segment], self.engine.stops[segment]
        # The window's first token is never taken back, so a segment that reads it alone needs no copy yet.
        certain = seen == 0 and count == 1
        if certain or not any(self._recurrent[first:stop]):
            return
        parts = self.engine.cache.recurrent_parts(first, stop)
        if segment not in self.pages:
            self.pages[segment] = _Page({seen: [part.clone() for part in parts]})
        elif count == 1 and sum(part.nbytes for part in parts) <= COPY_LIMIT:
            self.pages[segment].copies[seen] = [part.clone() for part in parts]

    def note(self, index: int, h: Tensor) -> None:
        """Layer ``index`` is about to read h (B, T, d)."""
        if not self._recurrent[index]:
            return
        for segment, page in self.pages.items():
            if self.engine.starts[segment] <= index < self.engine.stops[segment]:
                page.inputs.setdefault(index, []).append(h)

    def close(self) -> None:
        """Nothing before this moment will be taken back."""
        self.pages.clear()
        self.seen = [0] * len(self.seen)

    def nbytes(self) -> int:
        """Memory of the copies and the inputs."""
        held = 0
        for page in self.pages.values():
            held += sum(part.nbytes for copy in page.copies.values() for part in copy)
            held += sum(part.nbytes for parts in page.inputs.values() for part in parts)
        return held

    def roll_back(self, counts: Tensor, embedded: list[Tensor]) -> None:
        """Leave in each row's recurrent state its first ``counts`` (B,) tokens of the window."""
        for segment, page in self.pages.items():
            self._restore(segment, page, counts, embedded)

    def _restore(self, segment: int, page: _Page, counts: Tensor, embedded: list[Tensor]) -> None:
        """Rows share the replay: it stops at every count that some row has, and that row's state is put aside."""
        engine, cache = self.engine, self.engine.cache
        first, stop = engine.starts[segment], engine.stops[segment]
        start = engine.length - self.width  # slot of the window's first token
        parts = cache.recurrent_parts(first, stop)
        aside: list[tuple[Tensor, list[Tensor]]] = []
        done = self.width  # tokens that the state in place has seen
        for target in sorted(set(counts.tolist()), key=lambda count: (count < self.width, count)):
            nearest = page.nearest(target) if target < self.width else self.width
            if nearest > done or done > target:
                for part, saved in zip(parts, page.copies[nearest], strict=True):
                    part.copy_(saved)
                done = nearest
            if target > done:
                for index in page.inputs:
                    cache.set_length(index, index + 1, start + done)  # hybrid layers append theirs again
                self._advance(page, done, target, start, embedded)
                done = target
            rows = counts == target
            aside.append((rows, [part[:, rows].clone() for part in parts]))
        for rows, states in aside[:-1]:  # the last rows' state is in place
            for part, state in zip(parts, states, strict=True):
                part[:, rows] = state
        cache.set_length(first, stop, engine.length)  # what was appended again is what was there

    def _advance(self, page: _Page, done: int, target: int, start: int, embedded: list[Tensor]) -> None:
        """State of the page's layers over tokens ``done`` to ``target - 1`` of the window."""
        engine, ctx = self.engine, None
        for index, inputs in page.inputs.items():
            h = _slice(inputs, done - page.offset, target - page.offset)
            if ctx is None:
                ctx = engine.context_at(h, start + done, embedded[done:target])
            engine.backbone.update_state(index, h, engine.cache, ctx)
            engine.ledger.replayed += engine.live * h.shape[1]
            engine.ledger.layer_macs += engine.live * h.shape[1] * engine.state_macs[index]


def _slice(parts: list[Tensor], first: int, stop: int) -> Tensor:
    """Tokens ``first`` to ``stop - 1`` of consecutive runs (B, T, d)."""
    return torch.cat(parts, dim=1)[:, first:stop]
