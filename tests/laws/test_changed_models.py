"""Stock models that someone changed: adapters, edited weights, quantised modules, hooks, other threads. Either the
numbers are the changed model's own, or the change is refused by name."""

from __future__ import annotations

import copy
import threading
import types
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import dynamax_llm as dx
from dynamax_llm.backbones import Backbone, adapt
from dynamax_llm.backbones.mixers import prepare
from dynamax_llm.backbones.stacking import StackedWeights, weights_signature
from dynamax_llm.errors import UsageError
from dynamax_llm.testing import random_ids, tiny_model
from tests.laws.conftest import left_padding
from tests.laws.test_families import run, same


def skipped_state(backbone: Backbone, h: Tensor) -> list[Tensor]:
    """The state of all layers after a prompt and one token h (B, 1, d) that all of them skip."""
    cache = backbone.new_cache()
    run(backbone, random_ids(len(h), 6), cache)
    backbone.refresh()
    ctx = backbone.context(h, past=6)
    backbone.update_states(0, backbone.n_layers, h, cache, ctx)
    return [tensor for tensor in cache.snapshot().tensors if tensor is not None]


def layers_state(backbone: Backbone, h: Tensor) -> list[Tensor]:
    """The same where every layer runs on h."""
    cache = backbone.new_cache()
    run(backbone, random_ids(len(h), 6), cache)
    ctx = backbone.context(h, past=6)
    for index in range(backbone.n_layers):
        backbone.layer(index, h, cache, ctx)
    return [tensor for tensor in cache.snapshot().tensors if tensor is not None]


def all_same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(same, found, expected))


LORA = {"llama": ["k_proj", "v_proj"], "qwen3": ["k_proj", "v_proj"], "mamba2": ["in_proj"], "bamba": ["in_proj"]}


@torch.no_grad()
@pytest.mark.parametrize("family", LORA)
def test_adapters_count_in_skipped_layers(family: str) -> None:
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=LORA[family], init_lora_weights=False)
    adapted, h = get_peft_model(tiny_model(family), lora).eval(), torch.randn(2, 1, 36)
    merged = copy.deepcopy(adapted).merge_and_unload()
    backbone = adapt(adapted)
    assert backbone.model is adapted.get_base_model()
    found = skipped_state(backbone, h)
    assert all_same(found, layers_state(backbone, h))
    assert all_same(found, skipped_state(adapt(merged), h))
    assert not all_same(found, skipped_state(adapt(tiny_model(family)), h))


@torch.no_grad()
@pytest.mark.parametrize("family", LORA)
def test_adapters_merged_after_a_generation_are_noticed(family: str) -> None:
    """peft changes weights through ``.data``, which raises no version."""
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=LORA[family], init_lora_weights=False)
    adapted, h = get_peft_model(tiny_model(family), lora).eval(), torch.randn(2, 1, 36)
    backbone = adapt(adapted)
    with adapted.disable_adapter():
        skipped_state(backbone, h)
    adapted.merge_adapter()
    assert all_same(skipped_state(backbone, h), layers_state(backbone, h))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", ["data", "in_place", "replaced", "one_value", "sign"])
def test_every_change_of_weights_is_noticed(change: str, dtype: torch.dtype) -> None:
    for family, of in (("llama", lambda layer: layer.self_attn.v_proj), ("mamba2", lambda layer: layer.mixer.in_proj)):
        model = tiny_model(family).to(dtype)
        backbone, h = adapt(model), torch.randn(2, 1, 36).to(dtype)
        before = skipped_state(backbone, h)
        linear = of(backbone.layers[2])
        if change == "data":
            linear.weight.data.mul_(1.7)
        elif change == "in_place":
            linear.weight.mul_(1.7)
        elif change == "replaced":
            linear.weight = nn.Parameter(linear.weight * 1.7)
        elif change == "one_value":
            linear.weight.data[-1, -1] += 2.0
        else:
            linear.weight.data.neg_()
        found = skipped_state(backbone, h)
        assert all_same(found, skipped_state(adapt(model), h)) and not all_same(found, before)


