"""Taking tokens back from recurrent state: one snapshot per segment, and the layers' inputs since then.

An SSM state cannot be cropped. Before a segment reads a token that may be taken back, its layers' conv windows and SSM
states are copied once, and from then on every input of a recurrent layer is kept; a rejection restores the copies and
runs the state update over the inputs that stay. (Replaying inputs instead of keeping a state per token is the idea of
MambaInLlama, arXiv 2408.15237.) The other way, a copy per token, costs memory and bandwidth for every drafted token
instead of arithmetic for every rejected one; ``recipes/policies/rollback.py`` measures both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dynamax_llm.engines.deferred import DeferredEngine


@dataclass
class _Page:
    """One segment: state copies taken when its layers had seen ``offset`` tokens of the window, inputs since."""

    offset: int
    saved: list[Tensor]
    inputs: dict[int, list[Tensor]] = field(default_factory=dict)  # by layer, each (B, T, d)


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
        if segment not in self.pages and not certain and any(self._recurrent[first:stop]):
            copies = [part.clone() for part in self.engine.cache.recurrent_parts(first, stop)]
            self.pages[segment] = _Page(seen, copies)

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
            held += sum(part.nbytes for part in page.saved)
            held += sum(part.nbytes for parts in page.inputs.values() for part in parts)
        return held

    def roll_back(self, counts: Tensor, embedded: list[Tensor]) -> None:
        """Leave in each row's recurrent state its first ``counts`` (B,) tokens of the window.

        Rows share the replay: it stops at every count that some row has, and that row's state is put aside.
        """
        for segment, page in self.pages.items():
            self._replay(segment, page, counts, embedded)

    def _replay(self, segment: int, page: _Page, counts: Tensor, embedded: list[Tensor]) -> None:
        engine, cache = self.engine, self.engine.cache
        first, stop = engine.starts[segment], engine.stops[segment]
        start = engine.length - self.width  # slot of the window's first token
        parts = cache.recurrent_parts(first, stop)
        for part, saved in zip(parts, page.saved, strict=True):
            part.copy_(saved)
        for index in page.inputs:
            cache.crop_kv(index, index + 1, start + page.offset)  # hybrid layers append theirs again
        aside: list[tuple[Tensor, list[Tensor]]] = []
        done = page.offset
        for target in sorted(set(counts.tolist())):
            if target > done:
                self._advance(page, done, target, start, embedded)
                done = target
            rows = counts == target
            aside.append((rows, [part[:, rows].clone() for part in parts]))
        for rows, states in aside[:-1]:  # the last rows' state is in place
            for part, state in zip(parts, states, strict=True):
                part[:, rows] = state

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
