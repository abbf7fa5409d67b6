"""Training the lens: each exit's translator learns to give the full model's next-token distribution.

Shapes: n real tokens of a batch, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW

from dynamax_llm.backbones import Backbone
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.readouts.lens import LensReadout
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.collect import forward
from dynamax_llm.traces.labels import slices
from dynamax_llm.training import optimiser
from dynamax_llm.training.parallel import ALONE, Group
from dynamax_llm.training.run import part
from dynamax_llm.training.settings import TrainSettings


class LensLearner:
    """A lens and its optimiser; the loss is KL(full model || exit) in nats a token."""

    def __init__(self, backbone: Backbone, config: ExitConfig, settings: TrainSettings, group: Group = ALONE) -> None:
        self.backbone, self.layers, self.settings, self.group = backbone, config.layers, settings, group
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.weights = LensReadout.new_weights(config, backbone.width).to(backbone.device)
        self.optimiser = AdamW(self.weights.parameters(), lr=settings.lens_lr, weight_decay=0.0)
        self.latest: list[float] = []  # the loss of the last batch, per exit

    def step(self, batch: Batch, progress: float) -> None:
        """One optimiser step, at ``progress`` in [0, 1] of the readout's budget."""
        self.latest = self._accumulate(batch, learn=True)
        self.group.sum_gradients(list(self.weights.parameters()))
        optimiser.set_rate(self.optimiser, progress, self.settings.lens_lr, self.settings.warmup)
        self.optimiser.step()
        self.optimiser.zero_grad()

    def measure(self, batches: Sequence[Batch]) -> list[float]:
        """Mean loss per exit over held-out batches."""
        totals = torch.tensor([[value * b.tokens for value in self._accumulate(b, learn=False)] for b in batches])
        return (totals.sum(0) / sum(batch.tokens for batch in batches)).tolist()

    def _accumulate(self, batch: Batch, learn: bool) -> list[float]:
        """Mean loss per exit; with ``learn``, adds its gradient. One slice of logits exists at a time.

        The mean is over the whole batch, the gradient of this process's share of it.
        """
        share, count = self.group.share(batch), batch.tokens
        run = forward(self.backbone, self.layers, share.ids)
        mask = share.mask.to(run.final.device)
        final = run.final[mask]
        totals = [0.0] * len(self.layers)
        for piece in slices(self.backbone, len(final)):
            with torch.no_grad():
                target = torch.log_softmax(self.backbone.readout(final[None, piece])[0], dim=-1)
            for exit, h in enumerate(run.hidden):
                totals[exit] += self._one(exit, h[mask][None, piece], target, count, learn)
        return self.group.totals(*totals)

    def _one(self, exit: int, h: Tensor, target: Tensor, count: int, learn: bool) -> float:
        """This slice's share of one exit's mean loss; h (1, n, d), target (n, V)."""
        with torch.set_grad_enabled(learn):
            log_p = torch.log_softmax(self.backbone.readout(self.weights(exit, h))[0], dim=-1)
            value = F.kl_div(log_p, target, reduction="sum", log_target=True) / count
            if learn:
                # Not backward(): that would also leave gradients on the backbone's own parameters.
                parameters = (self.weights.down[exit], self.weights.up[exit])
                for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return float(value.detach())

    def tensors(self) -> dict[str, Tensor]:
        """Everything of it, for a checkpoint."""
        named = {f"weights.{name}": value for name, value in self.weights.state_dict().items()}
        return named | optimiser.tensors(self.optimiser)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of ``tensors``."""
        self.weights.load_state_dict(part(tensors, "weights."))
        optimiser.restore(self.optimiser, tensors)
