"""Training: what later exits see, resumption after a kill, early stop, and a backbone left as it was."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dynamax_llm.backbones import adapt
from dynamax_llm.errors import ArtifactCorruptError, UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.confidence.measures import measure
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.features import STATISTICS, ExitFeatures
from dynamax_llm.exits.registries import HEADS
from dynamax_llm.testing import tiny_model
from dynamax_llm.text.batches import find_source
from dynamax_llm.traces.collect import ExitBatch
from dynamax_llm.traces.simulate import NEVER, ThresholdSample, simulate_exits
from dynamax_llm.training import phases
from dynamax_llm.training.held_out import HeldOut, apply_threshold, on_policy
from dynamax_llm.training.learner import Balance, loss, tally
from dynamax_llm.training.multi_exit import depth_weights
from dynamax_llm.training.optimiser import learning_rate
from dynamax_llm.training.phases import Phases
from dynamax_llm.training.settings import TrainSettings
from dynamax_llm.training.trainer import train, train_many
from tests.training.conftest import ByteTokenizer, sentences, write_jsonl

CONFIG = ExitConfig(layers=(2, 3, 4), n_layers=5, head="mamba")
SETTINGS = TrainSettings(
    max_tokens=6000,
    sequence=64,
    batch_tokens=512,
    eval_tokens=600,
    eval_every=2000,
    held_out=0.2,
    checkpoint_seconds=0.0,
    quiet=True,
)


def made_up(batch: int = 3, count: int = 9, width: int = 12, exits: int = 3) -> ExitBatch:
    mask = torch.ones(batch, count, dtype=torch.bool)
    mask[1, 6:] = False
    features = tuple(
        ExitFeatures(torch.rand(batch, count, len(STATISTICS)), torch.randint(0, 9, (batch, count)))
        for _ in range(exits)
    )
    hidden = tuple(torch.randn(batch, count, width) for _ in range(exits))
    labels = torch.rand(exits, batch, count) < 0.6
    return ExitBatch(mask, hidden, features, labels, torch.zeros(batch, count).long(), labels.float())


def heads_for(kind: str, width: int = 12) -> ExitHeads:
    heads = ExitHeads(dataclasses.replace(CONFIG, head=kind, inputs=("hidden", "signals"), width=None), width)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return heads.requires_grad_(False)


@pytest.mark.parametrize("kind", HEADS)
def test_training_sees_what_decoding_sees(kind: str) -> None:
    """The parallel simulation against decoding's protocol: one token at a time, confidence then advance."""
    heads, exit_batch = heads_for(kind), made_up()
    draw = ThresholdSample(torch.tensor([[0.5], [0.45], [NEVER]]), torch.tensor([[0], [2], [0]]))
    found = simulate_exits(heads, exit_batch, draw)
    for row in range(3):
        states = heads.initial_state(1)
        for token in range(int(exit_batch.mask[row].sum())):
            here = (slice(row, row + 1), slice(token, token + 1))
            left = 3
            for exit in range(3):
                h = exit_batch.hidden[exit][here]
                features = ExitFeatures(exit_batch.features[exit].values[here], exit_batch.features[exit].token[here])
                confidence, state = heads.confidence(exit, h, features, states[exit] if states else None)
                if states:
                    states = [*states[:exit], state, *states[exit + 1 :]]
                assert float(confidence) == pytest.approx(float(found.confidence[exit, row, token]), abs=1e-5)
                assert bool(found.reached[exit, row, token])
                if token >= int(draw.start[row]) and float(confidence) >= float(draw.threshold[row]):
                    states, left = heads.advance(exit + 1, h, features, states), exit
                    break
            assert int(found.exit_index[row, token]) == left
            assert not bool(found.reached[left + 1 :, row, token].any())
    assert {int(index) for index in found.exit_index[:2][exit_batch.mask[:2]]} > {3}
    assert bool((found.exit_index[2] == 3).all())


def test_loss_counts_only_tokens_that_reach_an_exit() -> None:
    exit_batch, heads = made_up(), heads_for("mlp")
    step = simulate_exits(heads, exit_batch, ThresholdSample.fixed(3, 0.5))
    balance = Balance(3)
    balance.add(tally(exit_batch.targets, step.reached))
    weights = balance.weights()
    expected = 0.0
    for exit in range(3):
        reached = step.reached[exit]
        p = torch.sigmoid(step.logits[exit][reached]).double()
        label = exit_batch.labels[exit][reached]
        losses = torch.where(label, -p.log() * weights[1, exit], -(1 - p).log() * weights[0, exit])
        expected += depth_weights(range(1, 4))[exit] * float(losses.mean())
    assert float(loss(step, exit_batch.targets, weights)) == pytest.approx(expected, abs=1e-5)
    assert depth_weights(range(1, 4)) == pytest.approx([1 / 6, 2 / 6, 3 / 6])


