"""The phases of a training run, one after another: a learned readout, the heads, the heads again on policy.

Every phase has the run's budget up to a share of it. The heads' two phases share learners, held-out text and
evaluations. What learns a readout or a head is found by its kind, in READOUT_LEARNERS and HEAD_LEARNERS: a new trained
readout adds itself there, from its learner's own file.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dynamax_llm.backbones import Backbone
from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.readouts.base import Readout, build_readout
from dynamax_llm.registry import Registry
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.chains import collect_chains
from dynamax_llm.traces.collect import ExitBatch, collect_exits, hidden_at
from dynamax_llm.traces.labels import Label
from dynamax_llm.traces.on_policy import collect_on_policy
from dynamax_llm.traces.simulate import ThresholdSample
from dynamax_llm.training.blocks import BlockLearner, DraftLearner, TrainedLearner
from dynamax_llm.training.held_out import HeldOut, evaluate
from dynamax_llm.training.learner import HeadLearner
from dynamax_llm.training.lens import LensLearner
from dynamax_llm.training.optimiser import averaged
from dynamax_llm.training.parallel import Group
from dynamax_llm.training.run import Counters, part
from dynamax_llm.training.settings import TrainSettings
from dynamax_llm.training.side_stream import SideStream


class ReadoutLearner(Protocol):
    """Learns the ``weights`` of a readout. ``step`` is one optimiser step at ``progress`` in [0, 1] of its budget;
    ``latest`` its loss per exit; ``measure`` the mean loss per exit over held-out batches.

    ``prepare``, where there is one, is given training batches before the first step."""

    weights: nn.Module

    @property
    def latest(self) -> list[float]: ...

    def step(self, batch: Batch, progress: float) -> None: ...
    def measure(self, batches: Sequence[Batch]) -> list[float]: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def restore(self, tensors: dict[str, Tensor]) -> None: ...


#: What learns a readout's weights, by ``Readout.learner``; open to learners of your own.
READOUT_LEARNERS: Registry[Callable[[Backbone, ExitConfig, TrainSettings, Group], ReadoutLearner]] = Registry(
    "readout learner", {"lens": LensLearner, "block": BlockLearner, "draft": DraftLearner}
)
#: What learns a head, by its kind, where that is not HeadLearner.
HEAD_LEARNERS: Registry[type[HeadLearner]] = Registry("head learner")


class Phase(abc.ABC):
    """A part of a run, from where the last one ended to ``end``, a share of the budget."""

    name: str
    start: float
    end: float
    on_policy = False

    @property
    def finished(self) -> bool:
        """Whether it has nothing more to learn, before ``end``."""
        return False

    def begin(self, counters: Counters) -> None:
        """Called before its first batch; again if that was interrupted."""

    @abc.abstractmethod
    def step(self, batch: Batch, share: float) -> None:
        """Learn from a batch, at ``share`` of the run's budget."""

    def complete(self) -> None:
        """Called before the next phase begins."""

    @abc.abstractmethod
    def note(self) -> str:
        """The latest figures. May wait for the device."""


class LearnReadouts(Phase):
    """The readouts' own tensors, from the backbone alone; the heads then learn labels that come from them.

    Learners by number of their group of heads. Blocks and drafts share the backbone's forward.
    """

    name = "readout"

    def __init__(self, learners: Mapping[int, ReadoutLearner], held: Sequence[Batch], end: float) -> None:
        self.learners, self.held, self.start, self.end = learners, held, 0.0, end
        self.losses: dict[int, dict[str, list[float]]] = {}  # held-out, "before" and "after", per exit

    def begin(self, counters: Counters) -> None:
        self.losses = {number: {"before": learner.measure(self.held)} for number, learner in self.learners.items()}

    def step(self, batch: Batch, share: float) -> None:
        trained = [learner for learner in self.learners.values() if isinstance(learner, TrainedLearner)]
        if trained:
            rows = trained[0].group.share(batch)
            hidden = hidden_at(trained[0].backbone, {depth for each in trained for depth in each.depths}, rows.ids)
            for each in trained:
                each.learn(hidden, rows, share / self.end)
        for learner in self.learners.values():
            if not isinstance(learner, TrainedLearner):
                learner.step(batch, share / self.end)

    def complete(self) -> None:
        for number, learner in self.learners.items():
            self.losses[number]["after"] = learner.measure(self.held)

    def note(self) -> str:
        means = [sum(learner.latest) / len(learner.latest) for learner in self.learners.values() if learner.latest]
        return "loss " + ", ".join(f"{mean:.3f}" for mean in means)

    def tensors(self) -> dict[str, Tensor]:
        """Everything of the learners, for a checkpoint."""
        return {
            f"{number}.{name}": value
            for number, learner in self.learners.items()
            for name, value in learner.tensors().items()
        }

    def restore(self, tensors: dict[str, Tensor], losses: dict[str, dict[str, list[float]]]) -> None:
        """Inverse of ``tensors``, and of ``losses`` as JSON has them."""
        self.losses = {int(number): values for number, values in losses.items()}
        for number, learner in self.learners.items():
            learner.restore(part(tensors, f"{number}."))


