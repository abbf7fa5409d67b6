"""Estimators compared at one agreement, and the same exits counted at a 7B shape."""

from __future__ import annotations

import pytest
import torch

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.evaluation.compare.heads import Candidate, Outcome, at_agreement, compare, full_depth_tokens, outcome
from dynamax_llm.evaluation.compare.shapes import SHAPES, projected, shape, token_costs
from dynamax_llm.evaluation.compare.table import comparison_table
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.heads import ExitHeads
from dynamax_llm.testing import random_ids, tiny_model
from dynamax_llm.text.batches import Batch


@pytest.fixture(scope="module")
def backbone():
    return adapt(tiny_model("mistral", layers=7))


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    masks = torch.arange(24) < torch.tensor([[24], [19], [11]])
    return [Batch(random_ids(3, 24, seed=seed) * masks, masks) for seed in range(2)]


def test_outcome_counts_what_decoding_does(backbone, batches) -> None:
    """Agreement and depth of the one-pass evaluation are those of forced decoding, pads left out."""
    candidate = Candidate("margin", Exits.untrained(backbone, (2, 4)), "softmax_margin")
    truth = [full_depth_tokens(backbone, batch) for batch in batches]
    never = outcome(backbone, candidate, 1.0, batches, truth)
    assert (never.agreement, never.depth) == (1.0, 1.0)
    always = outcome(backbone, candidate, 0.0, batches, truth)
    tokens, rows = sum(batch.tokens for batch in batches), 6
    assert always.exit_counts == (tokens - rows, 0, rows)  # each row's first position is its prompt
    assert always.depth == pytest.approx((2 * (tokens - rows) + 7 * rows) / 7 / tokens)
    with torch.no_grad():
        shallow = 0
        for batch, full in zip(batches, truth, strict=True):
            h = backbone.embed(batch.ids)
            ctx = backbone.context(h)
            for index in range(2):
                h = backbone.layer(index, h, None, ctx)
            agrees = backbone.readout(h).argmax(-1) == full
            agrees[:, 0] = True
            shallow += int((agrees & batch.mask).sum())
    assert always.agreement == pytest.approx(shallow / tokens)


def test_comparison_meets_its_target_and_lists_every_cost(backbone, batches) -> None:
    config = ExitConfig((2, 4), 7, head="mlp", candidates=6)
    trained = Exits.of(backbone, config, ExitHeads(config, backbone.width).eval())
    plain = Exits.untrained(backbone, (2, 4))
    candidates = [Candidate("mlp", trained), Candidate("margin", plain, "softmax_margin")]
    results, oracle = compare(backbone, candidates, batches, target=0.9)
    assert 2 / 7 < oracle < 1.0
    for item in results:
        assert oracle < item.depth <= 1.0
        assert [point.agreement for point in item.points] == sorted(point.agreement for point in item.points)
        assert all(sum(point.exit_counts) == sum(batch.tokens for batch in batches) for point in item.points)
    mlp, margin = results
    assert mlp.read_macs == (61 * 36, 6 * 36)
    assert margin.read_macs == (61 * 36, 61 * 36)
    assert mlp.parameters == sum(parameter.numel() for parameter in trained.heads.parameters())
    table = comparison_table(results, backbone.costs(), scale="mistral-7b")
    assert table.count("\n| mlp |") + table.count("\n| margin |") == 2
    assert "at mistral-7b shape" in table


def test_values_between_measured_points_are_linear() -> None:
    points = [Outcome(0.5, 0.90, 0.6, 0.3, ()), Outcome(0.9, 0.98, 0.8, 0.1, ())]
    assert at_agreement(points, 0.94, "depth") == pytest.approx(0.7)
    assert at_agreement(points, 0.99, "depth") == pytest.approx(0.9)  # towards full depth, which agrees entirely
    assert at_agreement(points, 0.85, "counted_reduction") == pytest.approx(0.3)


@pytest.mark.parametrize(("name", "share"), [("mistral-7b", 0.0385), ("codestral-mamba-7b", 0.387)])
def test_shapes_are_those_of_the_published_models(name: str, share: float) -> None:
    """7 B weights, and the state-only share of a layer that was worked out by hand."""
    costs = shape(name).costs()
    assert 6.9e9 < costs.total < 7.4e9
    assert costs.layers[0].state / costs.layers[0].layer == pytest.approx(share, rel=0.03)
    assert len(costs.layers) == SHAPES[name].num_hidden_layers


def test_a_projection_counts_every_check(backbone) -> None:
    candidate = Candidate("margin", Exits.untrained(backbone, (2, 4)), "softmax_margin")
    costs = token_costs("mistral-7b", candidate)
    big = shape("mistral-7b").costs()
    assert costs.depths == (9, 18, 32)
    assert costs.by_exit[0] == big.depth(9) + big.skipped(9, 32) + big.readout
    assert costs.by_exit[2] == big.total + 2 * big.readout
    points = [Outcome(0.5, 0.9, 0.5, 0.0, (1, 1, 2))]
    saved = projected("mistral-7b", candidate, points)[0].counted_reduction
    spent = costs.by_exit[0] + costs.by_exit[1] + 2 * costs.by_exit[2]
    assert saved == pytest.approx(1 - spent / (4 * big.total))


def test_a_projection_keeps_the_heads_width(backbone) -> None:
    config = ExitConfig((2, 4), backbone.n_layers, head="mlp", inputs=("hidden",), width=24)
    exits = Exits.of(backbone, config, ExitHeads(config, backbone.width))
    big = shape("mistral-7b").costs()
    check = 4096 * 24 + 2 * 24 * 24 + 2 * 24
    assert token_costs("mistral-7b", Candidate("mlp", exits)).by_exit[2] == big.total + 2 * check


def test_heads_cost_under_two_percent_of_a_7b_layer() -> None:
    for name in SHAPES:
        backbone = shape(name)
        for kind in ("linear", "mlp", "transformer", "mamba"):
            config = ExitConfig((16,), backbone.n_layers, head=kind)
            with torch.device("meta"):
                heads = ExitHeads(config, backbone.width)
            assert heads.macs(0) < 0.02 * backbone.costs().layers[0].layer


def test_a_summary_counts_exits_like_generation(backbone) -> None:
    """Costs of a trace are those of its tokens: by hand for one exit, one check, one state update."""
    exits = Exits.untrained(backbone, (3,))
    early = EarlyExit(exits, measure="softmax_max", threshold=0.0)
    out = backbone.model.generate(random_ids(1, 5), custom_generate=early, max_new_tokens=4, eos_token_id=None)
    costs = backbone.costs()
    left = costs.depth(3) + costs.skipped(3, 7) + costs.readout
    full = costs.total + costs.readout  # a token that stays was still looked at
    assert out.trace.counted_reduction == pytest.approx(1 - (full + 3 * left) / (4 * costs.total))
