"""Rolling tokens back in recurrent state: copies of it, and the layers' inputs since then.

An SSM state cannot be cropped. Before a segment reads a token that may be rolled back, its layers' conv windows and SSM
states are copied, and from then on every input of a recurrent layer is kept. A rejection restores the nearest copy and
runs the state update over the inputs that stay. (Replaying inputs instead of keeping a state per token is the idea of
MambaInLlama, arXiv 2408.15237.)

How often to copy: a segment that drafts token by token can have a copy before each of them, and then nothing is
replayed there; a pass over a window leaves no states in between, so there one copy and a replay is all there is. A
copy per token is cheaper while a copy is small (on a CPU .1 ms against tens of them); it is memory and bandwidth for
every drafted token instead of arithmetic for every rejected one when it is not. ``COPY_LIMIT`` is where the journal
changes over; ``recipes/policies`` measures both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone, Context
from dynamax_llm.backbones.cache import StackedCache

#: A segment whose state is at most this many bytes is copied before every drafted token, a larger one once per window.
COPY_LIMIT = 16 * 2**20


@dataclass
class _Page:
    """One segment: state copies by the tokens of the window its layers had read, and inputs since the first."""

    copies: dict[int, list[Tensor]]
    inputs: dict[int, list[Tensor]] = field(default_factory=dict)  # by layer, each (B, T, d)

    @property
    def offset(self) -> int:
        """Tokens read before the inputs began."""
        return min(self.copies)

    def nearest(self, target: int) -> int:
        """The last copy that a state after ``target`` tokens can start from."""
        return max(offset for offset in self.copies if offset <= target)


class Journal:
    """What rolling back tokens of the present window takes, for the segments ``starts[i]`` to ``stops[i] - 1``."""

    def __init__(self, backbone: Backbone, cache: StackedCache, starts: Sequence[int], stops: Sequence[int]) -> None:
        self.backbone, self.cache, self.starts, self.stops = backbone, cache, starts, stops
        self.pages: dict[int, _Page] = {}
        self.tokens = [0] * len(starts)  # of this window, by segment
        self._recurrent = [kind in ("mamba", "hybrid") for kind in backbone.kinds]

    @property
    def width(self) -> int:
        """Tokens in the window."""
        return self.tokens[0]

    def open(self, segment: int, count: int) -> None:
        """Segment ``segment`` is about to run over ``count`` tokens."""
        before, self.tokens[segment] = self.tokens[segment], self.tokens[segment] + count
        first, stop = self.starts[segment], self.stops[segment]
        # The window's first token is never rolled back, so a segment that reads it alone needs no copy yet.
        certain = before == 0 and count == 1
        if certain or not any(self._recurrent[first:stop]):
            return
        parts = self.cache.recurrent_parts(first, stop)
        if segment not in self.pages:
            self.pages[segment] = _Page({before: [part.clone() for part in parts]})
        elif count == 1 and sum(part.nbytes for part in parts) <= COPY_LIMIT:
            self.pages[segment].copies[before] = [part.clone() for part in parts]

    def note(self, index: int, h: Tensor) -> None:
        """Layer ``index`` is about to read h (B, T, d)."""
        if not self._recurrent[index]:
            return
        for segment, page in self.pages.items():
            if self.starts[segment] <= index < self.stops[segment]:
                page.inputs.setdefault(index, []).append(h)

    def close(self) -> None:
        """Nothing before this moment will be rolled back."""
        self.pages.clear()
        self.tokens = [0] * len(self.tokens)

    def nbytes(self) -> int:
        """Memory of the copies and the inputs."""
        held = 0
        for page in self.pages.values():
            held += sum(part.nbytes for copy in page.copies.values() for part in copy)
            held += sum(part.nbytes for parts in page.inputs.values() for part in parts)
        return held

    def roll_back(
        self, counts: Tensor, start: int, context_at: Callable[[Tensor, int, slice], Context]
    ) -> dict[int, int]:
        """Leave in each row's recurrent state its first ``counts`` (B,) tokens of the window, whose first is in slot
        ``start``. ``context_at(h, past, tokens)`` makes the context of these tokens of the window. Returns, per layer,
        how many tokens were replayed."""
        replayed: dict[int, int] = {}
        for segment, page in self.pages.items():
            self._restore(segment, page, counts, start, context_at, replayed)
        return replayed

    def _restore(
        self,
        segment: int,
        page: _Page,
        counts: Tensor,
        start: int,
        context_at: Callable[[Tensor, int, slice], Context],
        replayed: dict[int, int],
    ) -> None:
        """Rows share the replay: it stops at every count that some row has, and that row's state is put aside."""
        first, stop = self.starts[segment], self.stops[segment]
        parts = self.cache.recurrent_parts(first, stop)
        aside: list[tuple[Tensor, list[Tensor]]] = []
        done = self.width  # tokens that the state in place has read
        for target in sorted(set(counts.tolist()), key=lambda count: (count < self.width, count)):
            nearest = page.nearest(target) if target < self.width else self.width
            if nearest > done or done > target:
                for part, saved in zip(parts, page.copies[nearest], strict=True):
                    part.copy_(saved)
                done = nearest
            if target > done:
                context = None
                for index, inputs in page.inputs.items():
                    self.cache.set_length(index, index + 1, start + done)  # hybrid layers append theirs again
                    h = torch.cat(inputs, dim=1)[:, done - page.offset : target - page.offset]
                    if context is None:
                        context = context_at(h, start + done, slice(done, target))
                    self.backbone.update_state(index, h, self.cache, context)
                    replayed[index] = replayed.get(index, 0) + h.shape[1]
                done = target
            rows = counts == target
            aside.append((rows, [part[:, rows].clone() for part in parts]))
        for rows, states in aside[:-1]:  # the last rows' state is in place
            for part, state in zip(parts, states, strict=True):
                part[:, rows] = state
        self.cache.set_length(first, stop, start + self.width)  # what was appended again is what was there
