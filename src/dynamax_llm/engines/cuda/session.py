"""Sessions of the GPU engine under ``propagate``: every step is a sequence of recorded programs.

The prompt runs through the stock layers of an eager session, whose cache the programs then take over. A session holds
its runner alone (``pool``); whatever changes belongs to one session.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.engines.base import DecodeStats
from dynamax_llm.engines.cuda import pool
from dynamax_llm.engines.cuda.graphs import LOCK
from dynamax_llm.engines.eager import EagerEngine
from dynamax_llm.engines.eager.session import EagerSession
from dynamax_llm.engines.plan import ExitPlan, RowThresholds
from dynamax_llm.shapes import Ids, Logits, NextLogits, RowFlags, RowIds

T = TypeVar("T")


def exclusive(method: Callable[..., T]) -> Callable[..., T]:
    """Run ``method`` while no other thread records or replays programs."""

    @functools.wraps(method)
    def locked(*arguments: Any, **options: Any) -> T:
        with LOCK:
            return method(*arguments, **options)

    return locked


class CudaSession:
    """An engine session whose layers run as recorded programs."""

    first_program = "segment 0"  # what a token begins with

    def __init__(self, backbone: Backbone, plan: ExitPlan, slots: int) -> None:
        self.backbone, self.plan, self.slots = backbone, plan, slots
        key, self.runner = pool.take(backbone, plan, slots)
        self._closer = weakref.finalize(self, pool.give_back, backbone, key, self.runner)
        self.prompts: EagerSession = EagerEngine().open(backbone, plan, slots)
        self.passes = 0
        self._loaded = False  # whether the runner has taken over the prompts
        self._begun = False  # whether the next token's first program has been launched
        self._step = 0  # number of the newest step whose results are read
        self._skipped: int | None = None  # the exit by which the newest token's last row left

    @property
    def kernels(self) -> tuple[str, ...]:
        return self.runner.kernels

    # prompts and rows

    @exclusive
    def prefill(self, ids: Ids, padding: Tensor | None = None) -> NextLogits:
        return self.prompts.prefill(ids, padding)

    def prompt_state(self) -> Any:
        return self.prompts.prompt_state()

    @exclusive
    def adopt(self, prompt: Any) -> None:
        self.prompts.adopt(prompt)

    @exclusive
    def admit(self, row: int, ids: Ids) -> NextLogits:
        alone = EagerEngine().open(self.backbone, self.plan, 1)
        logits = alone.prefill(ids)
        if not self._loaded:
            self.runner.load_empty(alone.cache)
            self._loaded = True
        self._begun = False
        self.runner.load_row(row, alone.cache, ids.shape[1], alone.exit_check.states)
        return logits

    @exclusive
    def release(self, row: int) -> None:
        self.runner.clear_row(row)
        self._begun = False

    def _load(self) -> None:
        """Take over the prompts."""
        if not self._loaded:
            prompts = self.prompts
            self.runner.load_prompts(prompts.cache, prompts.length, prompts.padding, prompts.exit_check.states)
            self._loaded = True

    # one token

    @exclusive
    def begin(
        self, ids: RowIds | None, thresholds: Sequence[RowThresholds], idle: RowFlags | None, *, ahead: bool = False
    ) -> None:
        self._load()
        runner = self.runner
        if ahead:
            self._step = runner.steps  # of the token whose results are still to be read
        elif self._begun:
            self._begun = False
            self._step = runner.steps
            return
        runner.check.set_thresholds(thresholds)
        runner.enter(ids, idle if self.plan.active else None)
        self._count_rows(idle)
        runner.programs.run(self.first_program)
        if ahead:
            self._begun = True
        else:
            self._step = runner.steps

    def _count_rows(self, idle: RowFlags | None) -> None:
        """Note how many rows the step works for."""

    def segment(self, index: int) -> None:
        if index:
            self.runner.programs.run(f"segment {index}")
        self.passes += self.runner.stops[index] - self.runner.starts[index]

    def running(self, index: int) -> int:
        return self.runner.check.running(index, self._step)

    def leave(self, index: int) -> None:
        self.runner.programs.run(f"skip {index}")
        self._skipped = index

    def finish(self) -> None:
        self._skipped = None

    @exclusive
    def logits(self) -> NextLogits:
        return self.runner.newest_logits(self._skipped).clone()

    def exits(self) -> RowIds:
        return self.runner.check.exit_index.long()

    def ban(self, tokens: Sequence[int]) -> None:
        self._load()
        self.runner.ban(tokens)

    def chosen(self) -> tuple[list[int], list[int]]:
        return self.runner.chosen(self._step)

    def window_logits(self) -> Logits:
        raise AssertionError("only sessions under 'verify' have windows")

    def window_chosen(self) -> list[list[int]]:
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
        self._closer()
