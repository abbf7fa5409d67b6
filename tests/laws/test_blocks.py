"""Exits with blocks: one pass is step by step, a row alone is a row in company, heads read blocks."""

from __future__ import annotations

import pytest
import torch

from dynamax_llm.backbones import adapt
from dynamax_llm.engines.plan import POLICIES, ExitPlan
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.readouts.base import Readout, build_readout
from dynamax_llm.exits.readouts.block import BlockReadout
from dynamax_llm.exits.registries import MEASURES
from dynamax_llm.testing import random_ids, tiny_model
from dynamax_llm.traces.teacher_forced import step_by_step, teacher_forced
from tests.drafting import SIZES
from tests.laws.conftest import left_padding

EXITS, PROMPT, COUNT = (1, 2, 3), 6, 22
BACKBONES = {family: adapt(tiny_model(family, layers=4, seed=2)) for family in ("llama", "mamba2")}
BLOCKS = pytest.mark.parametrize(("family", "block"), [("llama", "mamba"), ("mamba2", "transformer")])
POLICY = pytest.mark.parametrize("policy", ["propagate", "defer"])


def readout_of(family: str, block: str, head: str | None = None, candidates: int = 0) -> Readout:
    """Blocks with random weights that speak 40 of 61 tokens, or all."""
    backbone = BACKBONES[family]
    options = {"readout": "block", "block": block, "vocabulary": 40, "head": head, "candidates": candidates, **SIZES}
    config = ExitConfig.from_options(EXITS, backbone.n_layers, **options)
    torch.manual_seed(4)
    weights = BlockReadout.new_weights(config, backbone.width)
    for parameter in weights.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    weights.tokens = torch.randperm(61)[:40].sort().values
    return build_readout(backbone, config, weights.requires_grad_(False))


def heads_of(readout: Readout) -> ExitHeads:
    heads = ExitHeads(readout.config, readout.backbone.width)
    with torch.no_grad():
        for name, parameter in heads.named_parameters():
            if name.endswith(("out", "weight")):
                parameter.normal_(std=2.0)
    return heads.eval().requires_grad_(False)


def plan_of(readout: Readout, estimator, policy: str) -> ExitPlan:
    return ExitPlan(EXITS, estimator, readout, POLICIES[policy], 5)


@BLOCKS
@POLICY
@pytest.mark.parametrize("candidates", [0, 8])
@pytest.mark.parametrize("head", [None, "mlp", "mamba"])
def test_one_pass_is_step_by_step(family: str, block: str, policy: str, candidates: int, head: str | None) -> None:
    readout = readout_of(family, block, head, candidates)
    estimator = MEASURES["softmax_margin"] if head is None else heads_of(readout)
    limits = [0.2, 0.2, 0.2] if head is None else [0.6, 0.5, 0.5]
    plan, ids = plan_of(readout, estimator, policy), random_ids(3, COUNT, seed=1)
    how = {"prompt_length": PROMPT, "padding": torch.cat((left_padding(3, PROMPT), torch.ones(3, 16).long()), dim=1)}
    slow = step_by_step(readout.backbone, plan, ids, limits, **how)
    fast = teacher_forced(readout.backbone, plan, ids, limits, **how, keep_logits=True)
    assert fast.exit_index.tolist() == slow.exit_index.tolist()
    assert len(slow.exit_index[:, PROMPT:].unique()) >= 3  # several exits are really taken
    found, expected = fast.logits[:, PROMPT - 1 :], slow.logits[:, PROMPT - 1 :]
    assert bool((found.isinf() == expected.isinf()).all())
    assert float(found.isinf().float().mean()) > 0.05  # tokens that no block speaks
    finite = expected.isfinite()
    assert float((found[finite] - expected[finite]).abs().max()) < 2e-4 * max(1.0, float(expected[finite].abs().max()))


@BLOCKS
@POLICY
def test_a_row_alone_is_a_row_in_company(family: str, block: str, policy: str) -> None:
    readout = readout_of(family, block, "mamba")
    plan, ids = plan_of(readout, heads_of(readout), policy), random_ids(3, COUNT, seed=1)
    pads = left_padding(3, PROMPT)
    padding = torch.cat((pads, torch.ones(3, COUNT - PROMPT).long()), dim=1)
    limits = [0.6, 0.5, 0.5]
    together = step_by_step(readout.backbone, plan, ids, limits, prompt_length=PROMPT, padding=padding)
    assert len(together.exit_index[:, PROMPT:].unique()) >= 3
    for row in range(3):
        own = ids[[row], row:]
        alone = step_by_step(readout.backbone, plan, own, limits, prompt_length=PROMPT - row)
        assert alone.exit_index[0, PROMPT - row :].tolist() == together.exit_index[row, PROMPT:].tolist()
        found, expected = together.logits[[row], PROMPT:], alone.logits[:, PROMPT - row :]
        finite = expected.isfinite()
        assert float((found[finite] - expected[finite]).abs().max()) < 2e-4 * float(expected[finite].abs().max())


@POLICY
def test_heads_read_blocks_also_of_tokens_that_left(policy: str) -> None:
    """A head at the last exit is given the block's output there, or that of the exit by which the token left."""
    readout = readout_of("llama", "mamba", "mamba")
    heads, backbone = heads_of(readout), readout.backbone
    ids, limits = random_ids(1, COUNT, seed=3), [0.6, 0.5, 2.0]
    read: dict[int, list[torch.Tensor]] = {exit: [] for exit in range(3)}
    said: dict[int, list[torch.Tensor]] = {exit: [] for exit in range(3)}
    use, advance, transform = heads.confidence, heads.advance, readout.transform

    def confidence(exit, h, features, state, padding=None):
        read[exit] += h[0].unbind(0)
        return use(exit, h, features, state, padding)

    def advanced(first, h, features, states, padding=None):
        for exit in range(first, 3):
            read[exit] += h[0].unbind(0)
        return advance(first, h, features, states, padding)

    def transformed(exit, h, state=None, padding=None):
        moved, after = transform(exit, h, state, padding)
        said[exit] += moved[0].unbind(0)
        return moved, after

    heads.confidence, heads.advance, readout.transform = confidence, advanced, transformed
    found = step_by_step(backbone, plan_of(readout, heads, policy), ids, limits, prompt_length=PROMPT)
    left = found.exit_index[0, PROMPT:].tolist()
    assert {0, 1, 3} == set(left)
    assert [len(read[exit]) for exit in range(3)] == [COUNT] * 3  # every token reaches every head once
    said = {exit: iter(values) for exit, values in said.items()}
    for place, exit_index in enumerate([3] * PROMPT + left):
        newest = {exit: next(said[exit]) for exit in range(min(exit_index, 2) + 1)}
        for exit in range(3):
            assert torch.equal(read[exit][place], newest[min(exit, exit_index)]), (place, exit)
