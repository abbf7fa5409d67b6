"""What eager sessions share: the cache, the prompt at full depth, rows that are admitted and released."""

from __future__ import annotations

import abc
import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone, Context
from dynamax_llm.backbones.cache import Snapshot, SSMLayer, StackedCache
from dynamax_llm.engines.base import DecodeStats
from dynamax_llm.engines.eager.exit_check import ExitCheck, Token
from dynamax_llm.engines.plan import ExitPlan, RowThresholds
from dynamax_llm.exits.state import ExitState
from dynamax_llm.shapes import Ids, Logits, NextLogits, RowFlags, RowIds

#: Unused slots, per row in use, from which on the caches are compacted when a row is admitted.
COMPACT_FROM = 256


@dataclass(frozen=True)
class SessionSnapshot:
    """A copy of everything a session's rows have come to."""

    cache: Snapshot
    length: int
    padding: Tensor | None
    states: ExitState


@dataclass(frozen=True)
class PromptState:
    """What prompts leave behind. States of exits are never changed in place; the cache is, so it is copied."""

    cache: StackedCache
    length: int
    padding: Tensor | None
    states: ExitState


def _copied(cache: StackedCache) -> StackedCache:
    twin = copy.deepcopy(cache)
    for layer in twin.layers:
        if isinstance(layer, SSMLayer):
            layer.rebind()
    return twin


