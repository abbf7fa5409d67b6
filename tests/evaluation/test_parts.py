"""The parts of an evaluation: prompts shared, layers pruned, intervals, SQuAD's scores, forced answers, timing."""

from __future__ import annotations

import contextlib
import sys

import numpy as np
import pytest
import torch

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.errors import UsageError
from dynamax_llm.evaluation.common import random_models
from dynamax_llm.evaluation.common.bootstrap import interval, median, weighted
from dynamax_llm.evaluation.common.random_models import zero_tail
from dynamax_llm.evaluation.harness.baselines import pruned
from dynamax_llm.evaluation.harness.forced import Prompted, agreement, confidences, forced
from dynamax_llm.evaluation.harness.patches import single_scores, squad_metrics
from dynamax_llm.evaluation.harness.prompts import KEPT, PromptSharing, SharedPrompts
from dynamax_llm.evaluation.harness.settings import by_head, by_measure, check_ids, full, grid, static
from dynamax_llm.evaluation.harness.settings import pruned as pruned_setting
from dynamax_llm.evaluation.harness.timing import pair
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.testing import TINY, random_ids, tiny_model
from dynamax_llm.traces.teacher_forced import teacher_forced
from tests.evaluation.conftest import heads, subject


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = random_ids(3, 11, vocab=250), torch.ones(3, 11, dtype=torch.int64)
    mask[1, :4] = 0
    return ids, mask


@pytest.mark.parametrize("policy", ["propagate", "defer"])
def test_a_shared_prompt_changes_nothing(policy, family):
    who, (ids, mask), shared = subject(family), prompts(), SharedPrompts()
    run = []
    for threshold in (0.45, 0.5, "never", 0.0, 0.5):
        options = {"threshold": threshold, "policy": policy}
        early = PromptSharing(heads(family), prompts=shared, **options)
        call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "eos_token_id": None}
        found = who.model.generate(**call, custom_generate=early)
        alone = who.model.generate(**call, custom_generate=EarlyExit(heads(family), **options))
        assert torch.equal(found.sequences, alone.sequences)
        assert torch.equal(found.exit_layers, alone.exit_layers)
        run.append(len(shared._kept))
    assert run == [1, 1, 2, 2, 2]  # one that the heads have read, and the plain one


def test_few_prompts_are_kept():
    who, shared = subject("llama"), SharedPrompts()
    for seed in range(KEPT + 2):
        early = PromptSharing(heads("llama"), prompts=shared, threshold=0.5)
        who.model.generate(random_ids(1, 5, seed=seed), custom_generate=early, max_new_tokens=1)
    assert len(shared._kept) == KEPT


@pytest.mark.parametrize("model_type", ["mistral", "mamba2", "qwen2", "bamba", "zamba2"])
def test_a_pruned_model_is_the_backbone_without_some_layers(model_type):
    model = tiny_model(model_type, layers=7)
    ids, backbone = random_ids(2, 9), adapt(model)
    before = model(ids).logits
    short = pruned(model, 2)
    ctx, h = backbone.context(backbone.embed(ids)), backbone.embed(ids)
    for index in (0, 1, 2, 3, 6):
        h = backbone.layer(index, h, None, ctx)
    with torch.no_grad():
        assert torch.allclose(short(ids).logits, backbone.readout(h), atol=1e-5)
        assert torch.equal(model(ids).logits, before)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in short.parameters()} < own
    assert (short.config.num_hidden_layers, model.config.num_hidden_layers) == (5, 7)
    new = short.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert new.shape == (2, 13)  # with a cache whose layers are numbered anew