class Heads:
    """Heads with one readout, which share every exit batch and the held-out text."""

    def __init__(
        self,
        backbone: Backbone,
        readout: Readout,
        configs: Mapping[str, ExitConfig],
        settings: TrainSettings,
        held: Sequence[Batch],
        group: Group,
    ) -> None:
        self.backbone, self.readout, self.settings, self.group = backbone, readout, settings, group
        self.label = Label(settings.label, settings.label_k)
        self.side = SideStream(backbone.device)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.held = HeldOut(held, self.collect, group)
        self.learners = {
            name: HEAD_LEARNERS.get(str(config.head), HeadLearner)(
                config, backbone.width, settings, backbone.device, group
            )
            for name, config in configs.items()
        }

    @property
    def active(self) -> dict[str, HeadLearner]:
        """The learners that have not stopped."""
        return {name: learner for name, learner in self.learners.items() if not learner.stopped}

    def collect(self, batch: Batch) -> ExitBatch:
        """What the exits show of a batch with every state intact, or a draft of chains."""
        if self.readout.drafts:
            return collect_chains(self.backbone, self.readout, batch)
        return collect_exits(self.backbone, self.readout, batch, self.label)

    def collect_on_policy(self, heads: ConfidenceEstimator, batch: Batch, sample: ThresholdSample) -> ExitBatch:
        """What the exits show of a batch that ``heads`` decode."""
        return collect_on_policy(self.backbone, self.readout, heads, batch, sample, self.label)

    def evaluate(self, tokens: int, on_policy: bool) -> None:
        """Record an evaluation of every active learner after ``tokens`` training tokens."""
        self.side.join()
        active, settings = self.active, self.settings
        heads = {name: learner.heads for name, learner in active.items()}
        weights = {name: learner.weights() for name, learner in active.items()}
        collect = self.collect_on_policy if on_policy else None
        shares = (settings.no_exit_share, settings.agreement)
        with ExitStack() as stack:
            for learner in active.values():
                stack.enter_context(averaged(learner.optimiser))
            reports = evaluate(heads, weights, self.held, self.readout.config, *shares, collect)
            for name, learner in active.items():
                learner.record({"on_policy": on_policy, **reports[name]}, tokens)

    def tensors(self) -> dict[str, Tensor]:
        """Everything of them that is a tensor, for a checkpoint."""
        self.side.join()
        named = {f"{name}.{key}": one for name, item in self.learners.items() for key, one in item.tensors().items()}
        return named | {"generator": self.generator.get_state()}

    def state(self) -> dict[str, Any]:
        """Everything else, as JSON types."""
        return {name: learner.state() for name, learner in self.learners.items()}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Inverse of ``tensors`` and ``state``."""
        self.generator.set_state(tensors["generator"])
        for name, learner in self.learners.items():
            learner.restore(part(tensors, f"{name}."), state[name])


class LearnHeads(Phase):
    """The heads, from one frozen forward a batch and readout, shared by the heads with that readout."""

    name = "heads"

    def __init__(self, heads: Sequence[Heads], start: float, end: float) -> None:
        self.heads, self.start, self.end = heads, start, end

    @property
    def finished(self) -> bool:
        """Whether every head has stopped."""
        return not any(heads.active for heads in self.heads)

    def step(self, batch: Batch, share: float) -> None:
        for heads in self.heads:
            if heads.active:
                self._step(heads, batch, share)

    def _step(self, heads: Heads, batch: Batch, share: float) -> None:
        rows = heads.group.share(batch)
        sample = ThresholdSample.sample(batch.mask, heads.settings.no_exit_share, heads.generator)
        sample = sample.rows(heads.group.rows(len(batch.ids)))
        shared = None if self.on_policy else heads.collect(rows)
        progress = (share - self.start) / (1.0 - self.start)

        def learn() -> None:
            for learner in heads.active.values():
                learned = heads.collect_on_policy(learner.heads, rows, sample) if shared is None else shared
                learner.step(learned, sample, progress)

        heads.side.run(learn, shared)

    def note(self) -> str:
        notes = []
        for heads in self.heads:
            heads.side.join()
            for name, learner in heads.learners.items():
                depth = f", depth {learner.history[-1]['depth']:.3f}" if learner.history else ""
                notes.append(f"{name or learner.config.head}: loss {learner.last_loss() or 0:.3f}{depth}")
        return "; ".join(notes)


class LearnHeadsOnPolicy(LearnHeads):
    """The heads, from texts decoded by themselves; ``start`` is that of the first of the heads' phases."""

    name = "heads on policy"
    on_policy = True

    def begin(self, counters: Counters) -> None:
        for heads in self.heads:
            for learner in heads.learners.values():
                learner.restart()
            heads.evaluate(counters.tokens, self.on_policy)  # the first phase's heads, to compare with


