"""Asking the estimator on the device: who leaves is known there, and the host reads one word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dynamax_llm.engines.cuda.fused import Rows, head_check
from dynamax_llm.engines.cuda.kernels.rows import decide_kernel
from dynamax_llm.engines.cuda.launch import overlaps, settings
from dynamax_llm.engines.cuda.tiles import power_of_two
from dynamax_llm.engines.plan import RowThresholds
from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.features import STATISTICS, ExitFeatures, exit_features, select
from dynamax_llm.exits.readouts.base import Readout
from dynamax_llm.exits.state import ExitState, State

#: Bits of a word below the number of the token it belongs to.
NUMBER = 40
#: Numbers go up to here, and begin again.
NUMBERS = 2**22 - 1
#: Looks at a word before the device is asked whether it still works.
POLLS = 100_000


def mailbox(count: int, device: torch.device) -> Tensor:
    """Memory of the host, (count,) int64, that kernels on ``device`` write into."""
    return torch.full((max(count, 1),), -1, dtype=torch.int64, pin_memory=device.type == "cuda")


def wait_for_step(read: np.ndarray, number: int, device: torch.device) -> np.ndarray:
    """The words ``read`` once all are of step ``number``. Raises RuntimeError if the device ends without them."""
    polls = 0
    while (read >> NUMBER != number & NUMBERS).any():
        polls += 1
        if polls % POLLS and device.type == "cuda":
            continue
        # Asking the stream raises what went wrong on the device; the words may have come while it was asked.
        over = device.type != "cuda" or torch.cuda.current_stream(device).query()
        if over and (read >> NUMBER != number & NUMBERS).any():
            raise RuntimeError(
                f"CUDA engine: step {number} finished without reporting a result; this is a bug, please report it. "
                "engine='eager' avoids it."
            )
    return read


class Check:
    """The estimator at every exit of one batch, in memory that stays where it is.

    ``left`` (B,) int32, 1 for rows that have left; ``exit_index`` (B,) int32, ``n_exits`` for rows that have not.
    ``ticket`` (1,) int32 is the number of the step. With ``fuse`` a check is one kernel where it can be (``fused``),
    else the estimator is asked through PyTorch.
    """

    def __init__(
        self,
        estimator: ConfidenceEstimator,
        readout: Readout,
        n_exits: int,
        batch: int,
        device: torch.device,
        ticket: Tensor,
        full: int,
        *,
        fuse: bool = True,
    ) -> None:
        self.estimator, self.readout, self.n_exits, self.batch = estimator, readout, n_exits, batch
        self.device, self.ticket = device, ticket
        self.left = torch.zeros(batch, dtype=torch.int32, device=device)
        self.exit_index = torch.full((batch,), full, dtype=torch.int32, device=device)
        self.thresholds = torch.full((max(n_exits, 1), batch), torch.inf, device=device)
        self._thresholds: list[RowThresholds] = []
        self.words = mailbox(n_exits, device)
        self._read = self.words.numpy()
        self.features: list[ExitFeatures | None] = [None] * n_exits
        self._nothing = ExitFeatures(torch.zeros(batch, 1, len(STATISTICS), device=device), None)
        rows = Rows(self.thresholds, ticket, self.left, self.exit_index, self.words)
        self.fused = head_check(estimator, readout, n_exits, batch, rows) if fuse else None
        # (B, V) of an exit that read the whole vocabulary
        self.logits: Tensor | None = None if self.fused is None else self.fused.logits
        # Of all exits of the estimator: a token that leaves advances the states of all later exits.
        self.states: list[State] | None = estimator.initial_state(batch, device) if n_exits else None

    def load(self, states: ExitState) -> None:
        """Take over what recurrent heads remember of every row."""
        for mine, theirs in self._pairs(states):
            mine.copy_(theirs)

    def load_row(self, row: int, states: ExitState) -> None:
        """Take over what recurrent heads remember of one row, the only one of ``states``."""
        for mine, theirs in self._pairs(states):
            mine[row] = theirs[0]

    def forget(self) -> None:
        """Rows begin anew: recurrent heads remember nothing."""
        for state in self.states or ():
            for part in state:
                part.zero_()

    def _pairs(self, states: ExitState) -> Iterator[tuple[Tensor, Tensor]]:
        if self.states is not None and states.estimator is not None:
            for own, found in zip(self.states, states.estimator, strict=True):
                yield from zip(own, found, strict=True)

    def set_thresholds(self, thresholds: Sequence[RowThresholds]) -> None:
        """What every row needs at every exit from now on; None: the row may not leave there."""
        now = list(thresholds)
        if now != self._thresholds:
            self._thresholds = now
            # Confidences are float32: so is the comparison in the eager engine.
            values = [[torch.inf if row[e] is None else row[e] for row in now] for e in range(self.n_exits)]
            if values:
                self.thresholds.copy_(torch.tensor(values, dtype=torch.float32))

    def ask(self, index: int, h: Tensor, before: Tensor, live: Tensor | None) -> None:
        """Who leaves by exit ``index``, given h (B, d) and h before the last layer; launches only.

        Rows that leave are no longer ``live`` (B,), if given.
        """
        if self.fused is not None:
            self.fused.ask(index, h, before, live)
            return
        h, before = h.unsqueeze(1), before.unsqueeze(1)
        earlier = self.features[index - 1] if index else None
        logits = None
        if self.estimator.needs_logits:
            seen, logits = self.readout.read(index, h, before, earlier)
        elif self.estimator.needs_features:
            seen = exit_features(h, before, None, earlier)
        else:
            seen = self._nothing
        if earlier is not None and self.batch > 1 and seen is not self._nothing:
            seen = select(self.left.bool().unsqueeze(1), earlier, seen)
        self.features[index] = seen
        state = None if self.states is None else self.states[index]
        confidence, after = self.estimator.confidence(index, h, seen, state)
        if state is not None and after is not None:
            for mine, new in zip(state, after, strict=True):
                mine.copy_(new)
        if logits is not None and index == 0:
            self.logits = logits[:, 0]
        decide_kernel[(1,)](
            confidence[:, 0].contiguous(),
            self.thresholds,
            index,
            self.ticket,
            self.left if live is None else live,
            self.left,
            self.exit_index,
            self.words[index:],
            self.batch,
            power_of_two(self.batch),
            live is None,
            overlaps(self.device),
            **settings(self.device, 1),
        )

    @property
    def sees_before(self) -> bool:
        """Whether ``ask`` reads h before the last layer."""
        return self.estimator.needs_features if self.fused is None else self.fused.sees_before

    @property
    def kernels(self) -> tuple[str, ...]:
        """Kernels of this engine that a check launches; PyTorch's own may come besides."""
        return () if not self.n_exits else ("decide_kernel",) if self.fused is None else ("check_kernel",)

    def advance(self, index: int, h: Tensor) -> None:
        """Every row has left by exit ``index`` or before: later recurrent heads read what it left with."""
        seen = self.features[index]
        if self.states is None or seen is None or index + 1 >= len(self.states):
            return
        later = self.estimator.advance(index + 1, h.unsqueeze(1), seen, self.states)
        assert later is not None
        for own, new in zip(self.states[index + 1 :], later[index + 1 :], strict=True):
            for mine, fresh in zip(own, new, strict=True):
                mine.copy_(fresh)

    def running(self, index: int, number: int) -> int:
        """Rows that still run after exit ``index`` of step ``number``; waits until the device has said so."""
        return int(wait_for_step(self._read[index : index + 1], number, self.device)[0]) & 0xFFFFFFFF