@pytest.mark.parametrize("model_type", TINY)
def test_a_zero_tail_adds_nothing_and_leaves_the_layers_before(model_type):
    model, ids = tiny_model(model_type), random_ids(2, 7)
    backbone = adapt(model)
    before = [parameter.clone() for parameter in backbone.layers[0].parameters()]
    zero_tail(model, 3)
    ctx, h = backbone.context(backbone.embed(ids)), backbone.embed(ids)
    with torch.no_grad():
        for index in range(3):
            h = backbone.layer(index, h, None, ctx)
        assert torch.allclose(model(ids).logits, backbone.readout(h), atol=1e-5)
    if model_type != "zamba2":  # its attention block is shared by all layers
        assert all(torch.equal(a, b) for a, b in zip(before, backbone.layers[0].parameters(), strict=True))


@pytest.mark.parametrize("model_type", TINY)
def test_a_tail_that_still_adds_something_is_refused_and_unchanged(model_type, monkeypatch):
    """A family that names its projections otherwise."""
    monkeypatch.setattr(random_models, "_OUTPUTS", ("to_residual",))
    model = tiny_model(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError, match=f"'{model_type}' cannot be made to add nothing: layer 4 still changes"):
        zero_tail(model, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_tail_zeroed_in_part_gets_its_weights_back(monkeypatch):
    monkeypatch.setattr(random_models, "_OUTPUTS", ("o_proj",))
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError, match=r"layer 4 still changes its input with o_proj zeroed"):
        zero_tail(model, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_stack_whose_layers_are_told_by_a_rule_is_refused():
    """Jamba's period puts attention at layers 1 and 4 of seven; of layers 0-3 and 6 the last is none, and would be."""
    with pytest.raises(UsageError, match=r"'jamba' cannot be pruned.*`baselines`"):
        pruned(tiny_model("jamba", layers=7), 2)


@pytest.mark.parametrize("removed", [0, 4, -1])
def test_the_first_and_the_last_layer_stay(removed):
    with pytest.raises(UsageError, match=f"pruning {removed} layers of 5.* 1 to 3"):
        pruned(subject("llama").model, removed)


def test_intervals_are_those_of_the_means_distribution():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = interval(values)
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(found.value - half, abs=0.05)
    assert found.high == pytest.approx(found.value + half, abs=0.05)
    assert interval(values) == found  # seeded
    assert interval([1.0, 2.0, 9.0], statistic=median).value == 2.0
    assert interval([4.0]).model_dump() == {"value": 4.0, "low": None, "high": None}


def test_a_ratio_of_totals_weighs_samples_by_their_tokens():
    assert weighted([1.0, 8.0], [2.0, 8.0]).value == pytest.approx(0.9)
    assert weighted([0.0, 0.0], [0.0, 0.0]).value == 0.0
    found = weighted([3.0, 0.0, 1.0], [4.0, 0.0, 1.0])
    assert found.low == pytest.approx(0.75)
    assert found.high == pytest.approx(1.0)


def test_the_stand_in_goes_as_it_came():
    name = "transformers.data.metrics.squad_metrics"
    before = name in sys.modules
    with squad_metrics():
        import transformers.data.metrics.squad_metrics as found

        assert found.compute_exact("A cat", "cat") == 1
        assert found.compute_f1("a black cat sat", "the black cat") == pytest.approx(0.8)
    assert (name in sys.modules) == before


def test_a_single_score_needs_one_draw_and_the_harness_is_as_before():
    from rouge_score import scoring

    before = scoring.BootstrapAggregator
    scores = {"rougeL": scoring.Score(0.5, 0.25, 1 / 3)}
    found = []
    for patch in (contextlib.nullcontext, single_scores):
        with patch():
            aggregator = scoring.BootstrapAggregator()
            aggregator.add_scores(scores)
            found.append(aggregator.aggregate())
    assert found[0] == found[1]
    assert scoring.BootstrapAggregator is before


def test_a_forced_answer_is_judged_as_in_one_pass(family):
    """Agreement over shared prompts, step by step, is what the teacher-forced pass says."""
    who = subject(family)
    answers = [random_ids(1, length, vocab=250, seed=length)[0].tolist() for length in (6, 4)]
    ids = random_ids(2, 8, vocab=250)
    variant = by_head(who, heads(family), 0.5)
    early = variant.early_exit(SharedPrompts())
    found = forced(variant, early, Prompted(ids, torch.ones_like(ids), answers))
    backbone, plan, _ = early.attach(who.model)
    for row, answer in enumerate(answers):
        text = torch.cat((ids[row : row + 1], torch.tensor([answer])), dim=1)[:, :-1]
        twin = teacher_forced(backbone, plan, text, early.thresholds.values, prompt_length=8)
        assert found[row] == twin.tokens[0, 7:].tolist()
    assert agreement([1, 2, 3, 4], [1, 2, 0, 4]) == 0.75
    assert agreement([], []) == 1.0


def test_confidences_are_those_of_the_undisturbed_heads(family):
    who = subject(family)
    ids, answer = random_ids(1, 8, vocab=250), random_ids(1, 5, vocab=250, seed=3)[0].tolist()
    variant = by_head(who, heads(family), 0.0)
    (row,) = confidences(variant, variant.early_exit(SharedPrompts()), Prompted(ids, torch.ones_like(ids), [answer]))
    assert [len(points) for points in row] == [4, 4]
    backbone, plan, _ = variant.early_exit(SharedPrompts()).attach(who.model)
    text = torch.cat((ids, torch.tensor([answer])), dim=1)[:, :-1]
    for exit, points in enumerate(row):
        for confidence, _ in points:
            assert 0.0 <= confidence <= 1.0
        # At a threshold that all but the surest reach, those and no others stay.
        surest = sorted(confidence for confidence, _ in points)[-1]
        only = [None] * exit + [surest - 1e-5] + [None] * (1 - exit)
        left = teacher_forced(backbone, plan, text, only, prompt_length=8).exit_index[0, 8:] == exit
        assert bool(left[[confidence for confidence, _ in points].index(surest)])
        shallow = teacher_forced(backbone, plan, text, [0.0 if e == exit else None for e in range(2)], prompt_length=8)
        first = int(shallow.tokens[0, 8]) == answer[1]
        assert points[0][1] == first


def test_every_kind_of_setting_and_its_name(family):
    who = subject(family)
    found = grid(who, {"mamba head": heads(family)}, [0.5, "never"], measures=["softmax_margin"])
    names = ["full", "softmax_margin@0.5", "softmax_margin@never", "static@2", "static@3"]
    names += ["mamba head@0.5", "mamba head@never", "pruned@3", "pruned@2"]
    assert [variant.facts.id for variant in found] == names
    assert [variant.facts.kind for variant in found][-1] == "pruned"
    assert len({str(variant.identity) for variant in found}) == len(found)
    assert len({id(variant.exits.drive(who.model)) for variant in found if variant.facts.kind != "pruned"}) <= 4
    promised = by_head(who, heads(family), [0.5, "never"], promise="agreement>=0.9")
    assert (promised.facts.id, promised.facts.thresholds) == ("mamba head@agreement>=0.9", (0.5, None))


def test_settings_that_make_no_evaluation():
    who = subject("llama")
    with pytest.raises(UsageError, match="compares with the full model"):
        check_ids([static(who, 2)])
    with pytest.raises(UsageError, match="'full' is given twice"):
        check_ids([full(who), full(who)])
    with pytest.raises(UsageError, match="no trained head"):
        by_head(who, Exits.untrained(who.backbone, (2,)), 0.5)
    with pytest.raises(UsageError, match="softmax_margin"):
        by_measure(who, None, "softmax_margn", 0.5)


def test_timed_pairs_decode_the_same_number_of_tokens(family):
    who, shared = subject(family), SharedPrompts()
    ids = random_ids(1, 8, vocab=250)
    found = pair(full(who, heads(family)), static(who, 2), shared, ids, 6, 0)
    assert found["ratio"] == found["full"] / found["own"] > 0
    short = pair(full(who, heads(family)), pruned_setting(who, 2), shared, ids, 6, 1)
    assert short["full"] > 0 and short["own"] > 0
