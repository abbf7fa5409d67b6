"""docs/add-a-family.md runs, and the family it adds keeps the laws."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import dynamax_llm as dx
from dynamax_llm.backbones import FAMILIES, adapt
from dynamax_llm.backbones.fingerprint import explain_mismatch, fingerprint
from dynamax_llm.errors import UnsupportedModelError, UsageError
from dynamax_llm.testing import random_ids
from tests.laws.conftest import left_padding
from tests.laws.test_families import run, same

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add-a-family.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def page() -> Iterator[ModuleType]:
    """What the page defines; its family is registered while this module's tests run."""
    module = ModuleType("page")
    for block in BLOCKS:
        exec(compile(block, PAGE.name, "exec", dont_inherit=True), module.__dict__)
    yield module
    del FAMILIES._entries["running_mean"]


def test_the_page_is_short() -> None:
    assert len(BLOCKS) == 3 and all(block.count("\n") < 80 for block in BLOCKS)


def test_the_page_generates_with_exits(page: ModuleType) -> None:
    assert page.out.sequences.shape == (1, 15)
    assert set(page.out.exit_layers.flatten().tolist()) == {2, 4, 6}


@pytest.mark.parametrize(("policy", "threshold"), [("propagate", "never"), ("defer", "never"), ("verify", 0.0)])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_full_models_text(page: ModuleType, policy: str, threshold: object, batch: int) -> None:
    ids, mask = random_ids(batch, 6), left_padding(batch, 6)
    stock = page.model.generate(ids, attention_mask=mask, **GREEDY)
    early = dx.EarlyExit(page.exits, measure="softmax_margin", threshold=threshold, policy=policy)
    found = page.model.generate(ids, attention_mask=mask, custom_generate=early, **GREEDY)
    assert torch.equal(found.sequences, stock)


@torch.no_grad()
def test_the_adapter_is_the_stock_model_in_any_pieces(page: ModuleType) -> None:
    backbone, ids, padding = adapt(page.model), random_ids(3, 11), left_padding(3, 11)
    stock = page.model(ids, attention_mask=padding).logits
    assert same(backbone.readout(run(backbone, ids, None, padding=padding)), stock)
    cache = backbone.new_cache()
    first = run(backbone, ids[:, :6], cache, padding=padding[:, :6])
    rest = run(backbone, ids[:, 6:], cache, past=6, padding=padding)
    assert same(backbone.readout(torch.cat((first, rest), dim=1)), stock)


@torch.no_grad()
def test_its_rows_move_between_caches(page: ModuleType) -> None:
    backbone, ids = adapt(page.model), random_ids(2, 7)
    cache, alone = backbone.new_cache(rows=2), backbone.new_cache()
    run(backbone, ids[1:, :6], alone)
    cache.put_row(1, alone)
    found = run(backbone, ids[:, 6:], cache, past=6)
    assert same(backbone.readout(found)[1], page.model(ids[1:]).logits[0, -1:])


def test_it_has_a_fingerprint(page: ModuleType) -> None:
    torch.manual_seed(1)
    other = page.MeanForCausalLM(page.MeanConfig())
    assert fingerprint(page.model) == fingerprint(page.model)
    assert "weights are not" in explain_mismatch(fingerprint(page.model), fingerprint(other))


def test_names_are_taken_once(page: ModuleType) -> None:
    unknown = torch.nn.Linear(2, 2)
    unknown.config = SimpleNamespace(model_type="unheard_of")
    FAMILIES.register("running_mean", page.MeanBackbone)
    with pytest.raises(UsageError, match="model type 'running_mean' is registered already"):
        FAMILIES.register("running_mean", FAMILIES["llama"])
    with pytest.raises(UnsupportedModelError, match="'unheard_of' has no adapter"):
        adapt(unknown)