def test_classes_weigh_the_same_and_the_prior_is_their_log_odds() -> None:
    balance = Balance(1)
    labels = torch.tensor([True] * 6 + [False] * 2).view(1, 1, 8)
    balance.add(tally(labels.float(), torch.ones(1, 1, 8, dtype=torch.bool)))
    disagree, agree = (3.0, 7.0)  # one of each to begin with
    assert balance.counts[:, 0].tolist() == [disagree, agree]
    assert float(balance.weights()[0, 0]) * disagree == pytest.approx(float(balance.weights()[1, 0]) * agree)
    assert float(torch.sigmoid(balance.prior()[0])) == pytest.approx(agree / (agree + disagree))


def test_draws_are_reproducible_and_mixed() -> None:
    draws = [ThresholdSample.sample(torch.ones(600, 50), 1 / 3, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(draws[0].threshold, draws[1].threshold)
    assert float((draws[0].threshold == NEVER).float().mean()) == pytest.approx(1 / 3, abs=0.06)
    assert float((draws[0].start == 0).float().mean()) == pytest.approx(0.5, abs=0.07)
    assert int(draws[0].start.max()) < 50


def test_learning_rate_rises_then_falls_to_nothing() -> None:
    rates = [learning_rate(progress / 100, 1.0, 0.1) for progress in range(101)]
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 10
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)


def test_on_policy_depth_of_a_measure_is_the_sweeps() -> None:
    exit_batches = [made_up() for _ in range(3)]
    held = HeldOut([], lambda batch: batch)
    held._kept = exit_batches
    estimator = measure("softmax_margin")
    depth, agreement = apply_threshold(estimator, held, CONFIG, 0.6)
    depths = torch.tensor([2, 3, 4, 5]).double() / 5
    count = total = agreed = 0
    for one in exit_batches:
        for row, token in one.mask.nonzero().tolist():
            margins = [float(item.values[row, token, STATISTICS.index("margin")]) for item in one.features]
            left = next((exit for exit, margin in enumerate(margins) if margin >= 0.6), 3)
            total, count = total + float(depths[left]), count + 1
            agreed += 1 if left == 3 else int(one.labels[left, row, token])
    assert (depth, agreement) == pytest.approx((total / count, agreed / count))
    found = on_policy(estimator, held, CONFIG, 0.9)
    assert found["agreement"] >= 0.9
    assert found["depth"] <= 1.0


@pytest.mark.parametrize("readout", ["head", "tail", "lens"])
def test_heads_share_a_pass_and_differ(backbone, corpus: Path, tokenizer, tmp_path: Path, readout: str) -> None:
    adapter = backbone("mistral")
    before = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in adapter.model.parameters()]
    configs = {kind: dataclasses.replace(CONFIG, head=kind, readout=readout) for kind in HEADS}
    result = train_many(adapter, tokenizer, find_source(corpus), configs, SETTINGS, tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in adapter.model.state_dict().items())
    assert [parameter.requires_grad for parameter in adapter.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in adapter.model.parameters())
    for kind, exits in result.items():
        provenance = exits.provenance
        assert provenance["tokens"] >= SETTINGS.max_tokens
        assert len(provenance["history"]) >= 2
        assert provenance["held_out"]["tokens"] >= 600
        assert 0 < provenance["held_out"]["depth"] <= 1
        assert provenance["held_out"]["oracle_depth"] <= 1
        json.dumps(provenance, allow_nan=False)
        loaded = Exits.from_pretrained(tmp_path / "out" / kind)
        for (name, saved), found in zip(
            exits.heads.state_dict().items(), loaded.heads.state_dict().values(), strict=True
        ):
            assert torch.equal(saved, found), name
        for parameter in loaded.heads.bank.parameters():
            assert all(not torch.equal(parameter[0], parameter[other]) for other in (1, 2))
        assert (exits.readout_weights is not None) == (readout == "lens")
    if readout == "lens":
        divergence = provenance["readout_losses"]
        assert all(after < earlier for earlier, after in zip(divergence["before"], divergence["after"], strict=True))


