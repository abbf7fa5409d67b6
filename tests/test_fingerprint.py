"""A fingerprint knows its backbone: the same in every dtype it is loaded in, another for any other weights."""

from __future__ import annotations

import copy
import time

import pytest
import torch

from dynamax_llm.backbones.fingerprint import RUN_LENGTH, RUNS, _places, _sample, explain_mismatch, fingerprint
from dynamax_llm.backbones.loading import load
from dynamax_llm.errors import BackboneError
from dynamax_llm.testing import tiny_model
from tests.folders import model_folder

FAMILIES = ("llama", "mistral", "mamba2")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_same_model_same_fingerprint(model_type):
    one, two = fingerprint(tiny_model(model_type)), fingerprint(tiny_model(model_type))
    assert one == two
    assert explain_mismatch(one, two) is None


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_loading_dtype_does_not_change_it(model_type, stored, tmp_path):
    model = tiny_model(model_type).to(getattr(torch, stored))
    with torch.no_grad():
        # The hard cases: below float16's normal range, at its edge, and negative zero.
        next(model.parameters()).view(-1)[:5] = torch.tensor([1e-7, 6.1e-5, -6.2e-5, 3e-5, -0.0])
    model.save_pretrained(tmp_path)
    prints = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        prints.append(fingerprint(type(model).from_pretrained(tmp_path, dtype=dtype)))
    assert prints[0]["weights"] == prints[1]["weights"] == prints[2]["weights"]
    assert [item["dtype"] for item in prints] == ["float32", "bfloat16", "float16"]
    assert explain_mismatch(prints[0], prints[2]) is None


def test_float32_weights_keep_theirs_in_bfloat16():
    folder = model_folder("llama")
    prints = [fingerprint(load(folder, dtype=dtype)[0]) for dtype in ("float32", "bfloat16", "float16")]
    assert explain_mismatch(prints[0], prints[1]) is None
    assert "float16, which rounds differently" in explain_mismatch(prints[0], prints[2])


def test_other_weights_are_told_apart():
    one, two = fingerprint(tiny_model("llama")), fingerprint(tiny_model("llama", seed=1))
    assert one["config"] == two["config"]
    assert "the architecture is the same, the weights are not" in explain_mismatch(one, two)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_parameter_counts(model_type):
    model = tiny_model(model_type)
    before = fingerprint(model)["weights"]
    for name, _ in model.named_parameters():
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.get_parameter(name).add_(0.5)
        assert fingerprint(changed)["weights"] != before, name


@pytest.mark.parametrize(
    ("changes", "clause"),
    [
        ({"layers": 7}, "the number of layers is 7, not 5"),
        ({"hidden_size": 48}, "the width is 48, not 36"),
        ({"vocab": 67}, "the vocabulary size is 67, not 61"),
        ({"head_dim": 12}, "the configuration differs"),
        ({"rms_norm_eps": 1e-3}, "the configuration differs"),
    ],
)
def test_coarsest_difference_is_named(changes, clause):
    assert clause in explain_mismatch(fingerprint(tiny_model("llama")), fingerprint(tiny_model("llama", **changes)))


def test_another_family_is_named():
    text = explain_mismatch(fingerprint(tiny_model("llama")), fingerprint(tiny_model("mamba2")))
    assert text == "the model type is mamba2, not llama"


def test_what_does_not_change_the_model_does_not_count():
    plain, renamed = tiny_model("llama"), tiny_model("llama")
    renamed.config.use_cache, renamed.config._name_or_path, renamed.config.pad_token_id = False, "elsewhere", 5
    assert fingerprint(plain) == fingerprint(renamed)


def test_sample_is_bounded_fixed_and_reads_views_in_place():
    weight = torch.randn(600, 500)
    sample = _sample(weight)
    assert sample.shape == (RUNS * RUN_LENGTH,)
    assert torch.equal(sample, _sample(weight))
    assert torch.equal(sample, _sample(weight.t().contiguous().t()))
    assert _sample(torch.randn(10)).shape == (10,)
    assert _sample(torch.tensor(1.0)).tolist() == [0x3F80]


def test_places_scatter_over_rows_and_columns():
    places = _places(4096 * 4096)
    assert int(places.max()) < 4096 * 4096
    assert len(torch.unique(places)) == RUNS * RUN_LENGTH
    assert len(torch.unique(places // 4096)) >= RUNS
    assert len(torch.unique(places % 4096 // 512)) == 8
    assert _places(7).tolist() == list(range(7))


def test_offloaded_weights_are_refused():
    with torch.device("meta"):
        model = type(tiny_model("llama"))(tiny_model("llama").config)
    with pytest.raises(BackboneError, match=r"is not in memory \(offloaded\)"):
        fingerprint(model)


def test_quick_on_many_large_weights():
    model = tiny_model("llama", layers=40)
    start = time.perf_counter()
    fingerprint(model)
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("granitemoehybrid", "embedding_multiplier"),
        ("granitemoehybrid", "logits_scaling"),
        ("falcon_h1", "key_multiplier"),
        ("jamba", "num_experts_per_tok"),
    ],
)
def test_what_hybrids_compute_beside_their_weights_counts(family, field):
    """The same weights under another multiplier, or with other experts per token, are another backbone."""
    model, other = tiny_model(family), tiny_model(family)
    assert fingerprint(model) == fingerprint(other)
    setattr(other.config, field, getattr(other.config, field) + 1)
    assert explain_mismatch(fingerprint(model), fingerprint(other)) is not None
