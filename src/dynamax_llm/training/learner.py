"""The heads' loss, and one set of heads in training: weights, optimiser, class counts, the best weights so far.

While decoding, every later head reads a token that left as it was when it left: frozen h, frozen features. Training
does the same to whole rows in parallel (``traces.simulate``): each row draws a threshold, the heads' own (detached)
confidences decide exit after exit which tokens leave, and later exits read the frozen inputs. In some rows no token
leaves, and the others start at a random position, because prompts are read at full depth. The loss counts only tokens
that reach an exit.

Shapes: B rows, T tokens, E exits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.traces.collect import ExitBatch
from dynamax_llm.traces.simulate import ExitSimulation, ThresholdSample, simulate_exits
from dynamax_llm.training import optimiser
from dynamax_llm.training.multi_exit import depth_weights
from dynamax_llm.training.parallel import ALONE, Group
from dynamax_llm.training.run import GRADIENT_NORM, part
from dynamax_llm.training.settings import TrainSettings


class Balance:
    """Running counts, per exit, of tokens that agree and that do not, among those that reach it.

    They stay on the device, so that no step waits for them.
    """

    def __init__(self, n_exits: int, device: torch.device | str = "cpu") -> None:
        # disagree, agree; one of each to begin with
        self.counts = torch.ones(2, n_exits, dtype=torch.float64, device=device)

    def add(self, counted: Tensor) -> None:
        """Add a ``tally`` (2, E)."""
        self.counts += counted

    def prior(self) -> Tensor:
        """Log-odds of agreement (E,) float32."""
        return (self.counts[1] / self.counts[0]).log().float()

    def weights(self) -> Tensor:
        """Loss weight (2, E) float32 of tokens that disagree and that agree: both classes weigh the same."""
        return (self.counts.sum(0) / (2 * self.counts)).float()


def tally(targets: Tensor, reached: Tensor) -> Tensor:
    """Of the tokens that reach each exit, how many disagree and how many agree there: (2, E) from (E, B, T).

    A soft label counts as that share of a token.
    """
    agree = (targets.double() * reached).sum((1, 2))
    return torch.stack((reached.sum((1, 2)) - agree, agree))


def loss(simulation: ExitSimulation, targets: Tensor, weights: Tensor, reached: Tensor | None = None) -> Tensor:
    """Class-balanced binary cross-entropy over the tokens that reach each exit, averaged over exits by i / Σj, as
    CALM (arXiv 2207.07061) weighs layers.

    ``targets`` (E, B, T) in [0, 1], ``weights`` (2, E) from ``Balance``; ``reached`` (E,) is the number of tokens that
    reach each exit where ``simulation`` holds only this process's share of them. An exit that no token reaches adds
    nothing. Tokens are masked, not selected, because their number is known on the device alone.
    """
    assert simulation.logits is not None
    disagree, agree = weights.to(simulation.logits.device)[:, :, None, None].unbind()
    each = torch.lerp(disagree, agree, targets) * simulation.reached
    losses = F.binary_cross_entropy_with_logits(simulation.logits, targets, each, reduction="none").sum((1, 2))
    means = losses / (simulation.reached.sum((1, 2)) if reached is None else reached).clamp(min=1)
    shares = depth_weights(range(1, len(targets) + 1))
    return torch.stack([share * mean for share, mean in zip(shares, means, strict=True)]).sum()


class HeadLearner:
    """Heads of one configuration; several learners can share an exit batch."""

    def __init__(
        self, config: ExitConfig, width: int, settings: TrainSettings, device: torch.device, group: Group = ALONE
    ) -> None:
        self.config, self.settings, self.group = config, settings, group
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.heads = ExitHeads(config, width).to(device)
        self.optimiser = optimiser.build(settings, list(self.heads.parameters()))
        self.balance = Balance(len(config.layers), device)
        self.history: list[dict[str, Any]] = []  # evaluations
        self.train_loss: Tensor | float | None = None  # of the last step
        self.restart()

    def restart(self) -> None:
        """Forget the best weights and evaluations so far: the loss is measured in another way from here on."""
        self.best, self.best_loss = _copy(self.heads), float("inf")
        self.failures = 0  # evaluations since the best

    @property
    def stopped(self) -> bool:
        """Whether held-out loss has not improved for ``patience`` evaluations."""
        return self.failures >= self.settings.patience

    def step(self, exit_batch: ExitBatch, sample: ThresholdSample, progress: float) -> None:
        """One optimiser step, at ``progress`` in [0, 1] of the heads' budget. Nothing in it waits for the device.

        ``exit_batch`` and ``sample`` are this process's share of the batch; the step is the whole batch's.
        """
        if not self.optimiser.state:
            self._fit_inputs(exit_batch)
        with torch.enable_grad():
            simulation = simulate_exits(self.heads, exit_batch, sample)
            counted = self.group.sum(tally(exit_batch.targets, simulation.reached))
            self.balance.add(counted)
            value = loss(simulation, exit_batch.targets, self.weights(), counted.sum(0))
            self.optimiser.zero_grad()
            value.backward()
        self.group.sum_gradients(list(self.heads.parameters()))
        nn.utils.clip_grad_norm_(self.heads.parameters(), GRADIENT_NORM)
        optimiser.set_rate(self.optimiser, progress, self.settings.lr, self.settings.warmup)
        self.optimiser.step()
        if self.settings.balanced:
            self.heads.prior.copy_(self.balance.prior())
        self.train_loss = self.group.sum(value.detach())

    def weights(self) -> Tensor:
        """Loss weight (2, E) of tokens that disagree and that agree."""
        weights = self.balance.weights()
        return weights if self.settings.balanced else torch.ones_like(weights)

    def _fit_inputs(self, exit_batch: ExitBatch) -> None:
        """Standardise the heads' inputs by their first batch."""
        for exit, (h, features) in enumerate(zip(exit_batch.hidden, exit_batch.features, strict=True)):
            raw = self.heads.raw_inputs(h, features)[exit_batch.mask]
            self.heads.fit_inputs(exit, *self.group.mean_deviation(raw))

    def record(self, report: dict[str, Any], tokens: int) -> None:
        """Add the evaluation after ``tokens`` training tokens; the weights are kept if they are the best yet."""
        self.history.append({"tokens": tokens, "train_loss": self.last_loss(), **report})
        if report["loss"] < self.best_loss:
            self.best_loss, self.failures, self.best = report["loss"], 0, _copy(self.heads)
        else:
            self.failures += 1

    def last_loss(self) -> float | None:
        """The last step's loss. Waits for the device."""
        return None if self.train_loss is None else float(self.train_loss)

    def finished(self) -> ExitHeads:
        """The best heads, frozen and in eval mode."""
        self.heads.load_state_dict(self.best)
        return self.heads.requires_grad_(False).eval()

    def tensors(self) -> dict[str, Tensor]:
        """Everything of it that is a tensor, for a checkpoint."""
        named = {f"heads.{name}": value for name, value in self.heads.state_dict().items()}
        named |= {f"best.{name}": value for name, value in self.best.items()}
        return named | optimiser.tensors(self.optimiser) | {"balance": self.balance.counts}

    def state(self) -> dict[str, Any]:
        """Everything else, as JSON types."""
        state = {name: getattr(self, name) for name in ("best_loss", "failures", "history")}
        return {**state, "train_loss": self.last_loss(), "optimiser": optimiser.numbers(self.optimiser)}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Inverse of ``tensors`` and ``state``."""
        self.heads.load_state_dict(part(tensors, "heads."))
        self.best = part(tensors, "best.")
        self.balance.counts.copy_(tensors["balance"])
        optimiser.restore(self.optimiser, tensors, state["optimiser"])
        for name in ("best_loss", "failures", "history", "train_loss"):
            setattr(self, name, state[name])


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
