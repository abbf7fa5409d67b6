"""One batch's decoding on the GPU: static memory, and programs over it, cut at the exits.

    enter + segment 0 | exit 0 asked -> segment 1 | exit 1 asked -> ... -> last segment + readout
                                     \\ every row left: skip 0 (states of the layers above, readout)

Programs are recorded once and serve prompts of any length: what changes (tokens, places, thresholds) is read from
memory on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.backbones.cache import StackedCache
from dynamax_llm.engines.cuda.check import Check, mailbox, wait_for_step
from dynamax_llm.engines.cuda.graphs import Programs
from dynamax_llm.engines.cuda.kernels.rows import choose_kernel, enter_kernel
from dynamax_llm.engines.cuda.launch import overlaps, settings
from dynamax_llm.engines.cuda.layers import LAYERS, Layers
from dynamax_llm.engines.cuda.passes import Pass
from dynamax_llm.engines.cuda.readout import read_out
from dynamax_llm.engines.cuda.tiles import blocks, power_of_two
from dynamax_llm.exits.features import ConfidenceEstimator
from dynamax_llm.exits.readout import Readout
from dynamax_llm.exits.state import ExitState

#: A length at which nothing is written: programs are tried out with it.
NOWHERE = -(1 << 20)
#: Programs that share the search for a row's likeliest token.
CHOOSERS = 32
#: Tokens that one of them looks at, at least.
LEAST_SHARE = 512


class GraphRunner:
    """Programs for ``batch`` sequences of one backbone, exits after ``exits`` layers, and one judge."""

    updates_exited_rows = False  # whether layers go on changing h of rows that left

    def __init__(
        self,
        backbone: Backbone,
        exits: tuple[int, ...],
        estimator: ConfidenceEstimator,
        readout: Readout,
        batch: int,
        full: int,
        most: int = 1,
    ) -> None:
        """``exits``: the depths of the active exits; ``full``: the exit index of full depth; ``most``: tokens of the
        largest pass."""
        self.backbone, self.batch = backbone, batch
        self.starts, self.stops = (0, *exits), (*exits, backbone.n_layers)
        self.n_exits, self.full = len(exits), full
        device, head = backbone.device, backbone.model.get_output_embeddings().weight
        self.layers = self._family(batch, most)
        self.pad = torch.zeros(batch, dtype=torch.int32, device=device)
        self.now = Pass(
            batch, 1, torch.zeros(batch, backbone.width, dtype=residual_dtype(backbone), device=device), self.pad
        )
        self.before = torch.zeros_like(self.now.h)
        self.ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self.length = torch.full((batch,), NOWHERE, dtype=torch.int32, device=device)
        self.logits = torch.zeros(batch, len(head), dtype=torch.float32, device=device)
        self.ticket = torch.zeros(1, dtype=torch.int32, device=device)
        self.steps = 0  # the host's own count of what ``ticket`` counts; never reset, so that no word is mistaken
        self.check = Check(estimator, readout, self.n_exits, batch, device, self.ticket, full)
        self.idle = torch.zeros(batch, dtype=torch.int32, device=device)
        self.resting = False  # whether any row is
        self.bias = torch.zeros(len(head), dtype=torch.float32, device=device)
        self._banned: tuple[int, ...] = ()
        self.words = mailbox(2 * batch, device)
        self._read = self.words.numpy().reshape(2, batch)
        self.lengths = [0] * batch  # slots entered per row, as the host counts
        self.programs = Programs(device)
        self._add_programs()

    def _family(self, batch: int, most: int) -> Layers:
        """What drives this backbone's layers, in passes of at most ``most`` tokens."""
        return LAYERS[self.backbone.kinds[0]](self.backbone, batch, most)

    def _add_programs(self) -> None:
        for index in range(len(self.starts)):
            self.programs.add(f"segment {index}", partial(self._segment, index))
            if index < self.n_exits:
                self.programs.add(f"skip {index}", partial(self._skip, index))

    @property
    def kernels(self) -> tuple[str, ...]:
        """Kernels of this engine that the programs launch; an exit may be asked by PyTorch's own besides."""
        return (
            *self.layers.kernels,
            "linear_kernel",
            "ready_kernel",
            "enter_kernel",
            "choose_kernel",
            *self.check.kernels,
        )

    def record(self) -> None:
        """Make the programs ready to run."""
        self.programs.record()
        self.steps = int(self.ticket)  # trying programs out counts as steps

    def load_prompts(self, cache: StackedCache, length: int, padding: Tensor | None, states: ExitState) -> None:
        """All rows go on from prompts: ``cache`` holds ``length`` slots, ``padding`` (B, length) is 0 at left pads."""
        self._reset()
        self.lengths = [length] * self.batch
        if padding is not None:
            self.pad.copy_((padding == 0).sum(1))
        self.length.fill_(length)
        self.layers.load(cache, length)
        self.check.load(states)

    def load_empty(self, like: StackedCache) -> None:
        """Begin with rows that hold nothing; ``like`` is the cache of one row."""
        self._reset()
        self.lengths = [0] * self.batch
        self.length.zero_()
        self.layers.load_empty(like)

    def load_row(self, row: int, cache: StackedCache, length: int, states: ExitState) -> None:
        """Row ``row`` goes on from a prompt of ``length`` tokens, the only row of ``cache``."""
        self.layers.load_row(row, cache, length)
        self._set_row(row, length)
        self.check.load_row(row, states)

    def clear_row(self, row: int) -> None:
        """Row ``row`` holds nothing: its slots begin again at 0."""
        self._set_row(row, 0)

    def _set_row(self, row: int, length: int) -> None:
        self.lengths[row], self.length[row], self.pad[row] = length, length, 0

    def _reset(self) -> None:
        """Forget the rows of the session before."""
        self.pad.zero_()
        self.check.forget()
        self.ban(())

    def enter(self, ids: Tensor | None, idle: Tensor | None) -> None:
        """The next token (B,) of every sequence, None for those that were chosen last; ``idle`` (B,) bool rows need no
        logits."""
        if ids is not None:
            self.ids.copy_(ids)
        if idle is not None:
            self.idle.copy_(idle)
        elif self.resting:
            self.idle.zero_()
        self.resting = idle is not None
        self.lengths = [length + 1 for length in self.lengths]
        self.steps += 1
        self.layers.reserve(max(self.lengths))

    def _enter(self) -> None:
        p, width = self.now, self.backbone.width
        enter_kernel[(self.batch,)](
            self.ids,
            self.backbone.model.get_input_embeddings().weight,
            self.idle,
            self.pad,
            self.length,
            self.ticket,
            p.h,
            p.slot,
            p.place,
            p.live,
            self.check.left,
            self.check.exit_index,
            self.full,
            width,
            power_of_two(width),
            self.updates_exited_rows,
            overlaps(p.h.device),
            **settings(p.h.device, 8),
        )

    def _segment(self, index: int) -> None:
        if index == 0:
            self._enter()
        first, stop, asks = self.starts[index], self.stops[index], index < self.n_exits
        for layer in range(first, stop):
            keep = self.before if asks and layer == stop - 1 and self.check.sees_before else None
            self.layers.layer(layer, self.now, fresh=layer == 0, keep=keep)
        if asks:
            self.check.ask(index, self.now.h, self.before, self.now.live)
        else:
            self._choose(self._read_out(self.now.h, self.logits, self.now))

    def _skip(self, index: int) -> None:
        """Every row left by exit ``index`` or before."""
        self.check.advance(index, self.now.h)
        self.layers.update_states(self.stops[index], self.backbone.n_layers, self.now)
        early = self.check.logits if index == 0 else None
        self._choose(self._read_out(self.now.h, self.logits) if early is None else early)

    def newest_logits(self, skipped: int | None) -> Tensor:
        """Logits (B, V) of the token: ``skipped`` is the exit by which the last row left, None for full depth."""
        early = self.check.logits if skipped == 0 else None
        return self.logits if early is None else early

    def _read_out(self, h: Tensor, logits: Tensor, p: Pass | None = None) -> Tensor:
        """``logits`` (M, V), float32, of h (M, d); ``p``: the pass that has just been through the last layer."""
        return read_out(self.backbone, h, logits, p)

    def _choose(self, logits: Tensor, words: Tensor | None = None) -> None:
        """The likeliest tokens: the next step's, or only reported in ``words`` (M,)."""
        rows, vocabulary = logits.shape
        device, splits = logits.device, min(CHOOSERS, power_of_two(blocks(vocabulary, LEAST_SHARE)))
        choose_kernel[rows, splits](
            logits,
            self.bias,
            self.ticket,
            self.check.exit_index,
            self.ids,
            self.words if words is None else words,
            self.now.buffer(f"found {rows}", rows, splits, 2, dtype=torch.float32),
            self.now.buffer(f"choosers {rows}", rows, dtype=torch.int32),
            vocabulary,
            power_of_two(blocks(vocabulary, splits)),
            splits,
            words is None,
            overlaps(device),
            **settings(device, 4),
        )

    def ban(self, tokens: Sequence[int]) -> None:
        """Tokens that ``chosen`` must not be from now on."""
        if tuple(tokens) != self._banned:
            self._banned = tuple(tokens)
            self.bias.zero_()
            if tokens:
                self.bias[list(tokens)] = -torch.inf

    def chosen(self, step: int) -> tuple[list[int], list[int]]:
        """Every row's token and exit index at step number ``step``, this one or the one before; waits for them."""
        read = wait_for_step(self._read[step & 1], step, self.ids.device)
        return (read & 0xFFFFFFFF).tolist(), (read >> 32 & 0xFF).tolist()


def residual_dtype(backbone: Backbone) -> torch.dtype:
    """Data type of the residual stream, which some families keep in float32."""
    return torch.float32 if getattr(backbone.config, "residual_in_fp32", False) else backbone.dtype
