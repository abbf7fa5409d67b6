"""One step of tuning: the layers run once with gradient, logits exist for one slice of one readout at a time.

The hidden states to be read out are detached from the graph; each slice's loss sends its gradient back to them (and,
where they are trained, to norm and LM head), and one backward pass then takes the sum through the layers. So memory
holds the layers' activations (or, with checkpointing, their inputs) and a few slices of logits, whatever the
vocabulary.

Shapes: B rows, T tokens, d width, V vocabulary, n tokens of the batch that have a next one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

from dynamax_llm.backbones import Backbone
from dynamax_llm.errors import UsageError
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.labels import slices
from dynamax_llm.training import optimiser
from dynamax_llm.training.multi_exit import Mixture, readout_loss, rotate_exits
from dynamax_llm.training.run import GRADIENT_NORM, Counters, part
from dynamax_llm.training.tuning.settings import TuneSettings
from dynamax_llm.training.tuning.student import Student

#: Entries of the training loss in the record, about.
HISTORY = 20


def hidden(backbone: Backbone, ids: Tensor, layers: Sequence[int], checkpointing: bool = False) -> list[Tensor]:
    """h (B, T, d) after each of ``layers``, rising and counted from 1, of ids (B, T). Right pads need no mask."""
    h = backbone.embed(ids.to(backbone.device))
    ctx = backbone.context(h)
    states = []
    for index in range(layers[-1]):
        if checkpointing:
            h = checkpoint(backbone.layer, index, h, None, ctx, use_reentrant=False)
        else:
            h = backbone.layer(index, h, None, ctx)
        if index + 1 in layers:
            states.append(h)
    return states


class TuneLearner:
    """The optimiser of a student, its losses; what a run advances."""

    def __init__(self, student: Student, layers: tuple[int, ...], settings: TuneSettings) -> None:
        self.student, self.layers, self.settings = student, layers, settings
        self.optimiser = AdamW(student.parameters.values(), lr=settings.peak, weight_decay=settings.weight_decay)
        self.loss = math.nan  # of the last step
        self.history: list[dict[str, Any]] = []

    def exits(self, step: int) -> list[int]:
        """Depths of the exits that are trained in this step, rising."""
        if self.settings.schedule == "weighted":
            return list(self.layers)
        return rotate_exits(step, self.layers, min(self.settings.rotating, len(self.layers)))

    def step(self, batch: Batch, counters: Counters) -> None:
        """One optimiser step. Raises UsageError at a loss that is NaN or infinite."""
        self.optimiser.zero_grad()
        with torch.enable_grad(), self._products():
            self.loss = self.backward(batch, self.exits(counters.steps))
        if not math.isfinite(self.loss):
            raise UsageError(
                f"the loss became {self.loss} in step {counters.steps + 1}: training at lr {self.settings.peak:g} "
                "diverged. Give a smaller learning rate and a new folder."
            )
        nn.utils.clip_grad_norm_(self.student.parameters.values(), GRADIENT_NORM)
        most = self.settings.max_tokens
        optimiser.set_rate(self.optimiser, counters.tokens / most, self.settings.peak, self.settings.warmup)
        self.optimiser.step()
        tokens = counters.tokens + batch.tokens
        if tokens >= len(self.history) * most / HISTORY:
            self.history.append({"tokens": tokens, "loss": self.loss})

    def finished(self, counters: Counters) -> bool:
        """Whether the budget is used up."""
        return counters.tokens >= self.settings.max_tokens

    def note(self) -> tuple[str, str]:
        """For the progress bar."""
        return "tuning", f"loss {self.loss:.3f}"

    def backward(self, batch: Batch, exits: Sequence[int]) -> float:
        """Add the gradient of the loss, a mean over the batch's tokens, to the parameters; returns the loss."""
        backbone, settings = self.student.backbone, self.settings
        mixture = Mixture.of(exits, settings.distil, settings.exit_weight, settings.last_distil)
        states = hidden(backbone, batch.ids, (*exits, backbone.n_layers), settings.checkpointing)
        counted = batch.mask[:, 1:].to(states[-1].device)
        targets = batch.ids[:, 1:].to(counted.device)[counted]  # (n,)
        rows = [h[:, :-1][counted.to(h.device)] for h in states]  # (n, d) each
        detached = [h.detach().requires_grad_() for h in rows]
        teacher = self._teacher(batch, counted, detached[-1]) if any(mixture.soft) else None
        total = torch.zeros((), device=counted.device)
        for piece in slices(backbone, len(targets)):
            taught = None if teacher is None else teacher(piece)
            for h, hard, soft in zip(detached, mixture.hard, mixture.soft, strict=True):
                logits = backbone.readout(h[None, piece])[0]
                value = readout_loss(logits, targets[piece], taught, hard, soft) / len(targets)
                value.backward()
                total += value.detach()
        torch.autograd.backward(rows, [h.grad for h in detached])
        return float(total)

    def _teacher(self, batch: Batch, counted: Tensor, last: Tensor) -> Callable[[slice], Tensor]:
        """Log-probabilities (slice, V), on demand, of the teacher."""

        def read(backbone: Backbone, rows: Tensor, piece: slice) -> Tensor:
            with torch.no_grad():
                return torch.log_softmax(backbone.readout(rows[None, piece])[0], -1)

        if self.settings.teacher == "current":
            return lambda piece: read(self.student.backbone, last.detach(), piece)
        with torch.no_grad(), self.student.teacher() as original:
            rows = hidden(original, batch.ids, (original.n_layers,))[0][:, :-1][counted]
        return lambda piece: read(original, rows, piece)

    def _products(self) -> Any:
        device = self.student.backbone.device.type
        if device == "cpu" or not self.settings.autocast:
            return contextlib.nullcontext()
        return torch.autocast(device, torch.bfloat16)

    def tensors(self) -> dict[str, Tensor]:
        """Everything of it that is a tensor, for a checkpoint."""
        named = {f"student.{name}": parameter.detach() for name, parameter in self.student.parameters.items()}
        return named | optimiser.tensors(self.optimiser)

    def state(self) -> dict[str, Any]:
        """Everything else, as JSON types."""
        return {"history": self.history}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Inverse of ``tensors`` and ``state``."""
        with torch.no_grad():
            for name, value in part(tensors, "student.").items():
                self.student.parameters[name].copy_(value)
        optimiser.restore(self.optimiser, tensors)
        self.history = state["history"]
