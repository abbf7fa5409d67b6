"""A machine whose tokens wait: exact state (``defer``), and taking tokens back (``verify``).

Between two segments lies a pass whose rows are the tokens that wait there. A token that goes deeper joins them, and the
segment runs over all of them at once; then they wait before the next segment, or every layer has seen them.

    step      enter, segment 0, exit 0 asked
    single i  segment i for the newest token alone, where none waits before it
    join i    the newest token joins those that wait before segment i
    run i     segment i over all that waits before it; they then wait before the next
    ask i     exit i is asked about the newest token
    leave i   every row has left: later heads hear of it, the exit speaks
    speak     the last layer speaks for the newest token
    window    the last layer speaks for every token that went through it together

Recurrent states have two homes where tokens may be taken back: the older states are still there, and the ring still
holds what every token fed, so ``replay`` makes the states after any number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.engines.cuda.check import mailbox, wait_for_step
from dynamax_llm.engines.cuda.kernels.rows import move_kernel, settle_kernel, show_kernel
from dynamax_llm.engines.cuda.launch import overlaps, settings
from dynamax_llm.engines.cuda.layers import LAYERS, Layers
from dynamax_llm.engines.cuda.passes import Pass
from dynamax_llm.engines.cuda.runner import GraphRunner, residual_dtype
from dynamax_llm.engines.cuda.tiles import power_of_two
from dynamax_llm.exits.features import ConfidenceEstimator
from dynamax_llm.exits.readout import Readout


@dataclass
class Waiting:
    """Tokens that wait before a segment: their rows, and how many per sequence, on the device."""

    rows: Pass
    count: Tensor  # (1,) int32


class WindowRunner(GraphRunner):
    """A GraphRunner whose layers may have seen different numbers of tokens; at most ``most`` wait per sequence."""

    updates_exited_rows = True

    def __init__(
        self,
        backbone: Backbone,
        exits: tuple[int, ...],
        estimator: ConfidenceEstimator,
        readout: Readout,
        batch: int,
        full: int,
        most: int,
        *,
        journal: bool = False,
    ) -> None:
        """``journal``: tokens may be taken back."""
        self.most, self.journal = most, journal
        device = backbone.device
        residual = residual_dtype(backbone)
        pad = torch.zeros(batch, dtype=torch.int32, device=device)

        def waiting(tokens: int, count: int) -> Waiting:
            h = torch.zeros(batch * tokens, backbone.width, dtype=residual, device=device)
            return Waiting(Pass(batch, tokens, h, pad), torch.tensor([count], dtype=torch.int32, device=device))

        self.newest = waiting(1, 1)
        self.waiting = [waiting(most, 0) for _ in exits]  # before segment i + 1
        self.counts = [0] * len(exits)  # the same, as the host counts
        self.joined = 0  # the last step whose token joined those that wait
        self.shown = torch.zeros(batch, backbone.width, dtype=residual, device=device)  # what the estimator sees
        self.no_turn = torch.zeros(2, dtype=torch.int32, device=device)
        vocabulary = len(backbone.model.get_output_embeddings().weight)
        self.window_logits = torch.zeros(batch * most if journal else 0, vocabulary, device=device)
        self.window_words = mailbox(2 * batch * most, device)
        self.replayed = waiting(most, 0)
        super().__init__(backbone, exits, estimator, readout, batch, full, most)

    def _family(self, batch: int, most: int) -> Layers:
        return LAYERS[self.backbone.kinds[0]](self.backbone, batch, most, 1 + self.journal, self.starts)

    def _add_programs(self) -> None:
        # One token's own rows, and padding, are shared with the passes of waiting tokens.
        self.newest.rows = self.now
        for item in (*self.waiting, self.replayed):
            item.rows.pad = self.pad
        add, last = self.programs.add, self.n_exits
        add("step", self._step)
        for index in range(1, last + 1):
            add(f"single {index}", partial(self._single, index))
            add(f"join {index}", partial(self._move, self.newest, self.waiting[index - 1], keep=True))
            add(f"run {index}", partial(self._run, index))
            if index < last:
                add(f"ask {index}", partial(self.check.ask, index, self.shown, self.before, None))
        for index in range(last):
            add(f"leave {index}", partial(self._leave, index))
        # What the full model says of a row that left matters only where it is checked.
        speaker = self.now.h if self.journal else self.shown
        add("speak", lambda: self._choose(self._read_out(speaker, self.logits)))
        if self.journal:
            add("window", self._window)
            if self.layers.replays:
                add("replay", self._replay)

    def _reset(self) -> None:
        super()._reset()
        self.committed = 0
        self.counts = [0] * self.n_exits
        self.joined = self.steps
        for item in self.waiting:
            item.count.zero_()
            item.rows.slot.fill_(-1)

    def _step(self) -> None:
        self._enter()
        self._show(self.newest, None, frozen=False)
        self._layers(0, self.now, self.newest)
        if self.n_exits:
            self.check.ask(0, self.shown, self.before, None)
        self._turn(0)

    def _layers(self, segment: int, rows: Pass, source: Waiting) -> None:
        """A segment's layers over ``rows``; the estimator is shown the newest token, unless it has left."""
        first, stop = self.starts[segment], self.stops[segment]
        kept: Tensor | None = None
        if segment < self.n_exits and self.check.sees_before:
            kept = rows.buffer("kept", *rows.h.shape, dtype=rows.h.dtype)
        for layer in range(first, stop):
            # Tokens that waited have been moved; only one that goes on alone is still as its layer left it.
            fresh = layer == first and (segment == 0 or source is not self.newest)
            self.layers.layer(layer, rows, fresh=fresh, keep=kept if layer == stop - 1 else None)
        self._show(source, kept, frozen=True)

    def _single(self, segment: int) -> None:
        self._layers(segment, self.now, self.newest)
        if segment < self.n_exits:
            self.check.ask(segment, self.shown, self.before, None)
        self._turn(segment)

    def _run(self, segment: int) -> None:
        here = self.waiting[segment - 1]
        self._layers(segment, here.rows, here)
        if segment < self.n_exits:
            self._move(here, self.waiting[segment], turn=self.layers.buffer_index(segment))
        else:
            self._settle(here, None, self.layers.buffer_index(segment), keep=self.journal)

    def _leave(self, index: int) -> None:
        self.check.advance(index, self.shown)
        early = self.check.logits if index == 0 else None
        self._choose(self._read_out(self.shown, self.logits) if early is None else early)

    def _window(self) -> None:
        """Logits (M, V) of every row that the last segment ran over, and their likeliest tokens."""
        here = self.waiting[-1]
        self._choose(self._read_out(here.rows.h, self.window_logits), self.window_words)
        self._settle(here, None, self.no_turn)

    def _replay(self) -> None:
        self.layers.replay(self.replayed.rows)

    # small kernels

    def _show(self, source: Waiting, kept: Tensor | None, *, frozen: bool) -> None:
        """The newest token to the estimator; with ``kept``, h before the last layer, that too."""
        width, device = self.backbone.width, self.shown.device
        show_kernel[(self.batch,)](
            source.rows.h,
            source.rows.h if kept is None else kept,
            source.count,
            self.check.left,
            self.shown,
            self.before,
            source.rows.tokens,
            width,
            power_of_two(width),
            frozen,
            kept is not None,
            overlaps(device),
            **settings(device, 8),
        )

    def _move(self, here: Waiting, there: Waiting, *, keep: bool = False, turn: Tensor | None = None) -> None:
        width, device, rows = self.backbone.width, here.rows.h.device, here.rows
        move_kernel[(rows.rows,)](
            rows.h,
            rows.slot,
            rows.place,
            here.count,
            there.rows.h,
            there.rows.slot,
            there.rows.place,
            there.count,
            rows.tokens,
            there.rows.tokens,
            width,
            power_of_two(width),
            overlaps(device),
            **settings(device, 8),
        )
        self._settle(here, there, self.no_turn if turn is None else turn, keep=keep)

    def _settle(self, here: Waiting, there: Waiting | None, turn: Tensor, *, keep: bool = False) -> None:
        device = here.rows.h.device
        settle_kernel[(1,)](
            here.rows.slot,
            here.count,
            here.count if there is None else there.count,
            turn,
            here.rows.rows,
            power_of_two(here.rows.rows),
            keep,
            there is not None,
            overlaps(device),
            **settings(device, 1),
        )

    def _turn(self, segment: int) -> None:
        """A segment's states have been written: they are the ones to read."""
        if self.journal and self.layers.replays:
            self._settle(self.newest, None, self.layers.buffer_index(segment), keep=True)

    # what the host does

    def window_bytes(self) -> int:
        """Memory of what waits and of what is kept for taking tokens back."""
        held = sum(item.rows.h.nbytes for item in self.waiting)
        return held + (self.layers.spare_bytes() if self.journal else 0)

    def window_choices(self, count: int) -> list[list[int]]:
        """The likeliest tokens of the last window, per row, of ``count`` tokens each; waits for them."""
        read = wait_for_step(self.window_words.numpy().reshape(2, -1)[self.steps & 1], self.steps, self.ids.device)
        return (read & 0xFFFFFFFF).reshape(self.batch, self.most)[:, :count].tolist()

    def keep(self, width: int, counts: Sequence[int]) -> None:
        """Of the ``width`` tokens since the last call, all read by every layer, keep each row's first ``counts``."""
        if min(counts) < width:
            kept = torch.tensor(counts, dtype=torch.int32, device=self.length.device)
            start = self.length - width
            if self.layers.replays:
                at = torch.arange(self.most, dtype=torch.int32, device=kept.device)
                slots = torch.where(at < kept.unsqueeze(1), start.unsqueeze(1) + at, -1)
                self.replayed.rows.slot.copy_(slots.flatten().to(torch.int32))
                self.layers.commit(self.committed)
                self.programs.run("replay")
            self.length.copy_(start + kept)
            self.lengths = [length - width + count for length, count in zip(self.lengths, counts, strict=True)]
        self.committed = 1 - self.committed
        self.layers.commit(self.committed)

    def replay_tokens(self, counts: Sequence[int]) -> int:
        """Tokens, times layers, that ``keep`` computes again where some row keeps less than the window."""
        return sum(counts) * self.backbone.n_layers if self.layers.replays else 0
