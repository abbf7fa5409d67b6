"""A fingerprint knows its backbone: the same in every dtype it is loaded in, another for any other weights."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from transformers import AutoConfig

from dynamax_llm.backbones.fingerprint import IGNORED, RUN_LENGTH, RUNS, _places, _sample, explain_mismatch, fingerprint
from dynamax_llm.backbones.loading import load
from dynamax_llm.errors import BackboneError
from dynamax_llm.testing import TINY, random_ids, tiny_model
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


@pytest.mark.parametrize("family", TINY)
def test_every_setting_that_changes_the_numbers_counts(family):
    """With the same weights: whatever field makes the model compute differently makes it another backbone."""
    model, ids = tiny_model(family), random_ids(1, 12)
    model.config._experts_implementation = "eager"
    before, numbers = fingerprint(model), model(ids).logits
    for name, value in model.config.to_dict().items():
        if name in IGNORED or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        changed = copy.deepcopy(model.config)
        try:
            setattr(changed, name, value + 1)
            other = type(model)(changed).eval()
            other.load_state_dict(model.state_dict())
            moved = not torch.allclose(other(ids).logits, numbers, atol=1e-5)
        except Exception:
            continue  # such weights do not exist
        assert not moved or explain_mismatch(before, fingerprint(other)) is not None, name


@pytest.mark.parametrize("family", TINY)
def test_saved_configurations_keep_their_fingerprint(family, tmp_path):
    model = tiny_model(family)
    before = fingerprint(model)
    model.config.save_pretrained(tmp_path)
    model.config = AutoConfig.from_pretrained(tmp_path)
    assert fingerprint(model)["settings"] == before["settings"]


def test_settings_that_version_0_1_did_not_cover():
    """Rotary limits of kinds that compute with them, and residuals in float32, did not count."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    one, two = (tiny_model("llama", max_position_embeddings=limit, rope_parameters=rope) for limit in (32, 64))
    assert "the configuration differs" in explain_mismatch(fingerprint(one), fingerprint(two))
    one, two = (tiny_model("llama", max_position_embeddings=limit) for limit in (32, 64))
    assert explain_mismatch(fingerprint(one), fingerprint(two)) is None
    one, two = (fingerprint(tiny_model("mamba2", residual_in_fp32=value)) for value in (True, False))
    assert one["config"] == two["config"]
    assert "the configuration differs" in explain_mismatch(one, two)
    del one["settings"]  # a fingerprint of version 0.1 is compared on what it has
    assert explain_mismatch(one, two) is None


class Packed(torch.Tensor):
    """A quantised weight that cannot be indexed, as torchao's are."""

    readable = True

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            raise IndexError("no index")
        if function is torch.Tensor.dequantize:
            if not cls.readable:
                raise RuntimeError("no dequantize")
            return args[0].as_subclass(torch.Tensor) * 1.0
        return super().__torch_function__(function, types, args, kwargs or {})


def packed(seed: int = 0):
    model = tiny_model("llama", seed=seed)
    linear = model.model.layers[1].self_attn.k_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Packed), requires_grad=False)
    return model


def test_quantised_weights_are_read_or_named(monkeypatch):
    assert fingerprint(packed())["weights"] == fingerprint(packed())["weights"] != fingerprint(packed(1))["weights"]
    monkeypatch.setattr(Packed, "readable", False)
    with pytest.raises(BackboneError, match=r"the weight of a Linear is a Packed, whose values cannot be read"):
        fingerprint(packed())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_weights_in_packed_form_count():
    """``quantize_dynamic`` leaves modules without parameters."""
    prints = [
        fingerprint(torch.ao.quantization.quantize_dynamic(tiny_model("llama", seed=seed), {torch.nn.Linear}))
        for seed in (0, 0, 1)
    ]
    assert prints[0]["weights"] == prints[1]["weights"] != prints[2]["weights"]
    with torch.no_grad():
        changed = tiny_model("llama")
        changed.model.layers[2].mlp.up_proj.weight.add_(0.5)
    other = fingerprint(torch.ao.quantization.quantize_dynamic(changed, {torch.nn.Linear}))
    assert other["weights"] != prints[0]["weights"]
