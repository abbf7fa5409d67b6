"""Sessions of the GPU engine under ``defer`` and ``verify``: tokens wait, and their passes are recorded programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dynamax_llm.backbones import Backbone
from dynamax_llm.engines.base import DecodeStats
from dynamax_llm.engines.cuda.session import CudaSession, exclusive
from dynamax_llm.engines.cuda.window import WindowRunner
from dynamax_llm.engines.plan import ExitPlan
from dynamax_llm.exits.state import ExitState
from dynamax_llm.shapes import Logits, NextLogits, RowFlags


class CudaWaitingSession(CudaSession):
    """A session whose layers may have read different numbers of tokens."""

    first_program = "step"

    def __init__(self, backbone: Backbone, plan: ExitPlan, slots: int) -> None:
        super().__init__(backbone, plan, slots)
        self.verifies = plan.policy.exact_output
        self.work = DecodeStats(layer_macs=0)
        self._macs = [cost.layer for cost in backbone.costs().layers]
        self._live = slots  # rows that have not ended
        self._alone = True  # whether the newest token met no waiting token so far
        self._single = False  # whether the window is one token, which no other waited for
        self._history: list[ExitState] = []  # what exits remembered after each token of the window

    @property
    def window(self) -> WindowRunner:
        """The runner, with its waiting tokens."""
        assert isinstance(self.runner, WindowRunner)
        return self.runner

    def _count_rows(self, idle: RowFlags | None) -> None:
        self._live = self.slots - (0 if idle is None or not self.plan.active else int(idle.sum()))

    def segment(self, index: int) -> None:
        runner, programs = self.window, self.window.programs
        if index == 0:
            self._alone = True
            self._count(0, 1)
            return
        self._alone = self._alone and not runner.counts[index - 1]
        if self._alone:
            programs.run(f"single {index}")
            self._count(index, 1)
            return
        if runner.joined < self._step:  # the newest token has yet to join those that wait
            self._join(index)
        self._run_segment(index)
        if index < self.plan.active:
            programs.run(f"ask {index}")

    def leave(self, index: int) -> None:
        if self._alone:
            self._join(index + 1)
        self.runner.programs.run(f"leave {index}")
        self._skipped = index
        self._note()

    def finish(self) -> None:
        self._skipped = None
        self._note()
        self._single = self._alone
        if self._alone or not self.verifies:
            self.runner.programs.run("speak")
        else:
            self.runner.programs.run("window")

    def _note(self) -> None:
        """Keep what exits remember after the newest token of the window."""
        if self.verifies:
            states = self.runner.check.states
            kept = None if states is None else [tuple(part.clone() for part in state) for state in states]
            self._history.append(ExitState(kept))

    def _join(self, segment: int) -> None:
        self.runner.programs.run(f"join {segment}")
        self.window.counts[segment - 1] += 1
        self.window.joined = self._step

    def _run_segment(self, segment: int) -> None:
        """A segment over all that waits before it."""
        runner = self.window
        runner.programs.run(f"run {segment}")
        count = runner.counts[segment - 1]
        self._count(segment, count)
        runner.counts[segment - 1] = 0
        if segment < self.plan.active:
            runner.counts[segment] += count

    def _count(self, segment: int, tokens: int) -> None:
        first, stop = self.runner.starts[segment], self.runner.stops[segment]
        self.passes += stop - first
        work = self._live * tokens * sum(self._macs[first:stop])
        self.work.layer_macs = (self.work.layer_macs or 0) + work

    def pending(self) -> int:
        return sum(self.window.counts) if self._loaded else 0

    def catch_up(self) -> None:
        if not self.pending():
            return
        for segment in range(1, self.plan.active + 1):
            if self.window.counts[segment - 1]:
                self._run_segment(segment)
        if self.verifies:
            self._single = False
            self.runner.programs.run("window")

    def logits(self) -> NextLogits:
        if self._skipped is None and self.verifies and not self._single:
            return self.window_logits()[:, -1]
        return super().logits()

    def window_logits(self) -> Logits:
        runner = self.window
        if self._single:
            return runner.logits.clone().unsqueeze(1)
        return runner.window_logits.view(self.slots, runner.most, -1)[:, : len(self._history)].clone()

    def window_chosen(self) -> list[list[int]]:
        if self._single:
            return [[token] for token in self.window.chosen(self._step)[0]]
        return self.window.window_choices(len(self._history))

    @exclusive
    def keep(self, counts: Sequence[int]) -> None:
        runner, width = self.window, len(self._history)
        runner.keep(width, counts)
        if min(counts) < width:
            self.work.replayed += runner.replay_tokens(counts)
            self.work.layer_macs = (self.work.layer_macs or 0) + runner.replay_tokens(
                counts
            ) * runner.layers.replay_macs
            if runner.check.states is not None:
                kept = torch.tensor(list(counts), device=runner.length.device)
                runner.check.load(ExitState.after(self._history, kept))
        self._history = []

    def stats(self) -> DecodeStats:
        held = self.window.window_bytes() if self._loaded else 0
        return replace(self.work, passes=self.passes, window_bytes=held)
