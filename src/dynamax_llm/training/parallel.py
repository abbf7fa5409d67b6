"""Several processes, one training run: each takes some rows of every batch, and gradients are summed.

``accelerate launch`` (or any launcher that sets WORLD_SIZE, RANK and the rest) starts the processes; one process sums
nothing. Every process reads the same stream and draws the same random numbers; what decides the result is summed before
it is used (gradients, class counts, statistics of the inputs), so N processes end with the weights of one process on
the same batches, up to the rounding of those sums, and all of them with the same. The number of processes is not part
of a run's identity: it may change between a kill and the resumption.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed

from dynamax_llm.errors import UsageError
from dynamax_llm.text.batches import Batch


@dataclass(frozen=True)
class Group:
    """The processes of a run, as seen by the one with number ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, cpu: bool) -> Group:
        """The group that the launcher made, with this process's GPU as the current one; alone without a launcher.

        ``cpu``: the backbone is on a CPU, though there may be GPUs.

        Raises UsageError if there is a launcher and accelerate is not installed.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        try:
            from accelerate import PartialState
        except ImportError:
            raise UsageError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and to train in several processes accelerate is needed: "
                "pip install 'dynamax-llm[train]', or start one process."
            ) from None
        state = PartialState(cpu=cpu or not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes)

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def check(self, sequence: int, batch_tokens: int) -> None:
        """Raises UsageError where a batch of whole chunks has fewer rows than there are processes."""
        if batch_tokens < self.size * sequence:
            raise UsageError(
                f"a step of {batch_tokens} tokens holds {batch_tokens // sequence} chunks of {sequence}, too few for "
                f"{self.size} processes. Give a batch of at least {self.size * sequence} tokens, shorter chunks, or "
                "fewer processes."
            )

    def rows(self, count: int) -> slice:
        """This process's share of ``count`` rows: runs that differ in length by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def share(self, batch: Batch) -> Batch:
        """This process's rows of a batch; where it has none, one row in which nothing counts."""
        rows = self.rows(len(batch.ids))
        if rows.start == rows.stop:
            first = batch.rows(slice(0, 1))
            return replace(first, mask=torch.zeros_like(first.mask))
        return batch.rows(rows)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` (any shape) over the processes, the same to the bit in all of them; in place."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Sum the gradients of ``parameters``, in one message. A parameter without one counts as zero everywhere."""
        if self.size == 1:
            return
        flat = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.flatten() for p in parameters])
        pieces = self.sum(flat).split([parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)

    def mean_deviation(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sample deviation (D,) of rows (n, D), over the rows of all processes."""
        if self.size == 1:
            deviation, mean = torch.std_mean(rows, dim=0)
            return mean, deviation
        count = self.sum(rows.new_tensor(float(len(rows))))
        mean = self.sum(rows.sum(0)) / count
        return mean, (self.sum((rows - mean).square().sum(0)) / (count - 1)).sqrt()

    def totals(self, *numbers: float) -> list[float]:
        """Each number summed over the processes, in float64."""
        if self.size == 1:
            return list(numbers)
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        return self.sum(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()


#: One process: the plain case.
ALONE = Group()
