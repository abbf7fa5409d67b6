"""Blocks and drafts estimated: the law's inputs, what follows from known chances, costs, and the verdict in words."""

from __future__ import annotations

import json

import pytest
import torch

import dynamax_llm as dx
from dynamax_llm import cli
from dynamax_llm.backbones import adapt
from dynamax_llm.decoding.draft_choice import ChainCosts
from dynamax_llm.errors import UsageError
from dynamax_llm.evaluation.scan import law
from dynamax_llm.evaluation.scan.collect import Chunk, Kept, batch_of
from dynamax_llm.evaluation.scan.costs import WIDTHS, measure_chain_costs
from dynamax_llm.evaluation.scan.document import Scan
from dynamax_llm.evaluation.scan.modes import block_layers
from dynamax_llm.evaluation.scan.trained_modes import (
    Law,
    estimate_blocks,
    estimate_draft,
    expanded,
    law_inputs,
    seen_before,
)
from tests.folders import backbone, model_folder

FREE = ChainCosts(draft=0.0, passes=(1.0,) * 9)


def fixed(chance: float) -> Law:
    """A law that gives one chance everywhere."""
    logit = float(torch.logit(torch.tensor(chance, dtype=torch.float64)))
    return Law((logit, *(0.0,) * 10), sharpness=1.0, error=0.1)


def test_the_shipped_laws_weigh_what_is_expanded():
    inputs = torch.tensor([[1.0, 2.0, 3.0, 1.0, -4.0]], dtype=torch.float64)
    assert expanded(inputs, 0.5).tolist() == [[1, 2, 3, 1, -4, 0.5, 1, 1.5, 0.5, -2, 0.25]]
    for shipped in (law.BLOCKS, law.DRAFT):
        low, high = (shipped.probability(torch.tensor([[1.0, x, x, 0.0, -5.0]]).double(), 0.5) for x in (-3, 3))
        assert 0.0 < float(low) < float(high) < 1.0  # surer tokens, and more readable ones, agree more often


def test_repetition_is_seen_within_a_row_alone():
    target = torch.tensor([5, 6, 7, 5, 6, 5, 6, 5, 9])
    assert seen_before(target, torch.zeros(9, dtype=torch.int64)).tolist() == [0, 0, 0, 0, 1, 0, 1, 1, 0]
    assert seen_before(target, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])).sum() == 0


def test_what_can_be_read_off_linearly_is_found():
    """States that decide the token linearly are told from noise."""
    lm = adapt(backbone("llama"))
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 8, (400,), generator=generator)
    rows = lm.output_rows(target).detach().float()
    final = 40 * rows / rows.norm(dim=-1, keepdim=True) / rows.norm(dim=-1, keepdim=True)
    noise = torch.randn(final.shape, generator=generator)
    kept = Kept(target, torch.full((400,), 0.5), torch.arange(400) // 10, final, (), noise)
    told, blind = (law_inputs(lm, kept, states, 1e-3)[:, 2] for states in (final, noise))
    assert float(torch.sigmoid(told).mean()) > 0.9 > 0.4 > float(torch.sigmoid(blind).mean())
    assert torch.isfinite(told).all()


def test_chances_give_depths_and_chains():
    inputs = torch.ones(60, 5, dtype=torch.float64)
    told = estimate_blocks(fixed(0.99), [inputs] * 2, (2, 4), 8, (0.98, 0.995))
    assert told.agreement == pytest.approx((0.99, 0.99))
    assert told.depth == pytest.approx((2 / 8, 1.0))
    row = torch.arange(60) // 30
    draft = estimate_draft(fixed(0.5), inputs, row, FREE, most=8)
    assert draft is not None and draft.match[0] == pytest.approx(0.5, abs=0.06)
    assert draft.choice.tokens == pytest.approx(1 + sum(0.5**step for step in range(1, 9)), abs=0.1)
    assert estimate_draft(fixed(0.5), inputs[:7], row[:7], FREE) is None
    dear = estimate_draft(fixed(0.5), inputs, row, ChainCosts(draft=0.6, passes=(1.0, 1.5, *(2.0,) * 7)))
    assert dear is not None and dear.choice.speed_up < 1.0


def test_answers_are_scanned_and_prompts_are_read_only():
    batch, wanted = batch_of([Chunk(0, [1, 2, 3, 4, 5], prompt=3), Chunk(1, [1, 2, 3], prompt=0)])
    assert batch.ids.shape == (2, 5)
    assert wanted.tolist() == [[False, False, True, True, False], [True, True, True, False, False]]


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_costs_are_timed(family):
    costs, one = measure_chain_costs(adapt(backbone(family)))
    assert len(costs.passes) == max(WIDTHS) and costs.passes[0] == 1.0
    assert one > 0 and costs.draft > 0 and min(costs.passes) > 0


def test_exits_of_blocks_fit_any_depth():
    assert block_layers(30) == (4, 8, 15, 22)
    assert block_layers(2) == (1,)


def test_the_command_answers_prompts_and_says_what_to_train(tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {word}."}) + "\n" for word in "abcdefgh"))
    asked = ["--answers", "own", "--prompts", "6", "--answer-tokens", "12", "--no-chat", "--exit-layers", "2"]
    command = ["scan", str(model_folder()), "--data", str(prompts), *asked, "--out", str(tmp_path / "found")]
    assert cli.run(command) == 0
    printed = capsys.readouterr().out
    found = Scan.read(tmp_path / "found" / "scan.json")
    assert found.modes is not None and found.data.prompts == 6 and 12 <= found.data.tokens <= 72
    assert printed.startswith(found.modes.lines[0][:30])
    assert found.modes.blocks.layers == block_layers(found.backbone.n_layers)
    assert all(depth.low <= depth.value <= depth.high for depth in found.modes.blocks.depth)
    if found.modes.draft is not None:
        speed = found.modes.draft.speed_up
        assert speed.low == pytest.approx(speed.value * (1 - law.DRAFT.error))
    assert f"--data {prompts} --answers own --readout" in " ".join(printed.split()) or found.modes.use is None


def test_a_system_message_goes_with_answers():
    with pytest.raises(UsageError, match="it goes with answers"):
        dx.ScanSettings(system="Be brief.")
