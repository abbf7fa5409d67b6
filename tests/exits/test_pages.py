"""The pages of the documents that show how to add a readout and a confidence estimator, run on tiny models."""

from __future__ import annotations

import pytest
import torch

from dynamax_llm.backbones import adapt
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.errors import UsageError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.features import STATISTICS, ExitFeatures
from dynamax_llm.exits.readouts.base import Readout
from dynamax_llm.exits.registries import MEASURES, READOUTS
from dynamax_llm.testing import random_ids, tiny_model
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


def test_a_confidence_from_outside_decides_generation() -> None:
    module = page("add-a-confidence.md")
    model = tiny_model("llama", vocab=61)
    exits = Exits.untrained(adapt(model), (2, 3))
    ids = random_ids(2, 7, vocab=61)
    early = EarlyExit(exits, measure="softmax_margin", threshold=0.2)
    mine = module.SteadyMargin(2)
    early.estimator = mine
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
