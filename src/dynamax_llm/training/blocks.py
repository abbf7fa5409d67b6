"""Training of blocks and drafts: what a trained readout gives learns to be the full model's next-token distribution.

Keys, values and states are made of every token, outputs only at some positions, the *forks*: about one token in
``every``. A draft goes on from each fork over several of its own steps, as it will when it drafts: its output takes
the features' place, and the text's tokens are those proposed (training-time test of EAGLE-3, arXiv 2503.01840; for a
state-space block the state forks at the ends of chunks of the scan, where it is at hand).

The loss is KL(p || q) plus the total variation of p and q: q over the tokens that the readout speaks, p the full
model's, for the KL taken among these tokens, for the total variation as it is.

Shapes: B rows, T tokens, F forks, d width, V vocabulary, K tokens that the readout speaks.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from dynamax_llm.backbones import Backbone
from dynamax_llm.exits.block_kinds.base import Block
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.readouts.base import build_readout
from dynamax_llm.exits.readouts.block import BlockReadout, Blocks
from dynamax_llm.exits.readouts.draft import DraftReadout, DraftWeights
from dynamax_llm.exits.readouts.trained import TrainedWeights
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.chains import chain
from dynamax_llm.traces.collect import hidden_at
from dynamax_llm.training import optimiser
from dynamax_llm.training.parallel import ALONE, Group
from dynamax_llm.training.run import GRADIENT_NORM, part
from dynamax_llm.training.settings import TrainSettings
from dynamax_llm.training.warm_start import start_from_last_layer

#: Adam's second decay: gradients change fast while the learning rate is high.
BETAS = (0.9, 0.95)
#: Later steps of a draft count this much less than the step before.
STEP_WEIGHT = 0.8


class TrainedLearner(abc.ABC):
    """The weights of one readout with trained blocks, and their optimiser."""

    #: Whether each loss has a graph of its own, so that its gradients can be taken before the next is made.
    separate = True

    def __init__(self, backbone: Backbone, config: ExitConfig, settings: TrainSettings, group: Group = ALONE) -> None:
        self.backbone, self.config, self.settings, self.group = backbone, config, settings, group
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.weights = self._new_weights()
        for block in self.blocks():
            start_from_last_layer(block, backbone)
        self.weights.to(backbone.device)
        self.readout = build_readout(backbone, config, self.weights)
        self.optimiser = AdamW(
            self.weights.parameters(),
            lr=settings.block_lr,
            weight_decay=settings.weight_decay,
            betas=BETAS,
            fused=backbone.device.type == "cuda",
        )
        self._losses: Tensor | None = None
        self.generator = torch.Generator().manual_seed(settings.seed)

    @abc.abstractmethod
    def _new_weights(self) -> TrainedWeights: ...

    @abc.abstractmethod
    def blocks(self) -> list[Block]:
        """The blocks that are trained."""

    @property
    @abc.abstractmethod
    def depths(self) -> tuple[int, ...]:
        """Layers after which h is read."""

    @abc.abstractmethod
    def parts(self, hidden: Mapping[int, Tensor], batch: Batch, forks: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """What is learned of a batch: (number of the loss, outputs (B, F, d), the position (F,) each is after)."""

    @property
    @abc.abstractmethod
    def count(self) -> int:
        """How many losses there are: one an exit, or one a step of the draft."""

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Choose the tokens that the readout speaks: the most frequent of these batches' answers, or of their text."""
        if self.weights.tokens is None:
            return
        counts = torch.zeros(self.backbone.vocab_size, dtype=torch.float64)
        for batch in batches:
            answers = batch.answers
            ids = batch.ids[batch.mask] if answers is None else batch.ids[:, 1:][answers[:, :-1]]
            counts += torch.bincount(ids, minlength=len(counts))
        order = (-counts).argsort(stable=True)
        self.weights.tokens = order[: len(self.weights.tokens)].sort().values.to(self.backbone.device)
        self.readout = build_readout(self.backbone, self.config, self.weights)

    def step(self, batch: Batch, progress: float) -> None:
        """One optimiser step, at ``progress`` in [0, 1] of the readout's budget."""
        share = self.group.share(batch)
        self.learn(hidden_at(self.backbone, self.depths, share.ids), share, progress)

    def learn(self, hidden: Mapping[int, Tensor], batch: Batch, progress: float) -> None:
        """The same, from h (B, T, d) at ``depths`` and after the last layer of this process's share."""
        self._losses = self.group.sum(self._accumulate(hidden, batch, learn=True))
        self.group.sum_gradients(list(self.weights.parameters()))
        nn.utils.clip_grad_norm_(self.weights.parameters(), GRADIENT_NORM)
        optimiser.set_rate(self.optimiser, progress, self.settings.block_lr, self.settings.warmup)
        self.optimiser.step()
        self.optimiser.zero_grad()

    @property
    def latest(self) -> list[float]:
        """The last step's losses. Waits for the device."""
        return [] if self._losses is None else self._losses.tolist()

    def measure(self, batches: Sequence[Batch]) -> list[float]:
        """Mean losses over held-out batches, one an exit or a step."""
        generator, self.generator = self.generator, torch.Generator().manual_seed(0)
        total = torch.zeros(self.count, device=self.backbone.device)
        for batch in batches:
            share = self.group.share(batch)
            total += self._accumulate(hidden_at(self.backbone, self.depths, share.ids), share, learn=False)
        self.generator = generator
        return (self.group.sum(total) / len(batches)).tolist()

    def _accumulate(self, hidden: Mapping[int, Tensor], batch: Batch, learn: bool) -> Tensor:
        """Losses (count,) of this share; with ``learn``, their gradients are added."""
        losses = torch.zeros(self.count, device=self.backbone.device)
        block = self.blocks()[0]
        last = batch.ids.shape[1] - self.look_ahead
        if last < 1:
            return losses
        forks = block.forks(last, self.settings.every, self.generator).to(self.backbone.device)
        final = hidden[self.backbone.n_layers]
        counted = (batch.mask if batch.answers is None else batch.answers).to(final.device, non_blocking=True)
        with torch.set_grad_enabled(learn):
            weighted: list[Tensor] = []
            target: tuple[Tensor, Tensor] | None = None
            at: Tensor | None = None
            for number, outputs, positions in self.parts(hidden, batch, forks):
                if target is None or at is not positions:
                    target, at = self._target(final[:, positions]), positions
                p, log_target = target
                loss = self._loss(outputs, p, log_target, counted[:, positions])
                losses[number] = loss.detach()
                weighted.append(loss * self._weight(number))
                if learn and self.separate:
                    self._add_gradients(weighted.pop())
            if learn and weighted:
                self._add_gradients(torch.stack(weighted).sum())
        return losses

    @property
    def look_ahead(self) -> int:
        """How many tokens after a fork are read."""
        return 0

    def _weight(self, number: int) -> float:
        return 1.0

    def _add_gradients(self, loss: Tensor) -> None:
        # Not backward(): that would also leave gradients on the backbone's own parameters.
        parameters = list(self.weights.parameters())
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
        ):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    @torch.no_grad()
    def _target(self, final: Tensor) -> tuple[Tensor, Tensor]:
        """The full model's distribution over the tokens that the readout speaks, from its h (B, F, d): probabilities
        p (B, F, K), and their logarithms taken among these tokens."""
        log_p = torch.log_softmax(self.backbone.readout(final), dim=-1)  # (B, F, V)
        if self.readout.vocabulary is not None:
            log_p = log_p[..., self.readout.vocabulary]
        return log_p.exp(), log_p.log_softmax(-1)

    def _loss(self, outputs: Tensor, p: Tensor, log_target: Tensor, real: Tensor) -> Tensor:
        """Mean loss over ``real`` (B, F) positions of outputs (B, F, d) against ``_target``."""
        log_q = torch.log_softmax(self.readout.scores(0, outputs), dim=-1)  # (B, F, K)
        divergence = (log_target.exp() * (log_target - log_q)).sum(-1)
        variation = 1.0 - torch.minimum(p, log_q.exp()).sum(-1)
        count = self.group.sum(real.sum().float()).clamp(min=1)
        return ((divergence + variation) * real).sum() / count

    def tensors(self) -> dict[str, Tensor]:
        """Everything of it, for a checkpoint."""
        named = {f"weights.{name}": value for name, value in self.weights.state_dict().items()}
        return named | optimiser.tensors(self.optimiser) | {"generator": self.generator.get_state()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of ``tensors``."""
        self.weights.load_state_dict(part(tensors, "weights."))
        self.readout = build_readout(self.backbone, self.config, self.weights)
        optimiser.restore(self.optimiser, tensors)
        self.generator.set_state(tensors["generator"])


class BlockLearner(TrainedLearner):
    """The blocks of all exits; one loss an exit."""

    weights: Blocks

    def _new_weights(self) -> Blocks:
        return BlockReadout.new_weights(self.config, self.backbone.width)

    def blocks(self) -> list[Block]:
        return [self.weights.block(exit) for exit in range(len(self.config.layers))]

    @property
    def depths(self) -> tuple[int, ...]:
        return self.config.layers

    @property
    def count(self) -> int:
        return len(self.config.layers)

    def parts(self, hidden: Mapping[int, Tensor], batch: Batch, forks: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        for exit, depth in enumerate(self.config.layers):
            outputs, _ = self.weights.block(exit).fork(self.weights.entered(exit, hidden[depth]), forks)
            yield exit, outputs, forks


class DraftLearner(TrainedLearner):
    """A draft, trained over ``draft_steps`` of its own steps; one loss a step."""

    weights: DraftWeights
    separate = False

    def _new_weights(self) -> DraftWeights:
        return DraftReadout.new_weights(self.config, self.backbone.width)

    def blocks(self) -> list[Block]:
        return [self.weights.block]

    @property
    def depths(self) -> tuple[int, ...]:
        return (0, *self.readout.taps)

    @property
    def count(self) -> int:
        return self.settings.draft_steps

    @property
    def look_ahead(self) -> int:
        return self.settings.draft_steps - 1

    def _weight(self, number: int) -> float:
        return STEP_WEIGHT**number

    def parts(self, hidden: Mapping[int, Tensor], batch: Batch, forks: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        for step, (outputs, positions) in enumerate(chain(self.weights, self.readout.taps, hidden, forks, self.count)):
            yield step, outputs, positions
