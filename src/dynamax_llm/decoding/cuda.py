"""Decoding on the GPU engine: the same decoders, with programs in place of layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.decoder import Decoder, ExitPlan, Step
from dynamax_llm.decoding.spent import Spent
from dynamax_llm.engines.cuda.machine import Machine
from dynamax_llm.shapes import Ids, RowFlags

#: Machines kept per backbone: each holds caches and recorded programs for one batch size and judge.
KEPT = 4
_machines: WeakKeyDictionary[Backbone, OrderedDict[tuple[Any, ...], Machine]] = WeakKeyDictionary()


def machine_for(backbone: Backbone, plan: ExitPlan, batch: int, most: int) -> Machine:
    """The machine for ``batch`` sequences under ``plan``: one made before, if the weights are where they were."""
    kept = _machines.setdefault(backbone, OrderedDict())
    weights = hash(tuple((weight.data_ptr(), weight._version) for weight in backbone.model.parameters()))
    key = (batch, most, plan.layers, id(plan.judge), plan.readout.config, weights)
    if key not in kept:
        machine = Machine(backbone, plan.layers, plan.judge, plan.readout, batch, most)
        machine.programs.record()
        kept[key] = machine
        while len(kept) > KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


class CudaDecoder(Decoder):
    """A Decoder under ``propagate`` whose steps are recorded programs. The prompt runs through the stock layers."""

    def __init__(self, backbone: Backbone, plan: ExitPlan, padding: Tensor | None = None) -> None:
        super().__init__(backbone, plan, padding)
        self.machine: Machine | None = None  # from the first step on: until then the prompt's cache may change hands
        self._passes = 0

    def _begin(self, batch: int) -> Machine:
        machine = machine_for(self.backbone, self.plan, batch, 1)
        engine = self.engine
        machine.adopt(engine.cache, engine.length, engine.padding, self.states)
        self.machine = machine
        return machine

    def step(self, ids: Ids, thresholds: Sequence[float | None], idle: RowFlags | None = None) -> Step:
        machine = self.machine or self._begin(len(ids))
        skipped = self._advance(machine, ids[:, 0], thresholds, idle)
        return Step(machine.spoken(skipped).clone(), machine.check.exit_index.long())

    def follow(
        self, ids: Tensor | None, thresholds: Sequence[float | None], idle: Tensor | None, banned: Sequence[int] = ()
    ) -> tuple[list[int], list[int]]:
        """A greedy step whose token never leaves the device: (tokens, exit indices), one per row.

        ``ids`` (B,) are read first; None: the tokens of the step before. ``banned`` tokens are not chosen.
        """
        machine = self.machine or self._begin(len(ids) if ids is not None else 0)
        machine.ban(banned)
        self._advance(machine, ids, thresholds, idle)
        return machine.chosen()

    def _advance(
        self, machine: Machine, ids: Tensor | None, thresholds: Sequence[float | None], idle: Tensor | None
    ) -> int | None:
        """One token through as many programs as it needs; the exit by which the last row left, None for full depth."""
        check, programs = machine.check, machine.programs
        check.set_thresholds(thresholds)
        machine.enter(ids, idle if self.n_exits else None)
        for index in range(self.n_exits):
            programs.run(f"segment {index}")
            self._passes += machine.stops[index] - machine.starts[index]
            if thresholds[index] is not None and check.running(index, machine.slots) == 0:
                programs.run(f"skip {index}")
                return index
        programs.run(f"segment {self.n_exits}")
        self._passes += machine.stops[-1] - machine.starts[-1]
        return None

    def spent(self) -> Spent:
        return Spent(self._passes)


def new_decoder(backbone: Backbone, plan: ExitPlan, padding: Tensor | None = None) -> Decoder:
    """The decoder that carries out the plan's state policy on this engine."""
    return CudaDecoder(backbone, plan, padding)