def test_the_signature_of_weights_is_stable_and_covers_all_dtypes() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        linear = nn.Linear(7, 5).to(dtype)  # rows that are not a whole number of 8 bytes
        before = weights_signature([linear])
        assert before == weights_signature([linear]) and len(before) == 2
        linear.bias.data[0] += 1
        assert before[0] == weights_signature([linear])[0] and before[1] != weights_signature([linear])[1]
    shifted = nn.Linear(8, 2, bias=False)
    shifted.weight = nn.Parameter(torch.randn(17)[1:].view(2, 8))  # at an address between words
    assert weights_signature([shifted]) == weights_signature([shifted])
    assert weights_signature([nn.Linear(7, 5, device="meta")])[0][1] == torch.float32


def test_hooked_projections_are_followed() -> None:
    model, h = tiny_model("llama"), torch.randn(2, 1, 36)
    backbone = adapt(model)
    model.model.layers[2].self_attn.v_proj.register_forward_hook(lambda module, args, out: out * 3)
    with torch.no_grad():
        assert all_same(skipped_state(backbone, h), layers_state(backbone, h))


THREADED = {
    "mamba2": {"time_step_limit": (0.02, 0.08), "chunk_size": 64},
    "bamba": {"mamba_chunk_size": 64},
    "zamba2": {"chunk_size": 64},
}


@torch.no_grad()
@pytest.mark.parametrize("family", THREADED)
def test_threads_leave_the_stock_model_alone(family: str) -> None:
    """Passes that continue a state, and plain forwards of the stock model, each in threads of their own."""
    model = tiny_model(family, **THREADED[family])
    backbone, ids = adapt(model), random_ids(2, 24)
    cache = backbone.new_cache()
    run(backbone, ids[:, :8], cache)
    kept, expected = cache.snapshot(), {"stock": model(input_ids=ids).logits}
    expected["windows"] = run(backbone, ids[:, 8:], cache, past=8)
    settings = {name: dict(vars(module)) for name, module in model.named_modules()}
    wrong: list[str] = []

    def work(kind: str) -> None:
        with torch.no_grad():
            mine = backbone.new_cache()
            run(backbone, ids[:, :8], mine)
            for _ in range(12):
                mine.restore(kept)
                found = model(input_ids=ids).logits if kind == "stock" else run(backbone, ids[:, 8:], mine, past=8)
                if not torch.equal(found, expected[kind]):
                    wrong.append(kind)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in ("stock", "windows") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert settings == {name: dict(vars(module)) for name, module in model.named_modules()}


@torch.no_grad()
def test_a_copy_for_single_steps_shares_everything_but_two_settings() -> None:
    """With weights that accelerate moves in and out of place as well: its forward is bound to the module."""
    accelerate = pytest.importorskip("accelerate.hooks")
    model = tiny_model("mamba2", time_step_limit=(0.02, 0.08), chunk_size=64)
    layer = model.backbone.layers[1]
    accelerate.add_hook_to_module(layer, accelerate.ModelHook())
    accelerate.add_hook_to_module(layer.mixer, accelerate.ModelHook())
    twin: Any = prepare(layer, layer.mixer, torch.randn(1, 5, 36), continuing=True)
    assert (twin.mixer.chunk_size, twin.mixer.time_step_limit) == (16, (0.0, float("inf")))
    assert (layer.mixer.chunk_size, layer.mixer.time_step_limit) == (64, (0.02, 0.08))
    assert twin.mixer.in_proj is layer.mixer.in_proj and twin.mixer.A_log is layer.mixer.A_log
    h = torch.randn(1, 9, 36)
    layer.mixer.time_step_limit = (0.0, float("inf"))
    expected = layer(h)
    layer.mixer.time_step_limit = (0.02, 0.08)
    assert same(twin(h), expected) and not same(layer(h), expected)


