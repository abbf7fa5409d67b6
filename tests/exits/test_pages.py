"""The pages of the documents that show how to add a readout and a confidence estimator, run on tiny models."""

from __future__ import annotations

import pytest
import torch

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.engines.plan import POLICIES, ExitPlan
from dynamax_llm.errors import ArtifactCorruptError, UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.confidence.bank import Bank
from dynamax_llm.exits.confidence.heads import ExitHeads
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.features import STATISTICS, ExitFeatures
from dynamax_llm.exits.readouts.base import Readout
from dynamax_llm.exits.registries import HEADS, MEASURES, READOUTS
from dynamax_llm.testing import random_ids, tiny_model
from dynamax_llm.traces.teacher_forced import step_by_step, teacher_forced
from tests.exits.pages import page, registered


@pytest.fixture(autouse=True)
def pages():
    with registered("add-a-readout.md", "add-a-confidence.md"):
        yield


def test_a_readout_with_a_state_from_outside(tmp_path) -> None:
    module = page("add-a-readout.md")
    assert READOUTS["mean"] is module.MeanReadout and issubclass(module.MeanReadout, Readout)
    model = adapt(tiny_model("mamba2"))
    exits = Exits.untrained(model, (2, 3), readout="mean", mean_decay=0.5)
    exits.save(tmp_path)
    loaded = Exits.from_pretrained(tmp_path)
    assert loaded.config.readout_options == module.MeanOptions(0.5)
    readout = loaded.readout(model)
    h = torch.randn(1, 3, model.width)
    moved, (mean,) = readout.transform(0, h)
    expected = 0.125 * h[:, 0] + 0.25 * h[:, 1] + 0.5 * h[:, 2]  # decay 1/2, three tokens
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(moved[:, 2], h[:, 2] + 0.5 * expected)
    before, after = readout.transform(0, h[:, 2:])[0], readout.transform(0, h[:, 2:], readout.transform(0, h[:, :2])[1])
    assert not torch.allclose(before, after[0])  # the state matters
    torch.testing.assert_close(after[0], moved[:, 2:])
    assert readout.macs(0) == model.vocab_size * model.width + 2 * model.width
    with pytest.raises(UsageError, match="takes MeanOptions"):
        ExitConfig((2, 3), 5, readout="mean", readout_options=READOUTS["tail"].Options(1))


def test_generation_uses_a_readout_with_a_state() -> None:
    """Every token leaves at the first exit, whose logits rest on the running mean: as one pass over the text gives."""
    module, model = page("add-a-readout.md"), tiny_model("llama", vocab=61)
    backbone = adapt(model)
    exits = Exits.untrained(backbone, (2, 3), readout="mean", mean_decay=0.5)
    exits.readout_weights.weight.data.fill_(3.0)
    ids, count = random_ids(2, 6, vocab=61), 8
    early = EarlyExit(exits, measure="state_similarity", threshold=0.0, engine="eager")
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, custom_generate=early, **options)
    assert (out.exit_layers[:, 1:] == 2).all()
    cut = adapt(tiny_model("llama", vocab=61))
    readout = exits.readout(cut)
    assert isinstance(readout, module.MeanReadout)
    h = cut.embed(out.sequences)
    ctx = cut.context(h)
    for layer in range(2):
        h = cut.layer(layer, h, None, ctx)
    moved, _ = readout.transform(0, h)
    expected = readout.logits(0, moved).argmax(-1)[:, ids.shape[1] : -1]
    assert torch.equal(out.sequences[:, ids.shape[1] + 1 :], expected)
    plain = readout.logits(0, h).argmax(-1)[:, ids.shape[1] : -1]
    assert not torch.equal(plain, expected)  # the state matters


@pytest.mark.parametrize("policy", ["propagate", "defer"])
def test_a_readout_with_a_state_reads_alike_in_one_pass_and_step_by_step(policy: str) -> None:
    backbone = adapt(tiny_model("mamba2", vocab=61))
    exits = Exits.untrained(backbone, (1, 2, 3), readout="mean")
    exits.readout_weights.weight.data.copy_(torch.tensor([3.0, -2.0, 1.0]))
    ids, padding = random_ids(3, 24, vocab=61), torch.ones(3, 24, dtype=torch.int64)
    padding[1, :3] = 0
    readout, measure = exits.readout(backbone), MEASURES["softmax_margin"]
    plan = ExitPlan((1, 2, 3), measure, readout, POLICIES[policy])
    thresholds, how = [0.15, 0.15, 0.15], {"prompt_length": 6, "padding": padding}
    slow = step_by_step(backbone, plan, ids, thresholds, **how)
    fast = teacher_forced(backbone, plan, ids, thresholds, **how, keep_logits=True)
    assert fast.exit_index.tolist() == slow.exit_index.tolist()
    assert len(slow.exit_index[:, 6:].unique()) >= 3  # several exits are really taken
    torch.testing.assert_close(fast.logits[:, 5:], slow.logits[:, 5:], atol=1e-4, rtol=0)