def test_training_lowers_the_loss(backbone, corpus: Path, tokenizer, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, max_tokens=40_000, eval_every=10_000)
    exits = train(backbone("mistral"), tokenizer, find_source(corpus), CONFIG, settings, tmp_path / "out")
    assert exits.provenance["held_out"]["loss"] < 0.95 * 0.6931  # a constant scores log 2 when classes balance
    assert min(exits.provenance["held_out"]["auroc"]) > 0.6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """One text for all runs here, so that they can be compared."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", sentences(200))


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory) -> Callable[[str, str], Path]:
    """The folder of a finished run of CONFIG with a readout on a family; made once, to be read or copied."""

    @functools.cache
    def run(family: str = "mistral", readout: str = "head") -> Path:
        config, out = dataclasses.replace(CONFIG, readout=readout), tmp_path_factory.mktemp("unbroken") / "out"
        torch.manual_seed(0)
        train(adapt(tiny_model(family)), ByteTokenizer(), find_source(corpus), config, SETTINGS, out)
        return out

    return run


def run_until(monkeypatch, steps: int, *arguments) -> None:
    """A run that dies in its step number ``steps``, after the last checkpoint, as a kill would have it."""
    original = Phases.step

    class Killed(BaseException):
        pass

    def step(self, batch, counters) -> None:
        if counters.steps == steps:
            raise Killed
        original(self, batch, counters)

    with monkeypatch.context() as patch:
        patch.setattr(Phases, "step", step)
        with pytest.raises(Killed):
            train(*arguments)


@pytest.mark.parametrize("readout", ["head", "lens"])
@pytest.mark.parametrize("family", ["mistral", "mamba2"])
def test_a_killed_run_ends_like_an_unbroken_one(
    backbone, corpus: Path, tokenizer, tmp_path: Path, monkeypatch, readout: str, family: str, unbroken
) -> None:
    config = dataclasses.replace(CONFIG, readout=readout)
    common = (backbone(family), tokenizer, find_source(corpus), config, SETTINGS)
    whole = Exits.from_pretrained(unbroken(family, readout))
    for steps in (1, 3, 9):
        run_until(monkeypatch, steps, *common, tmp_path / "b")
    resumed = train(*common, tmp_path / "b")
    for key in ("tokens", "steps", "train_loss", "history", "held_out", "readout_losses"):
        assert resumed.provenance[key] == whole.provenance[key], key
    for name, value in whole.heads.state_dict().items():
        assert torch.equal(resumed.heads.state_dict()[name], value), name
    repeated = train(*common, tmp_path / "b")  # finished: nothing is left to do
    assert repeated.provenance == resumed.provenance


def test_sigkill_and_the_same_command(backbone, corpus: Path, tokenizer, tmp_path: Path, unbroken) -> None:
    script = textwrap.dedent(
        """
        import os, signal, sys
        import torch
        from tests.training.conftest import ByteTokenizer
        from tests.training.test_trainer import CONFIG, SETTINGS
        from dynamax_llm.backbones import adapt
        from dynamax_llm.testing import tiny_model
        from dynamax_llm.training.phases import Phases
        from dynamax_llm.training.trainer import train
        from dynamax_llm.text.batches import Split, find_source, first_batches

        torch.set_num_threads(1)
        original = Phases.step
        def step(self, batch, counters):
            if counters.steps == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            original(self, batch, counters)
        Phases.step = step
        source = find_source(sys.argv[1])
        train(adapt(tiny_model("mistral")), ByteTokenizer(), source, CONFIG, SETTINGS, sys.argv[2])
        """
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'src'}"}
    arguments = [sys.executable, "-c", script, str(corpus), str(tmp_path / "a")]
    killed = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = train(backbone("mistral"), tokenizer, find_source(str(corpus)), CONFIG, SETTINGS, tmp_path / "a")
    whole = Exits.from_pretrained(unbroken())
    for key in ("tokens", "steps"):
        assert resumed.provenance[key] == whole.provenance[key]
    assert resumed.provenance["train_loss"] == pytest.approx(whole.provenance["train_loss"], abs=1e-3)
    assert resumed.provenance["held_out"]["loss"] == pytest.approx(whole.provenance["held_out"]["loss"], abs=1e-3)


def test_another_run_in_the_same_folder_is_refused(backbone, corpus: Path, tokenizer, tmp_path: Path, unbroken) -> None:
    adapter, source, out = backbone("mistral"), find_source(corpus), tmp_path / "out"
    shutil.copytree(unbroken(), out)
    with pytest.raises(UsageError, match=r"holds another training run: lr is 0\.5 here, and was .*`out`.*delete"):
        train(adapter, tokenizer, source, CONFIG, dataclasses.replace(SETTINGS, lr=0.5), out)
    with pytest.raises(UsageError, match=r"head is 'mlp' here, and was 'mamba'"):
        train(adapter, tokenizer, source, dataclasses.replace(CONFIG, head="mlp"), SETTINGS, out)
    with pytest.raises(UsageError, match=r"model type is llama, not mistral"):
        train(backbone("llama"), tokenizer, source, CONFIG, SETTINGS, out)
    hurried = dataclasses.replace(SETTINGS, checkpoint_seconds=9.0, quiet=False)
    train(adapter, tokenizer, source, CONFIG, hurried, out)  # these decide nothing


def test_a_damaged_checkpoint_is_named(backbone, corpus: Path, tokenizer, tmp_path: Path, unbroken) -> None:
    arguments = (backbone("mistral"), tokenizer, find_source(corpus), CONFIG, SETTINGS, tmp_path / "out")
    shutil.copytree(unbroken(), tmp_path / "out")
    path = tmp_path / "out" / ".checkpoint" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactCorruptError, match=r"state\.safetensors cannot be read.*Delete .*\.checkpoint"):
        train(*arguments)


def test_a_head_that_no_longer_improves_stops_with_its_best_weights(
    backbone, corpus: Path, tokenizer, tmp_path: Path, monkeypatch
) -> None:
    losses = iter([0.6, 0.5, 0.7, 0.8, 0.4])
    snapshots = []

    def evaluate(estimators, *rest):
        snapshots.append({name: value.clone() for name, value in estimators[""].state_dict().items()})
        return {"": {"loss": next(losses), "depth": 1.0, "threshold": 1.0}}

    monkeypatch.setattr(phases, "evaluate", evaluate)
    settings = dataclasses.replace(SETTINGS, max_tokens=60_000, eval_every=1000, patience=2)
    exits = train(backbone("mistral"), tokenizer, find_source(corpus), CONFIG, settings, tmp_path / "out")
    assert len(snapshots) == 4
    assert exits.provenance["tokens"] < 8000
    assert exits.provenance["held_out"]["loss"] == 0.5
    assert all(torch.equal(value, snapshots[1][name]) for name, value in exits.heads.state_dict().items())


def test_the_budget_may_exceed_the_data(backbone, corpus: Path, tokenizer, tmp_path: Path) -> None:
    lines = corpus.read_text().splitlines(keepends=True)[:25]
    (tmp_path / "small.jsonl").write_text("".join(lines))
    small = find_source(tmp_path / "small.jsonl")
    exits = train(backbone("mistral"), tokenizer, small, CONFIG, SETTINGS, tmp_path / "out")
    size = sum(len(line) for line in lines)
    assert exits.provenance["tokens"] >= SETTINGS.max_tokens
    assert size < 2 * SETTINGS.max_tokens


def test_configurations_that_cannot_share_are_refused(backbone, corpus: Path, tokenizer, tmp_path: Path) -> None:
    arguments = (backbone("mistral"), tokenizer, find_source(corpus))
    other = {"a": CONFIG, "b": dataclasses.replace(CONFIG, layers=(1, 2, 3))}
    with pytest.raises(UsageError, match=r"exits 'b' have layers \(1, 2, 3\), others \(2, 3, 4\)"):
        train_many(*arguments, other, SETTINGS, tmp_path / "out")
    with pytest.raises(UsageError, match=r"head None, nothing to train\. Name a head: linear"):
        train(*arguments, dataclasses.replace(CONFIG, head=None), SETTINGS, tmp_path / "none")
    with pytest.raises(UsageError, match="give at least one"):
        train_many(*arguments, {}, SETTINGS, tmp_path / "empty")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_tokens", 0), ("lr", 0.0), ("held_out", 1.0), ("no_exit_share", 1.5), ("batch_tokens", 8), ("patience", 0)],
)
def test_settings_out_of_bounds_are_named(setting: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"training setting {setting} = {value!r}: give "):
        TrainSettings(**{setting: value})


def test_the_drift_penalty_is_measured_where_confidence_is_about_agreement(
    backbone, corpus, tokenizer, tmp_path
) -> None:
    for label, policies in (("action", ["propagate"]), ("topk", [])):
        config = dataclasses.replace(CONFIG, head="linear")
        settings = dataclasses.replace(SETTINGS, max_tokens=600, label=label)
        made = train(backbone("mistral"), tokenizer, find_source(corpus), config, settings, tmp_path / label)
        assert list(made.drift_penalty) == policies
        assert all(len(values) == 3 for values in made.drift_penalty.values())
