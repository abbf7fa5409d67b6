"""Chains of a draft: recorded by decoding, costs, the rule that chooses, and what is kept with the exits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dynamax_llm import api
from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.decoding import EarlyExit, chain_costs
from dynamax_llm.decoding.chain_costs import measure_costs
from dynamax_llm.decoding.draft_choice import ChainCosts, DraftChoice, keep_choice, kept_choices, nearest, setting
from dynamax_llm.errors import ArtifactCorruptError, UsageError
from dynamax_llm.evaluation.bench.exits.modes import modes
from dynamax_llm.evaluation.bench.exits.settings import ExitBenchSettings
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.registries import READOUTS
from dynamax_llm.testing import random_ids, tiny_model
from dynamax_llm.text.batches import Batch, find_source
from dynamax_llm.traces import chain_choice
from dynamax_llm.traces.chain_choice import chain_facts, choose, prompts_of, record, recorded
from dynamax_llm.traces.chain_trace import ChainTrace, best_threshold, record_chains
from dynamax_llm.training.settings import TrainSettings
from dynamax_llm.training.trainer import train_many

#: A draft step, and passes over 1 to 5 tokens.
COSTS = ChainCosts(draft=0.1, passes=(1.0, 1.1, 1.2, 2.4, 2.6), step_seconds=0.01)


def draft(backbone: Backbone) -> Exits:
    """An untrained draft that speaks every token."""
    config = ExitConfig.from_options((0,), backbone.n_layers, readout="draft", vocabulary=0, head="mlp")
    kind = READOUTS["draft"]
    config = kind.fitted(config, backbone)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads, weights = ExitHeads(config, backbone.width), kind.new_weights(config, backbone.width)
    return Exits.of(backbone, config, heads.requires_grad_(False).eval(), weights.requires_grad_(False).eval())


@pytest.fixture(autouse=True)
def few_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_choice, "CHAINS", 20)
    monkeypatch.setattr(chain_choice, "REPEATS", 1)


@pytest.fixture
def tiny() -> tuple[Backbone, Exits]:
    backbone = adapt(tiny_model("mistral"))
    backbone.model.generation_config.eos_token_id = None
    return backbone, draft(backbone)


def choice(**changes: object) -> DraftChoice:
    values = {"device": "cpu", "engine": "eager", "dtype": "float32", "threads": 1, "batch_size": 1, "costs": COSTS}
    estimated = {"threshold": 0.4, "window": 3, "tokens": 1.8, "proposals": 1.5, "speed_up": 1.3}
    return DraftChoice(**{**values, **estimated, **changes})


def test_the_trace_counts_what_decoding_accepted(tiny: tuple[Backbone, Exits]) -> None:
    backbone, exits = tiny
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (5, 9, 7)]
    trace = record_chains(backbone, exits, prompts, chains=1000, window=4, new_tokens=20, rows=2)
    early = EarlyExit(exits, threshold=0.0, window=4, adaptive=False)
    made, accepted = [], []
    for ids in prompts:
        request = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones(1, len(ids))}
        out = backbone.model.generate(torch.tensor([ids]), custom_generate=early, **request)
        made += [window.proposed[0] for window in out.verification.rounds]
        accepted += [window.accepted[0] for window in out.verification.rounds]
    assert sorted(trace.made.tolist()) == sorted(made) and max(made) == 3
    assert sorted(trace.accepted.tolist()) == sorted(accepted)
    assert len(trace) == len(made) > 3
    assert ((trace.confidence > 0) == (torch.arange(3) < trace.made.unsqueeze(1))).all()
    again = ChainTrace.from_json(trace.to_json())
    assert (again.confidence - trace.confidence).abs().max() <= 5e-4
    assert again.accepted.tolist() == trace.accepted.tolist() and again.made.tolist() == trace.made.tolist()


def test_match_and_outcome_by_hand() -> None:
    trace = ChainTrace.of([[0.9, 0.8, 0.5], [0.4, 0.9, 0.9], [0.9, 0.9], [0.2]], [2, 0, 2, 0])
    assert trace.match == pytest.approx([2 / 4, 2 / 2, 0 / 1])
    assert trace.lengths(0.5, 3).tolist() == [3, 1, 2, 1]
    assert trace.lengths(0.0, 2).tolist() == [2, 2, 2, 1]
    tokens, shares = trace.outcome(0.5, 3)
    assert tokens == 1 + (2 + 0 + 2 + 0) / 4 and shares.tolist() == [0.5, 0.25, 0.25]


def test_the_rule_weighs_gain_against_cost() -> None:
    sure = ChainTrace.of([[0.9] * 4] * 9 + [[0.3] * 4], [4] * 9 + [0])
    found = best_threshold(sure, COSTS)
    expected = max((1 + 0.9 * count) / (0.9 * COSTS.window(count) + 0.1 * COSTS.window(1)) for count in range(1, 5))
    assert found.speed_up == pytest.approx(expected) and found.speed_up > 1.5
    assert found.threshold > 0.3 and found.proposals == pytest.approx(1.9)  # a third makes the pass twice as dear
    flat = best_threshold(sure, ChainCosts(draft=0.1, passes=(1.0,) * 5))
    assert flat.window == 5 and flat.tokens == pytest.approx(4.6)
    wrong = best_threshold(ChainTrace.of([[0.5] * 4] * 5, [0] * 5), COSTS)
    assert wrong.speed_up == pytest.approx(1 / COSTS.window(1)) and not wrong.kept(choice().setting, COSTS).pays


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", ["mistral", "mamba2"])
def test_costs_are_in_full_steps(family: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With readings of a layer in place of seconds: a draft step reads none, a verification all of them once."""

    def layers_read(clock, call: Callable[[], None]) -> float:
        before = sum(session.stats().passes for session in clock.sessions)
        call()
        return float(sum(session.stats().passes for session in clock.sessions) - before)

    monkeypatch.setattr(chain_costs._Clock, "_seconds", layers_read)
    backbone = adapt(tiny_model(family))
    costs, where = measure_costs(backbone, draft(backbone), rows, window=4, repeats=2)
    assert where == setting(torch.device("cpu"), torch.float32, "eager", rows)
    assert costs == ChainCosts(draft=0.0, passes=(1.0,) * 4, step_seconds=float(backbone.n_layers))