ROPES = {
    "dynamic": (32, {"factor": 2.0}),
    "longrope": (
        64,
        {
            "factor": 2.0,
            "short_factor": [1.0] * 5,
            "long_factor": [1.5, 2.0, 2.5, 3.0, 4.0],
            "original_max_position_embeddings": 32,
        },
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("family", ["llama", "bamba"])
def test_positions_that_depend_on_length_are_each_tokens_own(family: str, kind: str, batch: int) -> None:
    """Passes of 2, 4 and 16 tokens over the edge of the original length leave what the stock model's steps leave."""
    limit, settings = ROPES[kind]
    if family == "bamba" and kind == "longrope":  # half of each head of 8 is rotated
        settings = settings | {"short_factor": [1.0] * 2, "long_factor": [1.5, 3.0]}
    rope = {"rope_type": kind, "rope_theta": 1e4, **settings}
    if family == "bamba":
        rope["partial_rotary_factor"] = 0.5
    model = tiny_model(family, max_position_embeddings=limit, rope_parameters=rope)
    backbone, ids, padding = adapt(model), random_ids(batch, 52), left_padding(batch, 52)
    positions = (padding.cumsum(1) - 1).clamp(min=0)
    out = model(ids[:, :20], attention_mask=padding[:, :20], position_ids=positions[:, :20], use_cache=True)
    stock = [out.logits[:, -1]]
    for place in range(20, 52):
        out = model(
            ids[:, [place]],
            attention_mask=padding[:, : place + 1],
            past_key_values=out.past_key_values,
            position_ids=positions[:, [place]],
            use_cache=True,
        )
        stock.append(out.logits[:, -1])
    rotary = {name: buffer.clone() for name, buffer in model.model.rotary_emb.named_buffers()}
    for window in (1, 2, 4, 16):
        cache = backbone.new_cache()
        found = [backbone.readout(run(backbone, ids[:, :20], cache, padding=padding[:, :20]))[:, -1:]]
        for past in range(20, 52, window):
            h = run(backbone, ids[:, past : past + window], cache, past=past, padding=padding[:, : past + window])
            found.append(backbone.readout(h))
        assert same(torch.cat(found, dim=1), torch.stack(stock, dim=1))
    after = dict(model.model.rotary_emb.named_buffers())
    assert all(torch.equal(after[name], buffer) for name, buffer in rotary.items())


@pytest.mark.parametrize("window", [2, 4, 16])
@pytest.mark.parametrize("kind", ROPES)
def test_verify_is_exact_past_the_original_length(kind: str, window: int) -> None:
    limit, settings = ROPES[kind]
    rope = {"rope_type": kind, "rope_theta": 1e4, **settings}
    model = tiny_model("llama", max_position_embeddings=limit, rope_parameters=rope)
    exits = dx.Exits.untrained(adapt(model), (1, 2, 3, 4))
    want = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    early = dx.EarlyExit(exits, threshold=0.0, measure="softmax_max", policy="verify", window=window)
    ids = random_ids(1, 20)
    assert torch.equal(model.generate(ids, custom_generate=early, **want).sequences, model.generate(ids, **want))


@pytest.mark.parametrize("family", ["llama", "mamba2", "qwen3", "bamba"])
def test_models_made_under_inference_mode_decode(family: str) -> None:
    with torch.inference_mode():
        model = copy.deepcopy(tiny_model(family))
    ids, want = random_ids(1, 5), {"max_new_tokens": 4, "do_sample": False}
    early = dx.EarlyExit(dx.Exits.untrained(adapt(model), (1, 2)), threshold="never", measure="softmax_max")
    assert torch.equal(model.generate(ids, custom_generate=early, **want).sequences, model.generate(ids, **want))
    h = torch.randn(2, 1, 36)
    with torch.no_grad():
        assert all_same(skipped_state(adapt(model), h), layers_state(adapt(model), h))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("family", ["llama", "qwen3", "bamba"])
def test_dynamically_quantised_models_decode(family: str) -> None:
    """Their linear modules keep packed weights; skipped layers use the modules' own products."""
    model = torch.ao.quantization.quantize_dynamic(tiny_model(family), {nn.Linear}, dtype=torch.qint8)
    backbone, h = adapt(model), torch.randn(1, 1, 36)
    ids, want = random_ids(1, 5), {"max_new_tokens": 4, "do_sample": False}
    early = dx.EarlyExit(dx.Exits.untrained(backbone, (1, 2)), threshold="never", measure="softmax_max")
    assert torch.equal(model.generate(ids, custom_generate=early, **want).sequences, model.generate(ids, **want))
    with torch.no_grad():
        assert all_same(skipped_state(backbone, h), layers_state(backbone, h))
        tokens = random_ids(1, 6).view(1, 1, 6)
        assert same(backbone.readout_of(h, tokens), backbone.readout(h).gather(-1, tokens))
    assert backbone.costs() == adapt(tiny_model(family)).costs()


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_soft_prompts_are_refused_by_name(config: type) -> None:
    tuned = get_peft_model(tiny_model("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    kind = "PROMPT_TUNING" if config is PromptTuningConfig else "PREFIX_TUNING"
    with pytest.raises(UsageError, match=rf"adapted by {kind}, which adds virtual tokens.*Use an adapter"):
        adapt(tuned)
    backbone = adapt(tuned.base_model)  # the bare model, which peft makes use the prompt while it generates
    tuned.base_model.prepare_inputs_for_generation = tuned.prepare_inputs_for_generation
    with pytest.raises(UsageError, match="prepare_inputs_for_generation of this LlamaForCausalLM was replaced"):
        backbone.check_stock()
    tuned.base_model.prepare_inputs_for_generation = tuned.base_model_prepare_inputs_for_generation
    assert backbone.check_stock() is None


class OwnForward(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.flip(-1)
        return out


class OwnName(LlamaForCausalLM):
    """Nothing of its own."""


def test_what_changes_the_model_outside_its_layers_is_refused() -> None:
    stock = tiny_model("llama")
    with pytest.raises(UsageError, match=r"OwnForward has a forward of its own.*Use LlamaForCausalLM, or register"):
        adapt(OwnForward(stock.config))
    assert adapt(OwnName(stock.config)).model_type == "llama"
    stock.forward = types.MethodType(lambda self, *args, **kwargs: None, stock)
    with pytest.raises(UsageError, match="forward of this LlamaForCausalLM was replaced"):
        adapt(stock)


@pytest.mark.parametrize("place", ["lm", "inner", "before"])
@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_hooks_around_all_layers_are_refused(family: str, place: str) -> None:
    model = tiny_model(family)
    backbone, module = adapt(model), model if place == "lm" else model.base_model
    hook = module.register_forward_pre_hook if place == "before" else module.register_forward_hook
    handle = hook(lambda *arguments: None)
    with pytest.raises(UsageError, match=rf"{type(module).__name__} has a forward hook.*put it on a layer"):
        backbone.check_stock()
    handle.remove()
    backbone.layers[0].register_forward_hook(lambda *arguments: None)
    assert backbone.check_stock() is None and adapt(model).n_layers == 5


def test_compiled_models_are_unwrapped() -> None:
    model = tiny_model("llama")
    assert adapt(torch.compile(model)).model is model


def test_plain_modules_are_stacked_and_others_are_not() -> None:
    backbone = adapt(tiny_model("llama"))
    assert isinstance(backbone._stacked, StackedWeights) and backbone._stacked.get(1, 4) is not None
    backbone.layers[0].self_attn.k_proj = nn.Sequential(backbone.layers[0].self_attn.k_proj)
    backbone.refresh()
    assert backbone._stacked.get(1, 4) is None
