"""Estimators compared on one text at the same agreement, and the same exits counted at a 7B shape."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.errors import UsageError
from dynamax_llm.evaluation.common.points import Points
from dynamax_llm.evaluation.common.random_models import (
    SHAPES,
    costs_at_shape,
    meta_backbone,
    projected_reduction,
    zero_tail,
)
from dynamax_llm.evaluation.compare.heads import HeadComparison, HeadSetting, full_depth_tokens
from dynamax_llm.evaluation.compare.table import comparison_table
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.testing import random_ids, tiny_model
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.curves import average_precision, calibration_error

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def backbone():
    return adapt(tiny_model("mistral", layers=7))


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    masks = torch.arange(24) < torch.tensor([[24], [19], [11]])
    return [Batch(random_ids(3, 24, seed=seed) * masks, masks) for seed in range(2)]


def test_points_count_what_decoding_does(backbone, batches) -> None:
    """Agreement and depth of the one-pass evaluation are those of forced decoding, pads left out."""
    setting = HeadSetting("margin", Exits.untrained(backbone, (2, 4)), "softmax_margin")
    comparison = HeadComparison(backbone, batches, prompt_length=1)
    points = comparison.decode(setting, [0.0, 1.0])
    assert (points.agreement[1], points.mean_depth[1]) == (1.0, 1.0)
    tokens, rows = sum(batch.tokens for batch in batches), 6
    assert points.exit_counts[0].tolist() == [tokens - rows, 0, rows]  # each row's first position is its prompt
    assert points.mean_depth[0] == pytest.approx((2 * (tokens - rows) + 7 * rows) / 7 / tokens)
    with torch.no_grad():
        shallow = 0
        for batch, full in zip(batches, comparison.truth, strict=True):
            assert full_depth_tokens(backbone, batch).equal(full)
            h = backbone.embed(batch.ids)
            ctx = backbone.context(h)
            for index in range(2):
                h = backbone.layer(index, h, None, ctx)
            agrees = backbone.readout(h).argmax(-1) == full
            agrees[:, 0] = True
            shallow += int((agrees & batch.mask).sum())
    assert points.agreement[0] == pytest.approx(shallow / tokens)


def test_full_depth_tokens_are_the_models(backbone, batches) -> None:
    for batch in batches:
        expected = backbone.model(batch.ids, attention_mask=batch.mask.long()).logits.argmax(-1)
        assert full_depth_tokens(backbone, batch)[batch.mask].equal(expected[batch.mask])


def test_static_depth_and_intact_states(backbone, batches) -> None:
    comparison = HeadComparison(backbone, batches)
    exits = Exits.untrained(backbone, (2, 4))
    setting = HeadSetting("margin", exits, "softmax_margin")
    decoded = comparison.decode(setting, [0.0, 1.0])
    assert decoded.depth[0] == pytest.approx(comparison.tokens * 2 / 7)
    assert decoded.agree[1].tolist() == comparison.tokens.tolist()
    only = comparison.static(exits)
    assert only.depth[:, 0] / comparison.tokens[0] == pytest.approx([2 / 7, 4 / 7])
    assert only.agree[0].tolist() == decoded.agree[0].tolist()
    traces = comparison.exit_batches(setting)
    result = comparison.evaluate(setting, traces)
    assert result.intact is not None
    assert result.intact.at(0.0).value >= 2 / 7
    labels = torch.cat([one.labels[:, one.mask] for one in traces], dim=1)
    layers = torch.where(labels[0], 2, torch.where(labels[1], 4, 7))
    assert result.oracle == pytest.approx(float(layers.double().mean()) / 7, abs=1e-6)
    assert comparison.evaluate(setting, intact=False).intact is None


def test_a_comparison_meets_its_target_and_lists_every_cost(backbone, batches) -> None:
    config = ExitConfig((2, 4), 7, head="mlp", candidates=6)
    trained = Exits.of(backbone, config, ExitHeads(config, backbone.width).eval())
    comparison = HeadComparison(backbone, batches)
    settings = [HeadSetting("mlp", trained), HeadSetting("margin", Exits.untrained(backbone, (2, 4)), "softmax_margin")]
    rows = []
    for setting in settings:
        result = comparison.evaluate(setting, target=0.9)
        points = result.propagate
        assert 2 / 7 < result.oracle < points.at(0.9).value <= 1.0
        assert list(points.thresholds) == sorted(points.thresholds)
        assert points.agreement[-1] >= points.agreement[0]
        assert (points.exit_counts.sum(1) == sum(batch.tokens for batch in batches)).all()
        costs = costs_at_shape("mistral-7b", setting.exits, setting.measure)
        saved = [projected_reduction(costs, counts) for counts in points.exit_counts.tolist()]
        row = {"run": "seed0", "at_shape": points.reduction(0.9, saved), **result.to_json()}
        rows.append(json.loads(json.dumps(row)))
    readouts = [setting.exits.readout(backbone) for setting in settings]
    assert [readouts[0].read_macs(exit) for exit in (0, 1)] == [61 * 36, 6 * 36]
    assert [readouts[1].read_macs(exit) for exit in (0, 1)] == [61 * 36, 61 * 36]
    assert rows[0]["parameters"] == sum(parameter.numel() for parameter in trained.heads.parameters())
    assert rows[0]["check_macs"] == trained.heads.macs(0) and rows[1]["parameters"] == 0
    table = comparison_table(rows, backbone.costs().layers[0].layer)
    assert table.count("\n| mlp |") + table.count("\n| margin |") == 2
    assert "at a 7B shape" in table


def points() -> Points:
    """Two documents of 10 tokens: agreement .9 at depth .5, then .95 at .7."""
    agree, depth = np.array([[9, 9], [10, 9]]), np.array([[5.0, 5.0], [6.0, 8.0]])
    return Points((0.3, 0.6), agree, depth, np.array([10, 10]), np.array([[20, 0], [12, 8]]), (0.4, 0.2))


def test_values_between_points_are_linear() -> None:
    made = points()
    assert made.at(0.9).value == pytest.approx(0.5)
    assert made.at(0.925).value == pytest.approx(0.6)
    assert made.at(0.975).value == pytest.approx(0.85)  # half way to full depth, which agrees entirely
    assert made.at(0.5).value == pytest.approx(0.5)
    assert made.reduction(0.925) == pytest.approx(0.3)
    assert made.reduction(0.99) == pytest.approx(0.04)  # towards full depth, which saves nothing
    assert made.reduction(0.85) == pytest.approx(0.4)
    assert made.reduction(0.925, [0.8, 0.4]) == pytest.approx(0.6)
    assert made.threshold(0.925) == pytest.approx(0.45)
    low, high = made.at(0.925).low, made.at(0.925).high
    assert low < 0.6 < high


@pytest.mark.parametrize("name", ["transformer-ee", "transformer-ee-all", "mamba-ee", "mamba-ee-all"])
def test_recorded_tables_are_those_of_the_recorded_numbers(name: str) -> None:
    folder = ROOT / "recipes" / "heads" / "results"
    facts = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    table = comparison_table(facts["results"], facts["layer_macs"])
    assert (folder / f"{name}.md").read_text(encoding="utf-8").startswith(table)


def test_average_precision_and_calibration_error_by_hand() -> None:
    scores, labels = torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([True, False, True, False])
    assert average_precision(scores, labels) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(scores, torch.zeros(4)) is None
    assert calibration_error(torch.tensor([0.25, 0.25, 0.25, 0.25]), labels, bins=1) == pytest.approx(0.25)
    assert calibration_error(torch.tensor([1.0, 0.0, 1.0, 0.0]), labels, bins=4) == pytest.approx(0.0)


@pytest.mark.parametrize(("name", "share"), [("mistral-7b", 0.0385), ("codestral-mamba-7b", 0.387)])
def test_shapes_are_those_of_the_published_models(name: str, share: float) -> None:
    """7 B weights, and the state-only share of a layer that was worked out by hand."""
    costs = meta_backbone(name).costs()
    assert 6.9e9 < costs.total < 7.4e9
    assert costs.layers[0].state / costs.layers[0].layer == pytest.approx(share, rel=0.03)
    assert len(costs.layers) == SHAPES[name].num_hidden_layers


def test_a_projection_counts_every_check(backbone) -> None:
    costs = costs_at_shape("mistral-7b", Exits.untrained(backbone, (2, 4)), "softmax_margin")
    big = meta_backbone("mistral-7b").costs()
    assert costs.depths == (9, 18, 32)
    assert costs.by_exit[0] == big.depth(9) + big.skipped(9, 32) + big.readout
    assert costs.by_exit[2] == big.total + 2 * big.readout
    spent = costs.by_exit[0] + costs.by_exit[1] + 2 * costs.by_exit[2]
    assert projected_reduction(costs, (1, 1, 2)) == pytest.approx(1 - spent / (4 * big.total))


def test_a_projection_keeps_the_heads_width(backbone) -> None:
    config = ExitConfig((2, 4), backbone.n_layers, head="mlp", inputs=("hidden",), width=24)
    exits = Exits.of(backbone, config, ExitHeads(config, backbone.width))
    big = meta_backbone("mistral-7b").costs()
    check = 4096 * 24 + 2 * 24 * 24 + 2 * 24
    assert costs_at_shape("mistral-7b", exits).by_exit[2] == big.total + 2 * check


def test_a_zero_tail_that_does_nothing_is_an_error() -> None:
    model = zero_tail(tiny_model("mistral", layers=4), 2)
    assert not any(parameter.any() for parameter in model.model.layers[3].mlp.down_proj.parameters())
    other = tiny_model("mistral", layers=4)
    layer = other.model.layers[3].mlp
    layer.register_module("leftover", torch.nn.Linear(1, 1))
    layer.down_proj.register_forward_hook(lambda module, inputs, output: output + 1.0)
    with pytest.raises(UsageError, match="layer 4 still changes its input"):
        zero_tail(other, 2)


def test_heads_cost_under_two_percent_of_a_7b_layer() -> None:
    for name in SHAPES:
        backbone = meta_backbone(name)
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