def test_costs_are_measured(tiny: tuple[Backbone, Exits]) -> None:
    costs, _ = measure_costs(*tiny, window=2, repeats=1)
    assert costs.draft > 0 and len(costs.passes) == 2 and min(costs.passes) > 0 and costs.step_seconds > 0


def test_only_a_draft_has_chains(backbone: Callable[[str], Backbone]) -> None:
    model = backbone("mistral")
    with pytest.raises(UsageError, match="no draft"):
        measure_costs(model, Exits.untrained(model, (2,)))
    with pytest.raises(UsageError, match="no draft"):
        recorded(Exits.untrained(model, (2,)))
    with pytest.raises(UsageError, match="no chains are recorded"):
        recorded(draft(model))


def test_choices_are_kept_and_found(tiny: tuple[Backbone, Exits], tmp_path: Path) -> None:
    _, exits = tiny
    for one in (choice(), choice(batch_size=8, threshold=0.6), choice(device="gpu", threads=0), choice(threshold=0.5)):
        keep_choice(exits, one)
    exits.save(tmp_path / "exits")
    kept = kept_choices(Exits.from_pretrained(tmp_path / "exits"))
    assert [one.threshold for one in kept] == [0.6, 0.4, 0.5]
    at = choice().setting
    assert nearest(kept, at) == kept[2]
    assert nearest(kept, at._replace(batch_size=6)) == kept[0]
    assert nearest(kept, at._replace(device="gpu", batch_size=8)) == kept[1]
    assert nearest([], at) is None
    exits.provenance["chains"]["choices"][0]["window"] = 1
    with pytest.raises(ArtifactCorruptError, match=r"chains\.choices"):
        EarlyExit(exits)
    exits.provenance["chains"] = {"trace": {"confidence": [[2000]], "accepted": [0]}}
    with pytest.raises(ArtifactCorruptError, match="cannot be used"):
        recorded(exits)