class EagerSession(abc.ABC):
    """One batch being decoded: cache, padding, and what exits remember.

    All rows share the slots of the cache; ``padding`` (B, length) is 1 where a slot holds a token of the row, None
    where all do. Positions count a row's own tokens, so rows of different lengths need no alignment.
    """

    kernels: tuple[str, ...] = ()

    def __init__(self, backbone: Backbone, plan: ExitPlan, slots: int) -> None:
        self.backbone, self.plan, self.slots = backbone, plan, slots
        self.starts, self.stops = plan.cuts(backbone.n_layers)
        self.length = 0  # slots of the cache that have been entered
        self.padding: Tensor | None = None
        self.passes = 0  # readings of a layer's weights for the batch since the prompt
        self.cache = backbone.new_cache()
        self.exit_check = ExitCheck(plan, slots, backbone.device)
        self.token: Token | None = None
        self._banned: list[int] = []
        self._next: Tensor | None = None  # tokens (B,) that ``chosen`` gave
        self._tapped: dict[int, list[Tensor]] = {}  # h (B, T, d) after layers that the readout taps, when it does

    # prompts and rows

    def prefill(self, ids: Ids, padding: Tensor | None = None) -> NextLogits:
        """The prompts (B, T) at full depth: logits (B, V). Exits with a state read the whole prompt."""
        assert len(ids) == self.slots and self.length == 0
        self.padding = padding if padding is not None and not bool(padding.all()) else None
        h = embedded = self.backbone.embed(ids)
        ctx = self.backbone.context(h, past=0, padding=self.padding)
        self.length = ids.shape[1]
        depth, features = 0, None
        before_prompt, taps = self.exit_check.states, self.plan.readout.taps if self.plan.active else ()
        self._tapped = {tap: [] for tap in taps}
        for index, stop in enumerate(self.stops[:-1] if self.exit_check.reads_prompts else ()):
            before = self._layers(depth, stop - 1, h, ctx)
            h = self._layers(stop - 1, stop, before, ctx)
            depth = stop
            features = self.exit_check.read_prompt(index, h, before, features, self.padding)
        h = self._layers(depth, self.backbone.n_layers, h, ctx)
        if taps:
            self.exit_check.observe(before_prompt, embedded, self._take_tapped(), self.padding)
        self.passes = 0
        return self.backbone.readout(h[:, -1:])[:, 0]

    def admit(self, row: int, ids: Ids) -> NextLogits:
        """Row ``row`` begins with the prompt (1, T): logits (1, V). Other rows are not touched."""
        assert not self.pending(), "rows enter while nothing waits"
        alone = type(self)(self.backbone, self.plan, 1)
        logits = alone.prefill(ids)
        count = ids.shape[1]
        padding = self._padding_of_all()
        padding[row] = 0
        if self.length > count + COMPACT_FROM and int(padding.sum(1).max()) + COMPACT_FROM < self.length:
            padding = self.cache.compact(padding)
            self.length = padding.shape[1]
        start = max(self.length - count, 0)
        if start + count > self.length:
            empty = padding.new_zeros(self.slots, start + count - self.length)
            padding = torch.cat((padding, empty), dim=1)
        self.cache.rows = self.slots
        self.cache.put_row(row, alone.cache, 0, start)
        self.length = start + count
        self.cache.set_length(0, self.backbone.n_layers, self.length)
        padding[row, start:] = 1
        self.padding = padding
        self.exit_check.states = self.exit_check.states.put(row, alone.exit_check.states)
        self._rows_changed()
        return logits

    def release(self, row: int) -> None:
        """Row ``row`` holds no tokens from now on."""
        assert not self.pending(), "rows leave while nothing waits"
        padding = self._padding_of_all()
        padding[row] = 0
        self.padding = padding
        self._rows_changed()

    def _padding_of_all(self) -> Tensor:
        if self.padding is not None:
            return self.padding.clone()
        return torch.ones(self.slots, self.length, dtype=torch.int64, device=self.backbone.device)

    def _rows_changed(self) -> None:
        """Forget what was prepared for the rows as they were."""

    def snapshot(self) -> SessionSnapshot:
        """Everything the rows have come to, while nothing waits; ``restore`` goes back to it."""
        return SessionSnapshot(self.cache.snapshot(), self.length, self.padding, self.exit_check.states)

    def restore(self, snapshot: SessionSnapshot) -> None:
        """Forget what happened since ``snapshot``."""
        self.cache.restore(snapshot.cache)
        self.length, self.padding = snapshot.length, snapshot.padding
        self.exit_check.states = snapshot.states
        self._rows_changed()

    def prompt_state(self) -> PromptState:
        """A copy of what the prompts left behind, for ``adopt`` of other sessions; before the first token."""
        return PromptState(_copied(self.cache), self.length, self.padding, self.exit_check.states)

    def adopt(self, prompt: PromptState) -> None:
        """Go on from prompts that another session of the same backbone and exits has read; they are copied."""
        self.cache, self.length, self.padding = _copied(prompt.cache), prompt.length, prompt.padding
        self.exit_check.states = prompt.states

    # one token

    def begin(
        self, ids: RowIds | None, thresholds: Sequence[RowThresholds], idle: RowFlags | None, *, ahead: bool = False
    ) -> None:
        if ahead:  # nothing can start before the results are there
            return
        ids = self._next if ids is None else ids
        assert ids is not None
        self.exit_check.set_thresholds(thresholds, ids.device)
        if self.padding is not None:
            self.padding = torch.cat((self.padding, self.padding.new_ones(self.slots, 1)), dim=1)
        # Without exits nothing is saved by leaving a finished row out.
        self._enter(self.backbone.embed(ids.unsqueeze(1)), idle if self.plan.active else None)

    def running(self, index: int) -> int:
        assert self.token is not None
        return int((~self.token.left).sum()) if self.token.some_left else self.slots

    def exits(self) -> RowIds:
        assert self.token is not None
        return self.token.exit_index

    def ban(self, tokens: Sequence[int]) -> None:
        self._banned = list(tokens)

    def chosen(self) -> tuple[list[int], list[int]]:
        self._next = self._greedy(self.logits())
        return self._next.tolist(), self.exits().tolist()

    def window_chosen(self) -> list[list[int]]:
        return self._greedy(self.window_logits()).tolist()

    def _greedy(self, logits: Tensor) -> Tensor:
        """The likeliest tokens that are not banned, over the last axis."""
        if self._banned:
            logits = logits.clone()
            logits[..., self._banned] = -torch.inf
        return logits.argmax(-1)

    def window_logits(self) -> Logits:
        raise AssertionError("only sessions under 'verify' have windows")

    def keep(self, counts: Sequence[int]) -> None:
        raise AssertionError("only sessions under 'verify' roll back")

    def pending(self) -> int:
        return 0

    def catch_up(self) -> None:
        """Nothing waits."""

    def stats(self) -> DecodeStats:
        return DecodeStats(self.passes)

    def close(self) -> None:
        """Nothing is shared."""

    def _layers(self, first: int, stop: int, h: Tensor, ctx: Context) -> Tensor:
        """Layers ``first`` to ``stop - 1``; their state advances."""
        self.passes += stop - first
        for index in range(first, stop):
            h = self.backbone.layer(index, h, self.cache, ctx)
            self._tap(index + 1, h)
        return h

    def _tap(self, depth: int, h: Tensor) -> None:
        """Keep h (B, T, d) after ``depth`` layers if the readout reads it there."""
        if depth in self._tapped:
            self._tapped[depth].append(h)

    def _take_tapped(self) -> list[Tensor]:
        """What was kept, over all tokens, ascending by depth; nothing more is kept."""
        parts, self._tapped = self._tapped, {}
        return [torch.cat(parts[depth], dim=1) for depth in sorted(parts)]

    @abc.abstractmethod
    def _enter(self, h: Tensor, idle: RowFlags | None) -> None:
        """Embedded tokens h (B, 1, d) of the next slot enter."""

    @abc.abstractmethod
    def segment(self, index: int) -> None: ...

    @abc.abstractmethod
    def leave(self, index: int) -> None: ...

    @abc.abstractmethod
    def finish(self) -> None: ...

    @abc.abstractmethod
    def logits(self) -> NextLogits: ...
