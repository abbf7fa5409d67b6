"""The phases of a training run, learners from outside, what is measured after the last token and its progress."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dynamax_llm.decoding import EarlyExit
from dynamax_llm.exits.readouts.lens import LensReadout
from dynamax_llm.progress import TokenBar
from dynamax_llm.registry import Registry
from dynamax_llm.text.batches import Split, find_source, first_batches
from dynamax_llm.traces.teacher_forced import step_by_step
from dynamax_llm.training import phases, trainer
from dynamax_llm.training.learner import HeadLearner
from dynamax_llm.training.phases import Phases
from dynamax_llm.training.trainer import train, train_many
from tests.training.test_trainer import CONFIG, SETTINGS


def test_a_finished_run_measures_nothing_again(backbone, corpus: Path, tokenizer, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    arguments = (backbone("mistral"), tokenizer, find_source(corpus), CONFIG, SETTINGS, out)
    first = train(*arguments)
    checkpoint = out / ".checkpoint" / "state.safetensors"
    assert checkpoint.stat().st_size < 10_000, "nothing but what the run was"
    decoded = first.provenance["decoded"]
    assert (decoded["policy"], decoded["target"]) == ("propagate", SETTINGS.agreement)
    assert decoded["tokens"] >= SETTINGS.eval_tokens
    assert decoded["best"] is None or decoded["best"]["agreement"] >= SETTINGS.agreement

    def measured(*arguments, **options):
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        for name in ("drift_penalty", "decoded_report", "on_policy", "first_batches", "run"):
            patch.setattr(trainer, name, measured)
        repeated = train(*arguments)
    assert repeated.provenance == first.provenance
    assert repeated.drift_penalty == first.drift_penalty
    for name, value in first.heads.state_dict().items():
        assert torch.equal(repeated.heads.state_dict()[name], value), name
    (out / "exits.json").unlink()  # a result that is gone is made again
    again = train(*arguments)
    assert again.provenance["history"] == first.provenance["history"]


def test_the_report_on_decoded_text_is_what_decoding_gives(backbone, corpus: Path, tokenizer, tmp_path: Path) -> None:
    """On one document a batch, as in training; with a target that nearly every threshold keeps."""
    settings = dataclasses.replace(SETTINGS, documents=6, agreement=0.3, eval_tokens=300)
    adapter, source = backbone("mistral"), find_source(corpus)
    exits = train(adapter, tokenizer, source, CONFIG, settings, tmp_path / "out")
    report = exits.provenance["decoded"]
    held = first_batches(Split(source, tokenizer, True, 0.2, 64, 512, alone=True), 300)
    assert report["tokens"] == sum(batch.tokens for batch in held)
    assert {len(batch.ids) for batch in held} == {1}, "one document a batch, as in training"
    early = EarlyExit(exits, threshold=report["best"]["threshold"])
    _, plan, costs = early.attach(adapter.model)
    agree = layers = 0
    for batch in held:
        forced = step_by_step(adapter, plan, batch.ids, early.thresholds.values)
        agree += int((forced.tokens == adapter.model(batch.ids).logits.argmax(-1)).sum())
        layers += int(costs.layers(forced.exit_index).sum())
    assert report["best"]["agreement"] == pytest.approx(agree / report["tokens"], abs=0.02)
    assert report["best"]["depth"] == pytest.approx(layers / report["tokens"] / 5, abs=0.02)
    assert report["best"]["counted_reduction"] < 1.0 - report["best"]["depth"]


def test_progress_in_a_pipe_is_lines_that_name_the_measurements(
    backbone, corpus: Path, tokenizer, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("dynamax_llm.progress.LINE_PAUSE", 0.0)
    settings = dataclasses.replace(SETTINGS, max_tokens=1500, quiet=False)
    train(backbone("mistral"), tokenizer, find_source(corpus), CONFIG, settings, tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert sum("of 1,500 tokens; mamba: loss" in line for line in lines) >= 2
    stages = ("measuring depth", "measuring the drift penalty", "measuring decoded text")
    assert [line for line in lines if line.endswith(" …")] == [f"{name} …" for name in stages]
    for name in stages:  # without a pause every step is a line
        steps = [line.removeprefix(f"{name}: ").split(" of ") for line in lines if line.startswith(f"{name}: ")]
        done, totals = [int(step) for step, _ in steps], {int(total) for _, total in steps}
        assert done == list(range(1, len(done) + 1)) and len(done) >= 4
        assert len(totals) == 1 and len(done) <= totals.pop()


def test_a_pause_lies_between_two_lines_of_a_stage(capsys, monkeypatch) -> None:
    moments = iter([0.0, 0.0, 29.0, 31.0, 31.0, 60.0, 62.0, 62.0])
    monkeypatch.setattr("dynamax_llm.progress.time.monotonic", lambda: next(moments))
    with TokenBar(10, 0, quiet=False) as bar:
        advance = bar.stage("weighing")
        for step in (1, 2, 3, 4):  # after 29, 31, 60 and 62 seconds
            advance(step, 1000)
    assert capsys.readouterr().err.splitlines() == ["weighing …", "weighing: 2 of 1,000", "weighing: 4 of 1,000"]


def test_a_terminal_has_a_bar_for_every_stage(monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with TokenBar(100, 0, quiet=False) as bar:
        bar.show(100, lambda: ("mamba", "loss 0.5"))
        bar.stage("measuring depth")(3, 12)
        halfway = [(task.description, task.completed, task.total) for task in bar._progress.tasks]
        bar.stage("measuring decoded text")
    ended = [(task.description, task.completed, task.total) for task in bar._progress.tasks]
    assert halfway == [("mamba", 100, 100), ("measuring depth", 3, 12)]
    assert ended == [("mamba", 100, 100), ("measuring depth", 12, 12), ("measuring decoded text", 1, 1)]


class RandomLens:
    """A learner from outside: its lens is random, and it counts its steps."""

    made: list[RandomLens] = []

    def __init__(self, backbone, config, settings, group) -> None:
        torch.manual_seed(7)
        self.weights = LensReadout.new_weights(config, backbone.width)
        self.weights.up[0].data.fill_(0.01)
        self.latest, self.progress = [0.5] * len(config.layers), []
        RandomLens.made.append(self)

    def step(self, batch, progress: float) -> None:
        self.progress.append(progress)

    def measure(self, batches) -> list[float]:
        return [float(len(self.progress))] * len(self.latest)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, tensors) -> None:
        assert tensors == {}


class NoHeadLearner(HeadLearner):
    """A learner from outside that leaves its heads as they are."""

    def step(self, exit_batch, sample, progress: float) -> None:
        self.train_loss = 0.25


def test_learners_come_from_outside_by_kind(backbone, corpus: Path, tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(phases.READOUT_LEARNERS._entries, "lens", RandomLens)
    monkeypatch.setattr(phases, "HEAD_LEARNERS", Registry("head learner"))
    phases.HEAD_LEARNERS.register("linear", NoHeadLearner)
    configs = {kind: dataclasses.replace(CONFIG, head=kind, readout="lens") for kind in ("linear", "mlp")}
    result = train_many(backbone("mistral"), tokenizer, find_source(corpus), configs, SETTINGS, tmp_path / "out")
    (learner,) = RandomLens.made
    steps = len(learner.progress)
    assert steps >= 3 and learner.progress == sorted(learner.progress)
    assert learner.progress[0] == 0.0 and learner.progress[-1] < 1.0
    for exits in result.values():
        assert torch.equal(exits.readout_weights.up[0], learner.weights.up[0])
        assert exits.provenance["readout_losses"] == {"before": [0.0] * 3, "after": [float(steps)] * 3}
    assert result["linear"].provenance["train_loss"] == 0.25
    assert int(result["linear"].heads.prior.count_nonzero()) == 0
    assert result["mlp"].provenance["train_loss"] != 0.25


def test_the_phases_of_a_run_in_their_order(backbone, corpus: Path, tokenizer, tmp_path: Path, monkeypatch) -> None:
    steps: list[tuple[str, int]] = []
    original = Phases.step

    def step(self, batch, counters) -> None:
        original(self, batch, counters)
        steps.append((self.current.name, counters.tokens))

    monkeypatch.setattr(Phases, "step", step)
    settings = dataclasses.replace(SETTINGS, on_policy=0.5)
    config = dataclasses.replace(CONFIG, head="linear", readout="lens")
    exits = train(backbone("mistral"), tokenizer, find_source(corpus), config, settings, tmp_path / "out")
    assert list(dict.fromkeys(name for name, _ in steps)) == ["readout", "heads", "heads on policy"]
    begins = {name: min(tokens for phase, tokens in steps if phase == name) for name, _ in steps}
    assert begins["readout"] == 0
    assert begins["heads"] >= 0.3 * 6000 > begins["heads"] - 512
    assert begins["heads on policy"] >= 0.65 * 6000 > begins["heads on policy"] - 512
    flags = [report["on_policy"] for report in exits.provenance["history"]]
    assert flags == sorted(flags) and flags.count(True) >= 2