class Phases:
    """The phases in their order, advanced by a run as one ``Learning``; evaluations of the heads in between."""

    def __init__(self, readout: LearnReadouts | None, heads: Sequence[Heads], settings: TrainSettings) -> None:
        self.heads, self.readout, self.settings = heads, readout, settings
        start = 0.0 if readout is None else readout.end
        self.phases: list[Phase] = [] if readout is None else [readout]
        self.phases.append(LearnHeads(heads, start, 1.0 - settings.on_policy * (1.0 - start)))
        if settings.on_policy:
            self.phases.append(LearnHeadsOnPolicy(heads, start, 1.0))
        self.begun = 0
        self._evaluate_from = int(start * settings.max_tokens)

    @property
    def current(self) -> Phase:
        """The phase that was begun last."""
        return self.phases[max(self.begun - 1, 0)]

    def step(self, batch: Batch, counters: Counters) -> None:
        """Learn from a batch in the current phase, or the next where that is over; evaluate where it is due."""
        share = self._share(counters.tokens, counters.steps)
        while not self.begun or (self.begun < len(self.phases) and self._over(share)):
            if self.begun:
                self.current.complete()
                self._hand_over()
            self.phases[self.begun].begin(counters)
            self.begun += 1
        self.current.step(batch, share)
        tokens = counters.tokens + batch.tokens
        spent = self._share(tokens, counters.steps + 1) >= 1.0
        if spent or self._evaluations(tokens) > self._evaluations(counters.tokens):
            for heads in self.heads:
                if heads.active:
                    heads.evaluate(tokens, self.current.on_policy)

    def close(self) -> None:
        """Called after the last step: a run that ended with its readouts' phase hands them over too."""
        if self.readout is not None and self.begun == 1:
            self.readout.complete()
            self._hand_over()

    def _hand_over(self) -> None:
        """The heads' readouts have what was learned of them."""
        for number, learner in ({} if self.readout is None else self.readout.learners).items():
            heads = self.heads[number]
            heads.readout = build_readout(heads.backbone, heads.readout.config, learner.weights)

    def finished(self, counters: Counters) -> bool:
        """Whether the budget is used up, or every head has stopped in the last phase."""
        last = self.begun == len(self.phases) and self.current.finished
        return last or self._share(counters.tokens, counters.steps) >= 1.0

    def _share(self, tokens: int, steps: int) -> float:
        """The share of the budget that is used up."""
        documents = steps / self.settings.documents if self.settings.documents else 0.0
        return max(tokens / self.settings.max_tokens, documents)

    def _over(self, share: float) -> bool:
        return share >= self.current.end or self.current.finished

    def _evaluations(self, tokens: int) -> int:
        """How many evaluations are due by ``tokens``."""
        return max(tokens - self._evaluate_from, 0) // self.settings.eval_every

    def note(self) -> tuple[str, str]:
        """For the progress bar."""
        return self.current.name, self.current.note()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is a tensor, for a checkpoint."""
        learned = {} if self.readout is None else self.readout.tensors()
        named = {f"readout.{name}": value for name, value in learned.items()}
        for number, heads in enumerate(self.heads):
            named |= {f"heads.{number}.{name}": value for name, value in heads.tensors().items()}
        return named

    def state(self) -> dict[str, Any]:
        """Everything else, as JSON types."""
        losses = {} if self.readout is None else self.readout.losses
        return {"begun": self.begun, "losses": losses, "heads": [heads.state() for heads in self.heads]}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Inverse of ``tensors`` and ``state``."""
        self.begun = state["begun"]
        for number, heads in enumerate(self.heads):
            heads.restore(part(tensors, f"heads.{number}."), state["heads"][number])
        if self.readout is not None:
            self.readout.restore(part(tensors, "readout."), state["losses"])
            if self.begun > 1:
                self._hand_over()