@pytest.mark.parametrize("pays", [True, False])
def test_generation_follows_the_choice(tiny: tuple[Backbone, Exits], pays: bool) -> None:
    backbone, exits = tiny
    here = setting(backbone.device, backbone.dtype, "eager", 2)
    keep_choice(exits, choice(**here._asdict(), threshold=0.0, window=4, speed_up=1.3 if pays else 0.9))
    keep_choice(exits, choice(**here._replace(batch_size=64)._asdict(), threshold=1.0, window=2))
    ids = random_ids(2, 6)
    request = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = backbone.model.generate(ids, **request)
    out = backbone.model.generate(ids, custom_generate=EarlyExit(exits, adaptive=False), **request)
    assert out.sequences.tolist() == expected.tolist()
    if pays:
        assert {window.steps for window in out.verification.rounds} >= {3} and out.trace.policy == "verify"
        assert "estimated 1.30x" in out.drafting and "threshold 0, window 4" in out.drafting
    else:
        assert out.verification.drafted == 0 and "no chain pays" in out.drafting and "full depth" in out.drafting
        assert out.trace.pass_reduction == 0.0
    named = EarlyExit(exits, threshold=0.0, window=3, adaptive=False)
    named_out = backbone.model.generate(ids, custom_generate=named, **request)
    assert max(window.steps for window in named_out.verification.rounds) == 2 and named_out.drafting is None


def test_a_calibrated_draft_is_timed(tiny: tuple[Backbone, Exits]) -> None:
    backbone, exits = tiny
    labels = [mode.label for mode in modes(exits, backbone, ExitBenchSettings())[0]]
    assert "draft as calibrated" not in labels
    keep_choice(exits, choice(speed_up=0.9))
    found, left_out = modes(exits, backbone, ExitBenchSettings())
    assert [mode.label for mode in found] == ["never exit", "draft as calibrated", "verify at 0.9"]
    assert {item.label for item in left_out} == {"propagate at 0.9", "defer at 0.9"}


def test_prompts_end_where_answers_begin() -> None:
    ids = torch.arange(1, 41).repeat(3, 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    answers = torch.zeros_like(mask)
    answers[0, 5:], answers[1, 9:] = True, True
    found = prompts_of([Batch(ids, mask, answers), Batch(ids[:1], mask[:1])])
    assert [len(prompt) for prompt in found] == [6, 10, 32]  # the third row has no answer
    assert len(prompts_of([Batch(ids, mask)] * 10, most=4)) == 4


def test_recording_and_choosing_through_the_api(tiny: tuple[Backbone, Exits], tmp_path: Path) -> None:
    backbone, exits = tiny
    assert record(backbone, exits, [random_ids(1, 6)[0].tolist()])
    facts = chain_facts(exits)
    assert facts["windows"] == len(recorded(exits)) > 10 and len(facts["match"]) == 8
    assert facts["tokens"] == pytest.approx(1 + float(recorded(exits).accepted.double().mean()))
    exits.save(tmp_path / "exits")
    found = api.calibrate_draft(backbone, tmp_path / "exits", batch_size=2)
    assert kept_choices(Exits.from_pretrained(tmp_path / "exits")) == [found] and found.batch_size == 2
    again = replace(exits)
    assert choose(backbone, again).batch_size == 1 and len(again.provenance["chains"]["trace"]["accepted"]) > 10


def test_blocks_and_a_draft_in_one_pass(backbone, tokenizer, corpus: Path, tmp_path: Path) -> None:
    model = backbone("mistral")
    settings = TrainSettings(
        max_tokens=3000,
        sequence=48,
        batch_tokens=384,
        eval_tokens=400,
        held_out=0.2,
        checkpoint_seconds=0.0,
        quiet=True,
    )
    configs = {
        name: ExitConfig.from_options((2,), model.n_layers, readout=name, vocabulary=0, head="mlp")
        for name in ("block", "draft")
    }
    made = train_many(model, tokenizer, find_source(str(corpus)), configs, settings, tmp_path, decode=True)
    assert "decoded" in made["block"].provenance and "chains" not in made["block"].provenance
    saved = Exits.from_pretrained(tmp_path / "draft")
    assert saved.config.layers == (0,) and len(recorded(saved)) <= 500
    assert len(kept_choices(saved)) == 1 and kept_choices(saved)[0].batch_size == 1
