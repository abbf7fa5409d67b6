"""Blocks and drafts learn: losses, resumption, vocabularies, an untouched backbone, labels that are decoding's."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.errors import UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.registries import BLOCKS
from dynamax_llm.testing import random_ids, tiny_model
from dynamax_llm.text.batches import Batch, find_source
from dynamax_llm.traces.chains import collect_chains
from dynamax_llm.traces.collect import hidden_at
from dynamax_llm.training.blocks import BlockLearner, DraftLearner, TrainedLearner
from dynamax_llm.training.phases import Phases
from dynamax_llm.training.settings import TrainSettings
from dynamax_llm.training.trainer import train, train_many
from dynamax_llm.training.warm_start import start_from_last_layer
from tests.drafting import SIZES, draft_exits
from tests.training.conftest import ByteTokenizer, sentences, write_jsonl

SETTINGS = TrainSettings(
    max_tokens=6000,
    sequence=48,
    batch_tokens=480,
    eval_tokens=480,
    eval_every=3000,
    held_out=0.2,
    checkpoint_seconds=0.0,
    block_lr=3e-3,
    quiet=True,
)
KINDS = pytest.mark.parametrize("block", ["transformer", "mamba"])
READOUTS = pytest.mark.parametrize("readout", ["block", "draft"])


def config(readout: str, block: str, vocabulary: int = 40) -> ExitConfig:
    options = {"head": "mlp", "readout": readout, "block": block, "vocabulary": vocabulary, **SIZES}
    return ExitConfig.from_options((1, 2), 3, **options)


def backbone_of(family: str = "llama"):
    return adapt(tiny_model(family, layers=3, seed=1))


def learner_of(readout: str, block: str, backbone, vocabulary: int = 40) -> TrainedLearner:
    kind = {"block": BlockLearner, "draft": DraftLearner}[readout]
    made = config(readout, block, vocabulary)
    if readout == "draft":
        made = dataclasses.replace(made, readout_options=dataclasses.replace(made.readout_options, taps=(1, 3)))
    return kind(backbone, made, SETTINGS)


def batch(seed: int = 0, rows: int = 6, count: int = 40) -> Batch:
    mask = torch.ones(rows, count, dtype=torch.bool)
    mask[1, 30:], mask[2, 5:] = False, False
    return Batch(random_ids(rows, count, seed=seed) * mask, mask)


@KINDS
@READOUTS
@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_the_loss_falls_and_the_backbone_stays(readout: str, block: str, family: str) -> None:
    backbone = backbone_of(family)
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    learner = learner_of(readout, block, backbone)
    learner.prepare([batch()])
    held = [batch()]
    first = learner.measure(held)
    assert learner.measure(held) == first  # measuring draws the same positions every time
    for step in range(30):
        learner.step(batch(), step / 30)
    last = learner.measure(held)
    assert len(last) == (2 if readout == "block" else 3)
    assert all(after < 0.8 * earlier for earlier, after in zip(first, last, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in backbone.model.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


@READOUTS
def test_every_weight_learns(readout: str) -> None:
    learner = learner_of(readout, "transformer", backbone_of())
    before = {name: value.clone() for name, value in learner.weights.named_parameters()}
    learner.prepare([batch()])
    for progress in (0.2, 0.3, 0.4):
        learner.step(batch(), progress)
    for name, value in learner.weights.named_parameters():
        assert not torch.equal(value, before[name]), name


def test_the_vocabulary_is_the_most_frequent_tokens_of_the_answers() -> None:
    ids = torch.tensor([[9, 9, 9, 9, 9, 7, 3, 3, 5, 5, 5, 8, 8, 2, 60, 60]])
    mask, answers = torch.ones_like(ids).bool(), torch.zeros_like(ids).bool()
    answers[0, 5:15] = True  # those whose next token is one: 3 3 5 5 5 8 8 2 60 60
    learner = learner_of("block", "mamba", backbone_of(), vocabulary=5)
    learner.prepare([Batch(ids, mask, answers)])
    assert learner.weights.tokens.tolist() == [2, 3, 5, 8, 60]
    assert learner.readout.vocabulary.tolist() == [2, 3, 5, 8, 60]
    learner.prepare([Batch(ids, mask)])  # of plain text, its tokens; of equally frequent ones the lower ids
    assert learner.weights.tokens.tolist() == [3, 5, 8, 9, 60]
    whole = learner_of("block", "mamba", backbone_of(), vocabulary=0)
    whole.prepare([Batch(ids, mask)])
    assert whole.weights.tokens is None and whole.readout.vocabulary is None


@KINDS
def test_only_answers_count(block: str) -> None:
    """What stands before an answer is read and not learned: other tokens there change the loss, their labels do not."""
    backbone, one = backbone_of(), batch()
    learner = learner_of("draft", block, backbone)
    answers = torch.zeros_like(one.mask)
    assert learner.measure([dataclasses.replace(one, answers=answers)]) == [0.0, 0.0, 0.0]
    answers[0, 20:] = True
    few = learner.measure([dataclasses.replace(one, answers=answers)])
    alone = learner.measure([dataclasses.replace(one.rows(slice(0, 1)), answers=answers[:1])])
    assert few == pytest.approx(alone, rel=1e-4) and min(few) > 0


@KINDS
def test_warm_start_copies_the_last_layer_where_forms_agree(block: str) -> None:
    backbone = backbone_of("llama")
    fitted = BLOCKS[block]
    options = config("block", block).readout_options
    shape = dataclasses.replace(
        options, block_heads=6, block_kv_heads=2, block_head_width=10, block_inner=52, block_window=64
    ).shape(backbone.width)
    made = fitted(shape)
    assert start_from_last_layer(made, backbone) == (block == "transformer")
    if block == "transformer":  # it then computes what the layer does
        hidden = hidden_at(backbone, (2,), random_ids(2, 30))
        found, _ = made(hidden[2], made.initial_state(2, "cpu"))
        torch.testing.assert_close(found, hidden[3], atol=1e-3, rtol=1e-3)
        assert not start_from_last_layer(fitted(options.shape(backbone.width)), backbone)  # of other sizes


@KINDS
@pytest.mark.parametrize("vocabulary", [0, 30])
def test_labels_of_chains_are_what_decoding_gives(block: str, vocabulary: int) -> None:
    """On the model's own text a chain's accepted proposals are those that ``verify`` accepts from the same place."""
    backbone = backbone_of()
    exits = draft_exits(backbone, block, vocabulary, seed=3)
    readout, steps, prompt = exits.readout(backbone), 4, 7
    learner_free = {"do_sample": False, "eos_token_id": None}
    text = backbone.model.generate(random_ids(2, prompt, seed=5), max_new_tokens=40, **learner_free)
    with torch.no_grad():  # an embedding that tells the next token: some proposals become right
        readout.weights.join[:, : backbone.width] *= 3.0
    found = collect_chains(backbone, readout, Batch(text, torch.ones_like(text).bool()), steps)
    forks = readout.weights.block.forks(text.shape[1] - steps + 1, 4, torch.Generator().manual_seed(0))
    agreed, reached = (part.unflatten(1, (-1, steps)) for part in (found.labels[0], found.mask))
    early = EarlyExit(exits, measure="softmax_max", threshold=0.0, policy="verify", window=steps + 1)
    compared = accepted = 0
    for number, place in enumerate(forks.tolist()):
        if place < prompt:
            continue
        for row in range(2):
            # The chain after a full-depth token: the prompt ends before it, so that the first new token is it.
            out = backbone.model.generate(
                text[[row], :place], custom_generate=early, max_new_tokens=steps + 2, **learner_free
            )
            kept = 0
            for left in out.trace.exit_index[0, 1:].tolist():
                if left:
                    break
                kept += 1
            chain = (agreed & reached)[row, number].long().cumprod(0)
            assert int(chain.sum()) == min(kept, steps), (row, place)
            assert bool(reached[row, number, 0])
            compared, accepted = compared + 1, accepted + int(chain.sum())
    assert compared >= 4


def test_a_mask_of_chains_is_what_decoding_would_reach() -> None:
    """A step counts while every proposal before it was the text's token; on a text of repeats that is often so."""
    backbone = backbone_of()
    exits = draft_exits(backbone, "transformer", 0, seed=3)
    readout, one = exits.readout(backbone), batch(seed=4)
    target, steps = {}, 3
    original = readout.scores

    def scores(exit, moved):  # proposes the text's token at even places, and another at odd ones
        out = original(exit, moved)
        forks = readout.weights.block.forks(40 - steps + 1, 4, torch.Generator().manual_seed(0))
        positions = forks + len(target)
        target[len(target)] = positions
        following = one.ids[:, (positions + 1).clamp(max=39)]
        wrong = (positions % 2 == 1).long().unsqueeze(0)
        return out.scatter(-1, ((following + wrong) % 61).unsqueeze(-1), 100.0)

    readout.scores = scores
    found = collect_chains(backbone, readout, one, steps)
    mask = found.mask.unflatten(1, (-1, steps))
    for number, place in enumerate(target[0].tolist()):
        for row in range(6):
            real = [bool(one.mask[row, place + step]) for step in range(steps)]
            right = [(place + step) % 2 == 0 and place + step + 1 < 40 for step in range(steps)]
            expected = [all(right[:step]) and all(real[: step + 1]) for step in range(steps)]
            assert mask[row, number].tolist() == expected
    assert mask[..., 1].any() and not mask[..., 2].any()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", sentences(200))


