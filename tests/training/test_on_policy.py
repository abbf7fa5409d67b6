"""Labels of every kind, the exit batch with exits on, and what leaving disturbs."""

from __future__ import annotations

import pytest
import torch

from dynamax_llm.backbones import adapt
from dynamax_llm.engines.plan import POLICIES, ExitPlan
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.heads import ExitHeads
from dynamax_llm.exits.readout import Readout
from dynamax_llm.testing import random_ids, tiny_model, zero_tail
from dynamax_llm.text.batches import Batch
from dynamax_llm.traces.collect import collect_exits
from dynamax_llm.traces.drift import drift_penalty
from dynamax_llm.traces.on_policy import collect_on_policy
from dynamax_llm.traces.simulate import NEVER, ThresholdSample, simulate_exits
from dynamax_llm.traces.teacher_forced import teacher_forced

LAYERS, L = (1, 2, 4), 5
FAMILIES = pytest.mark.parametrize("family", ["mistral", "mamba2"])


def batch() -> Batch:
    mask = torch.arange(14) < torch.tensor([[14], [9], [14]])
    return Batch(random_ids(3, 14) * mask, mask)


def config(**changes) -> ExitConfig:
    return ExitConfig(**{"layers": LAYERS, "n_layers": L, "width": 16, "candidates": 8, **changes})


def heads(settings: ExitConfig, width: int) -> ExitHeads:
    torch.manual_seed(0)
    made = ExitHeads(settings, width).requires_grad_(False)
    made.bank.out.normal_()
    return made


@FAMILIES
@pytest.mark.parametrize("label", ["probability", "overlap"])
def test_soft_labels_are_what_the_distributions_say(backbone, family: str, label: str, monkeypatch) -> None:
    adapter, one = backbone(family), batch()
    monkeypatch.setattr("dynamax_llm.exits.readout.LOGITS_AT_ONCE", 61 * 5)  # several slices
    found = collect_exits(adapter, Readout(adapter, config(label=label)), one)
    plain = collect_exits(adapter, Readout(adapter, config()), one)
    assert torch.equal(found.labels, plain.labels)
    assert torch.equal(plain.targets, plain.labels.float())
    with torch.no_grad():
        full = adapter.model(one.ids, attention_mask=one.mask.long()).logits.softmax(-1)
        for exit, h in enumerate(found.hidden):
            here = adapter.readout(h).softmax(-1)
            told = full.gather(-1, here.argmax(-1, keepdim=True))[..., 0]
            expected = told if label == "probability" else 1 - (full - here).abs().sum(-1) / 2
            torch.testing.assert_close(found.targets[exit][one.mask], expected[one.mask], atol=1e-5, rtol=0)


@FAMILIES
@pytest.mark.parametrize("inputs", [("hidden", "signals", "tokens"), ("hidden",)])
def test_the_harvest_on_policy_is_what_decoding_meets(backbone, family: str, inputs: tuple[str, ...]) -> None:
    """The walk over it lets the same tokens leave as the teacher-forced pass, and its labels describe their tokens."""
    adapter, one = backbone(family), batch()
    settings = config(inputs=inputs)
    estimator, readout = heads(settings, adapter.width), Readout(adapter, settings)
    intact = collect_exits(adapter, readout, one)
    bars = torch.tensor([[0.5], [0.45], [NEVER]])
    draw = ThresholdSample(bars, torch.tensor([[0], [3], [0]]))
    met = collect_on_policy(adapter, readout, estimator, one, draw)
    step = simulate_exits(estimator, met, draw)
    plan = ExitPlan(LAYERS, estimator, readout, POLICIES.lookup("propagate"))
    decoded = teacher_forced(adapter, plan, one.ids, [bars] * 3, prompt_length=draw.start)
    assert torch.equal(step.exit_index[one.mask], decoded.exit_index[one.mask])
    left = (decoded.exit_index < 3) & one.mask
    assert 4 < int(left.sum()) < int(one.mask[:2].sum())
    said = met.labels.gather(0, decoded.exit_index.clamp(max=2)[None])[0]
    assert torch.equal(said[left], (decoded.tokens == intact.target)[left])
    for exit in range(3):  # a row in which no token leaves is the intact one
        torch.testing.assert_close(met.hidden[exit][2], intact.hidden[exit][2])
        assert torch.equal(met.labels[exit][2], intact.labels[exit][2])


@FAMILIES
def test_the_two_leading_tokens_are_read(backbone, family: str) -> None:
    adapter, one = backbone(family), batch()
    found = collect_exits(adapter, Readout(adapter, config()), one)
    weight = adapter.model.get_output_embeddings().weight
    with torch.no_grad():
        two = adapter.readout(found.hidden[0]).topk(2).indices
    torch.testing.assert_close(found.features[0].rows[one.mask], weight[two].flatten(-2)[one.mask])
    assert collect_exits(adapter, Readout(adapter, config(inputs=("signals",))), one).features[0].rows is None


@FAMILIES
def test_what_changes_no_state_disturbs_nothing(family: str) -> None:
    """With a zero tail above depth 2, skipped layers would have done nothing to h: leaving there costs nothing."""
    adapter, settings = adapt(zero_tail(tiny_model(family), 2)), config()
    estimator, readout = heads(settings, adapter.width), Readout(adapter, settings)
    found = drift_penalty(adapter, readout, estimator, [batch()])
    assert found[1:] == (0.0, 0.0)
    plain = adapt(tiny_model(family))
    assert drift_penalty(plain, Readout(plain, settings), estimator, [batch()])[0] > 0.1