def test_a_confidence_from_outside_decides_generation() -> None:
    module = page("add-a-confidence.md")
    model = tiny_model("llama", vocab=61)
    exits = Exits.untrained(adapt(model), (2, 3))
    ids = random_ids(2, 7, vocab=61)
    mine = module.SteadyMargin(2)
    early = EarlyExit(exits, confidence=mine, threshold=0.2)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    steady = model.generate(ids, custom_generate=early, **options)
    mine.power = 0.0  # the margin alone: the state has no influence
    plain = model.generate(ids, custom_generate=early, **options)
    by_measure = EarlyExit(exits, measure="softmax_margin", threshold=0.2)
    same = model.generate(ids, custom_generate=by_measure, **options)
    assert torch.equal(plain.sequences, same.sequences) and torch.equal(plain.exit_layers, same.exit_layers)
    assert not torch.equal(steady.exit_layers, plain.exit_layers)  # the state matters
    assert float(steady.exit_layers.float().mean()) > float(plain.exit_layers.float().mean())


def test_what_a_steady_margin_remembers() -> None:
    mine = page("add-a-confidence.md").SteadyMargin(2, power=1.0)
    values = torch.zeros(1, 3, len(STATISTICS))
    values[0, :, STATISTICS.index("margin")] = torch.tensor([0.5, 1.0, 0.3])
    found, (total, count) = mine.confidence(
        0, torch.zeros(1, 3, 4), ExitFeatures(values, None), mine.initial_state(1)[0]
    )
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.75, 0.18]]))  # margin x mean margin so far
    assert (total.item(), count.item()) == (pytest.approx(1.8), 3.0)


def test_a_measure_from_outside_is_found_by_name() -> None:
    square = page("add-a-confidence.md").square
    assert MEASURES.lookup("softmax_square") is square
    model = tiny_model("llama", vocab=61)
    exits = Exits.untrained(adapt(model), (2, 3))
    ids, options = random_ids(1, 5, vocab=61), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    both = [
        model.generate(ids, custom_generate=EarlyExit(exits, measure=name, threshold=bar), pad_token_id=0, **options)
        for name, bar in (("softmax_square", 0.04), ("softmax_max", 0.2))
    ]
    assert torch.equal(both[0].exit_layers, both[1].exit_layers)
    assert set(both[0].exit_layers.flatten().tolist()) > {5}  # some tokens left early


class MeanBank(Bank):
    """Half the sum of the mean input and that of the token before."""

    recurrent = True

    def __init__(self, n_exits: int, inputs: int, width: int) -> None:
        super().__init__(n_exits, inputs, width)
        self.weight = self.constant(1, value=0.5)

    def forward(self, exits, x, state, padding):
        mean = x.mean(-1)  # (S, B, T)
        (before,) = self.past(exits, x, state)
        joined = torch.cat((before, mean), dim=-1)
        return self.weight[exits].unsqueeze(-1) * (joined[..., 1:] + joined[..., :-1]), (mean[..., -1:],)

    def initial_state(self, batch, device):
        return (torch.zeros(self.n_exits, batch, 1, device=device),)

    def macs(self) -> int:
        return 2

    def update_macs(self) -> int:
        return 1


def test_a_kind_of_head_from_outside(tmp_path) -> None:
    HEADS.register("mean", MeanBank)
    model = tiny_model("llama", vocab=61)
    config = ExitConfig((2, 3), 5, head="mean")
    assert config.width == Bank.default_width
    heads = ExitHeads(config, model.config.hidden_size)
    heads.bank.weight.data[1] = 2.0
    heads.scale += torch.rand_like(heads.scale)
    saved = Exits.of(adapt(model), config, heads.requires_grad_(False))
    saved.save(tmp_path)
    loaded = Exits.from_pretrained(tmp_path)
    assert isinstance(loaded.heads.bank, MeanBank)
    ids, options = random_ids(2, 5, vocab=61), {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    both = [
        model.generate(ids, custom_generate=EarlyExit(exits, threshold=0.5), pad_token_id=0, **options).exit_layers
        for exits in (saved, loaded)
    ]
    assert torch.equal(*both)
    assert len(set(both[0].flatten().tolist())) > 1


def test_exits_of_a_kind_that_is_not_registered_name_the_way_out(tmp_path) -> None:
    Exits.untrained(adapt(tiny_model("llama")), (2,), readout="mean").save(tmp_path)
    with registered():
        del READOUTS._entries["mean"]
        with pytest.raises(ArtifactCorruptError, match=r"unknown readout 'mean'.*must be registered before loading"):
            Exits.from_pretrained(tmp_path)