CONFIGS = {"block": config("block", "mamba"), "draft": config("draft", "transformer")}


def test_a_killed_run_of_both_ends_like_an_unbroken_one(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    def run(out: str) -> dict[str, Exits]:
        return train_many(backbone_of(), ByteTokenizer(), find_source(corpus), CONFIGS, SETTINGS, tmp_path / out)

    whole = run("a")
    original = Phases.step

    class Killed(BaseException):
        pass

    for steps in (3, 11, 13):  # in the readouts' phase, after it, and among the heads
        with monkeypatch.context() as patch:

            def step(self, batch, counters, steps=steps) -> None:
                if counters.steps == steps:
                    raise Killed
                original(self, batch, counters)

            patch.setattr(Phases, "step", step)
            with pytest.raises(Killed):
                run("b")
            assert not list((tmp_path / "b").glob("*/exits*"))  # nothing half-written
    resumed = run("b")
    for name, exits in whole.items():
        for key in ("tokens", "steps", "train_loss", "history", "readout_losses"):
            assert resumed[name].provenance[key] == exits.provenance[key], key
        for part in ("heads", "readout_weights"):
            found = getattr(resumed[name], part).state_dict()
            for key, value in getattr(exits, part).state_dict().items():
                assert torch.equal(found[key], value), (name, key)
        losses = exits.provenance["readout_losses"]
        assert all(after < earlier for earlier, after in zip(losses["before"], losses["after"], strict=True))
        loaded = Exits.from_pretrained(tmp_path / "b" / name)
        assert torch.equal(loaded.readout_weights.tokens, exits.readout_weights.tokens)
        assert len(loaded.readout_weights.tokens) == 40
    assert len(whole["draft"].provenance["chains"]["match"]) > 1
    assert whole["draft"].drift_penalty == {} and set(whole["block"].drift_penalty) == {"propagate"}


def test_what_a_draft_cannot_be_trained_with_is_refused(corpus: Path, tmp_path: Path) -> None:
    def refused(match: str, settings: TrainSettings = SETTINGS, made: ExitConfig = CONFIGS["draft"]) -> None:
        with pytest.raises(UsageError, match=match):
            train(backbone_of(), ByteTokenizer(), find_source(corpus), made, settings, tmp_path / "out")
        assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]

    refused(r"on_policy 0\.5: a draft leaves no state behind.*Leave it out", replace(SETTINGS, on_policy=0.5))
    refused(r"the readout 'draft' learns from its share.*documents", replace(SETTINGS, documents=10))
    refused(r"vocabulary 62: this model has 61 tokens", made=config("draft", "mamba", 62))
    refused(r"vocabulary 62: this model has 61 tokens", made=config("block", "mamba", 62))
