"""Decoding on the GPU engine: the same decoders, with programs in place of layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.decoder import Decoder, ExitPlan, Step
from dynamax_llm.decoding.deferred import Checked, states_after
from dynamax_llm.decoding.spent import Spent
from dynamax_llm.engines.cuda.machine import Machine
from dynamax_llm.engines.cuda.tiles import power_of_two
from dynamax_llm.engines.cuda.window import WaitingMachine
from dynamax_llm.exits.state import State
from dynamax_llm.shapes import Ids, Logits, RowFlags

#: Machines kept per backbone: each holds caches and recorded programs for one batch size and judge.
KEPT = 4


def machine_for(backbone: Backbone, plan: ExitPlan, batch: int) -> Machine:
    """The machine for ``batch`` sequences under ``plan``: one made before, if the weights are where they were."""
    kept = backbone.machines
    estimator = (
        [*plan.estimator.parameters(), *plan.estimator.buffers()] if isinstance(plan.estimator, nn.Module) else []
    )
    weights = hash(tuple((part.data_ptr(), part._version) for part in (*backbone.model.parameters(), *estimator)))
    policy = plan.policy
    most = power_of_two(max(plan.window, 2)) if policy.exact_state else 1
    key = (batch, most, policy.exact_output, plan.layers, id(plan.estimator), plan.readout.config, weights)
    if key not in kept:
        parts = (backbone, plan.layers, plan.estimator, plan.readout, batch, most)
        machine = WaitingMachine(*parts, journal=policy.exact_output) if policy.exact_state else Machine(*parts)
        machine.record()
        kept[key] = machine
        while len(kept) > KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


class CudaDecoder(Decoder):
    """A Decoder under ``propagate`` whose steps are recorded programs. The prompt runs through the stock layers."""

    _first = "segment 0"  # the program that a token begins with

    def __init__(self, backbone: Backbone, plan: ExitPlan, padding: Tensor | None = None) -> None:
        super().__init__(backbone, plan, padding)
        self.machine: Machine | None = None  # from the first step on: until then the prompt's cache may change hands
        self._passes = 0
        self._begun = False  # whether the next token's first program has been launched

    def _begin(self, batch: int) -> Machine:
        machine = machine_for(self.backbone, self.plan, batch)
        engine = self.engine
        machine.adopt(engine.cache, engine.length, engine.padding, self.states)
        self.machine = machine
        return machine

    def step(self, ids: Ids, thresholds: Sequence[float | None], idle: RowFlags | None = None) -> Step:
        machine = self.machine or self._begin(len(ids))
        machine.ban(())
        skipped = self._advance(machine, ids[:, 0], thresholds, idle)
        return Step(machine.spoken(skipped).clone(), machine.check.exit_index.long())

    def follow(
        self,
        ids: Tensor | None,
        thresholds: Sequence[float | None],
        idle: Tensor | None,
        banned: Sequence[int] = (),
        ahead: bool = False,
    ) -> tuple[list[int], list[int]]:
        """A greedy step whose token never leaves the device: (tokens, exit indices), one per row.

        ``ids`` (B,) are read first; None: the tokens of the step before. ``banned`` tokens are not chosen. ``ahead``:
        the next step is begun at once, with the same settings, while the host still looks at this one's tokens.
        """
        machine = self._greedy(ids, banned)
        self._advance(machine, ids, thresholds, idle)
        step = machine.steps
        if ahead:
            self._start(machine, None, thresholds, idle)
            self._begun = True
        return machine.chosen(step)

    def _greedy(self, ids: Tensor | None, banned: Sequence[int]) -> Machine:
        """The machine, ready for a greedy step."""
        machine = self.machine
        if machine is None:
            assert ids is not None, "there is no step before the first"
            machine = self._begin(len(ids))
        machine.ban(banned)
        return machine

    def _start(
        self, machine: Machine, ids: Tensor | None, thresholds: Sequence[float | None], idle: Tensor | None
    ) -> None:
        """The first segment of a token, unless it was begun ahead."""
        if not self._begun:
            machine.check.set_thresholds(thresholds)
            machine.enter(ids, idle if self.n_exits else None)
            machine.programs.run(self._first)
        self._begun = False

    def _advance(
        self, machine: Machine, ids: Tensor | None, thresholds: Sequence[float | None], idle: Tensor | None
    ) -> int | None:
        """One token through as many programs as it needs; the exit by which the last row left, None for full depth."""
        check, programs = machine.check, machine.programs
        self._start(machine, ids, thresholds, idle)
        self._passes += machine.stops[0]
        for index in range(self.n_exits):
            if thresholds[index] is not None and check.running(index, machine.steps) == 0:
                programs.run(f"skip {index}")
                return index
            programs.run(f"segment {index + 1}")
            self._passes += machine.stops[index + 1] - machine.starts[index + 1]
        return None

    def spent(self) -> Spent:
        return Spent(self._passes)


class CudaDeferredDecoder(CudaDecoder):
    """A DeferredDecoder (``defer``) whose passes are recorded programs."""

    _first = "step"

    def __init__(self, backbone: Backbone, plan: ExitPlan, padding: Tensor | None = None) -> None:
        super().__init__(backbone, plan, padding)
        self._taken: list[Tensor] = []  # (B,) each: where every decoded token left, -1 for idle rows
        self._macs = [cost.layer for cost in backbone.costs().layers]
        self._layer_macs = 0
        self._readouts = 0
        self._replayed = 0

    @property
    def waiting(self) -> WaitingMachine:
        """The machine, once decoding has begun."""
        assert isinstance(self.machine, WaitingMachine)
        return self.machine

    def step(self, ids: Ids, thresholds: Sequence[float | None], idle: RowFlags | None = None) -> Step:
        step = super().step(ids, thresholds, idle)
        self._note(step.exit_index, idle)
        return step

    def follow(
        self,
        ids: Tensor | None,
        thresholds: Sequence[float | None],
        idle: Tensor | None,
        banned: Sequence[int] = (),
        ahead: bool = False,
    ) -> tuple[list[int], list[int]]:
        tokens, exits = super().follow(ids, thresholds, idle, banned, ahead)
        self._note(torch.tensor(exits), _on_host(idle))
        return tokens, exits

    def _note(self, exit_index: Tensor, idle: Tensor | None) -> None:
        self._taken.append(exit_index if idle is None else torch.where(idle, -1, exit_index))

    def _advance(
        self, machine: Machine, ids: Tensor | None, thresholds: Sequence[float | None], idle: Tensor | None
    ) -> int | None:
        assert isinstance(machine, WaitingMachine)
        left, _ = self._decide(machine, ids, thresholds, idle)
        if left is None:
            machine.programs.run("speak")
            return None
        machine.programs.run(f"leave {left}")
        if sum(machine.counts) >= self.plan.window:
            self._catch_up(machine)
        return left

    def _decide(
        self, machine: WaitingMachine, ids: Tensor | None, thresholds: Sequence[float | None], idle: Tensor | None
    ) -> tuple[int | None, bool]:
        """The exit by which the last row left, None for full depth; and whether the newest token went alone."""
        check, programs = machine.check, machine.programs
        self._start(machine, ids, thresholds, idle)
        self._live = machine.batch - (0 if idle is None or not self.n_exits else int(idle.sum()))
        self._count(machine, 0, 1)
        alone = True
        for index in range(self.n_exits):
            if thresholds[index] is not None and check.running(index, machine.steps) == 0:
                if alone:
                    self._join(machine, index + 1)
                return index, alone
            alone = alone and not machine.counts[index]
            if alone:
                programs.run(f"single {index + 1}")
                self._count(machine, index + 1, 1)
                continue
            if machine.joined < machine.steps:  # the newest token has yet to join those that wait
                self._join(machine, index + 1)
            self._run_segment(machine, index + 1)
            if index + 1 < self.n_exits:
                programs.run(f"ask {index + 1}")
        return None, alone

    def _join(self, machine: WaitingMachine, segment: int) -> None:
        machine.programs.run(f"join {segment}")
        machine.counts[segment - 1] += 1
        machine.joined = machine.steps

    def _run_segment(self, machine: WaitingMachine, segment: int) -> None:
        """A segment over all that waits before it."""
        machine.programs.run(f"run {segment}")
        count = machine.counts[segment - 1]
        self._count(machine, segment, count)
        machine.counts[segment - 1] = 0
        if segment < self.n_exits:
            machine.counts[segment] += count

    def _catch_up(self, machine: WaitingMachine) -> None:
        for segment in range(1, self.n_exits + 1):
            if machine.counts[segment - 1]:
                self._run_segment(machine, segment)

    def _count(self, machine: WaitingMachine, segment: int, tokens: int) -> None:
        first, stop = machine.starts[segment], machine.stops[segment]
        self._passes += stop - first
        self._layer_macs += self._live * tokens * sum(self._macs[first:stop])

    def spent(self) -> Spent:
        taken = torch.stack(self._taken) if self._taken else None
        held = 0 if self.machine is None else self.waiting.window_bytes()
        return Spent(self._passes, self._layer_macs, taken, self._readouts, held, self._replayed)


class CudaVerifyingDecoder(CudaDeferredDecoder):
    """A VerifyingDecoder whose passes are recorded programs: ``step`` until it returns a window, then ``keep``."""

    def __init__(self, backbone: Backbone, plan: ExitPlan, padding: Tensor | None = None) -> None:
        super().__init__(backbone, plan, padding)
        self._history: list[list[State] | None] = []  # the estimator's states after each token of the window
        self._alone = False  # whether the window is the newest token, which went through by itself

    @property
    def drafted(self) -> int:
        """Tokens in the open window."""
        return len(self._history)

    def prefill(self, ids: Ids) -> Tensor:
        self._history = []
        return super().prefill(ids)

    def step(self, ids: Ids, thresholds: Sequence[float | None], idle: RowFlags | None = None) -> Checked:
        machine = self.machine or self._begin(len(ids))
        machine.ban(())
        left = self._advance(machine, ids[:, 0], thresholds, idle)
        exit_index = machine.check.exit_index.long()
        if left is not None:
            self._note(exit_index, idle)
            return Checked(machine.spoken(left).clone(), exit_index)
        full = torch.full_like(exit_index, self.n_exits)
        self._note(exit_index, idle)
        window = self._window_logits()
        return Checked(window[:, -1], full, window)

    def draft(
        self,
        ids: Tensor | None,
        thresholds: Sequence[float | None],
        idle: Tensor | None,
        banned: Sequence[int] = (),
        ahead: bool = False,
    ) -> tuple[list[int], list[int]] | None:
        """A greedy step: the rows' proposals and exits; None once the window is closed, for ``window_choices``.

        ``ahead``: as in ``follow``, unless the next token would fill the window.
        """
        machine = self._greedy(ids, banned)
        left = self._advance(machine, ids, thresholds, idle)
        if left is None:
            # Rows that had left before the others went deep keep their exits in what was spent.
            self._note(machine.check.exit_index.cpu() if machine.batch > 1 else _FULL + self.n_exits, _on_host(idle))
            return None
        step = machine.steps
        if ahead and self.drafted + 1 < self.plan.window:
            self._start(machine, None, thresholds, idle)
            self._begun = True
        tokens, exits = machine.chosen(step)
        self._note(torch.tensor(exits), _on_host(idle))
        return tokens, exits

    def window_choices(self) -> list[list[int]]:
        """The full model's greedy token after every token of the window, per row."""
        if self._alone:
            return [[token] for token in self.waiting.chosen(self.waiting.steps)[0]]
        return self.waiting.window_choices(self.drafted)

    def _advance(
        self, machine: Machine, ids: Tensor | None, thresholds: Sequence[float | None], idle: Tensor | None
    ) -> int | None:
        assert isinstance(machine, WaitingMachine)
        # The token that would fill the window goes deep instead: its own token is then the full model's.
        if self.drafted + 1 >= self.plan.window:
            thresholds = [None] * len(thresholds)
        left, alone = self._decide(machine, ids, thresholds, idle)
        if left is not None:
            machine.programs.run(f"leave {left}")
        states = machine.check.states
        self._history.append(None if states is None else [tuple(part.clone() for part in state) for state in states])
        if left is None:
            self._close(alone)
            self._readouts += self._live * (self.drafted - 1)
        return left

    def _close(self, alone: bool) -> None:
        """Every layer has seen the window: let the last one speak."""
        self._alone = alone
        self.waiting.programs.run("speak" if alone else "window")

    def _window_logits(self) -> Logits:
        machine = self.waiting
        if self._alone:
            return machine.logits.clone().unsqueeze(1)
        return machine.window_logits.view(machine.batch, machine.most, -1)[:, : self.drafted].clone()

    def check(self) -> Logits:
        """Full logits (B, W, V) after every token of the open window."""
        self.check_choices()
        return self._window_logits()

    def check_choices(self) -> None:
        """Close the open window, whose tokens have all left."""
        self._catch_up(self.waiting)
        self._close(False)
        self._readouts += self._live * self.drafted

    def keep(self, counts: Tensor | Sequence[int]) -> None:
        """Close the window: of its tokens, every row keeps the first ``counts`` (B,), at least 1."""
        machine, width = self.waiting, self.drafted
        kept = [int(count) for count in counts]
        machine.keep(width, kept)
        if min(kept) < width:
            if self.backbone.kinds[0] == "mamba":  # convolution and state again, of what in_proj had made
                mixer, layers = self.backbone.layers[0].mixer, self.backbone.n_layers
                again = 2 * mixer.intermediate_size * mixer.ssm_state_size + mixer.conv_dim * mixer.conv_kernel_size
                self._replayed += sum(kept) * layers
                self._layer_macs += sum(kept) * layers * again
            if machine.check.states is not None:
                machine.check.adopt(states_after(self._history, torch.tensor(kept, device=machine.length.device)))
        self._history = []


#: Stands for one row, without a new tensor for every token.
_FULL = torch.zeros(1, dtype=torch.int64)


def _on_host(idle: Tensor | None) -> Tensor | None:
    return None if idle is None else idle.cpu()


def new_decoder(backbone: Backbone, plan: ExitPlan, padding: Tensor | None = None, batch: int | None = None) -> Decoder:
    """The decoder that carries out the plan's state policy on this engine.

    With ``batch`` its programs are made at once, not at the first step. Raises RuntimeError if they cannot be.
    """
    if batch is not None:
        machine_for(backbone, plan, batch)
    policy = plan.policy
    kind = CudaVerifyingDecoder if policy.exact_output else CudaDeferredDecoder if policy.exact_state else CudaDecoder
    return kind(backbone, plan, padding)
