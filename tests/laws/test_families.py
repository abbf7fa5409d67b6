"""What an adapter promises of its family: the stock model's own numbers, in whatever pieces they are asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dynamax_llm.backbones import FAMILIES, Backbone, StackedCache, adapt
from dynamax_llm.errors import UnsupportedModelError
from dynamax_llm.testing import TINY, random_ids, tiny_model
from tests.laws.conftest import CASES, Case, left_padding

PAST, MORE = 6, 5


def run(
    backbone: Backbone, ids: Tensor, cache: StackedCache | None, past: int = 0, padding: Tensor | None = None
) -> Tensor:
    """All layers over ids (B, T) that follow ``past`` slots: h (B, T, d)."""
    h = backbone.embed(ids)
    ctx = backbone.context(h, past=past, padding=padding)
    for index in range(backbone.n_layers):
        h = backbone.layer(index, h, cache, ctx)
    return h


def same(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-4)


def test_every_family_has_a_fake_and_a_law() -> None:
    assert set(FAMILIES) == set(TINY) == {param.values[0][0] for param in CASES}
    for family in FAMILIES:
        for layers in (5, 7):
            assert adapt(tiny_model(family, layers=layers)).n_layers == layers


@torch.no_grad()
def test_layer_by_layer_is_the_stock_model(case: Case) -> None:
    ids, padding = random_ids(4, 11), left_padding(4, 11)
    model, backbone = case.backbone.model, case.backbone
    assert same(backbone.readout(run(backbone, ids, None)), model(ids).logits)
    found = backbone.readout(run(backbone, ids, None, padding=padding))
    assert same(found[padding.bool()], model(ids, attention_mask=padding).logits[padding.bool()])


@torch.no_grad()
def test_hidden_states_are_the_stock_models(case: Case) -> None:
    """The embeddings and h after every layer; the stock model gives the last one normed."""
    ids, padding = random_ids(3, 9), left_padding(3, 9)
    states = list(case.backbone.hidden_states(ids, padding))
    assert [depth for depth, _ in states] == list(range(case.backbone.n_layers + 1))
    stock = case.backbone.model(ids, attention_mask=padding, output_hidden_states=True).hidden_states
    first = 1 if set(case.backbone.kinds) == {"mamba"} else 0  # stock Mambas do not give the embeddings
    for (_, h), expected in zip(states[first:], stock[:-1], strict=first == 1):
        assert same(h[padding.bool()], expected[padding.bool()])
    assert same(states[-1][1], run(case.backbone, ids, None, padding=padding))


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_several_tokens_can_continue(case: Case, padded: bool) -> None:
    """In one pass over all layers, whatever the mixers."""
    backbone, ids = case.backbone, random_ids(3, PAST + MORE)
    padding = left_padding(3, PAST + MORE) if padded else None
    cache = backbone.new_cache()
    run(backbone, ids[:, :PAST], cache, padding=None if padding is None else padding[:, :PAST])
    found = run(backbone, ids[:, PAST:], cache, past=PAST, padding=padding)
    expected = run(backbone, ids, None, padding=padding)[:, PAST:]
    assert same(backbone.readout(found), backbone.readout(expected))


@torch.no_grad()
def test_a_run_of_layers_catches_up_on_its_own(case: Case) -> None:
    """Lower layers go token by token, the upper ones follow over the whole window: the state is the same."""
    backbone, ids, split = case.backbone, random_ids(3, PAST + MORE), case.exits[0]
    padding = left_padding(3, PAST + MORE)
    whole, cache = backbone.new_cache(), backbone.new_cache()
    expected = run(backbone, ids, whole, padding=padding)[:, PAST:]
    run(backbone, ids[:, :PAST], cache, padding=padding[:, :PAST])
    pending, embedded = [], []
    for place in range(PAST, PAST + MORE):
        h = backbone.embed(ids[:, [place]])
        embedded.append(h)
        ctx = backbone.context(h, past=place, padding=padding[:, : place + 1])
        for index in range(split):
            h = backbone.layer(index, h, cache, ctx)
        pending.append(h)
    h = torch.cat(pending, dim=1)
    ctx = backbone.context(h, past=PAST, padding=padding, embedded=torch.cat(embedded, dim=1))
    for index in range(split, backbone.n_layers):
        h = backbone.layer(index, h, cache, ctx)
    assert same(backbone.readout(h), backbone.readout(expected))
    for found, wanted in zip(cache.snapshot().tensors, whole.snapshot().tensors, strict=True):
        places = padding.bool() if found.dim() == 6 else None  # K/V (n, 2, B, H, T, D) of pads are nobody's business
        if places is not None:
            found, wanted = (part.permute(2, 4, 0, 1, 3, 5)[places] for part in (found, wanted))
        assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_token_taken_back_was_never_there(case: Case) -> None:
    """Row 1 takes a token back: a hole among its K/V, and its recurrent state as before. Row 0 keeps it."""
    backbone, ids = case.backbone, random_ids(2, PAST + 1 + MORE)
    cache = backbone.new_cache()
    run(backbone, ids[:, :PAST], cache)
    before = [part.clone() for part in cache.recurrent_parts(0, backbone.n_layers)]
    run(backbone, ids[:, [PAST]], cache, past=PAST)
    for part, old in zip(cache.recurrent_parts(0, backbone.n_layers), before, strict=True):
        part[:, 1] = old[:, 1]
    padding = torch.ones(2, PAST + 1 + MORE, dtype=torch.long)
    padding[1, PAST] = 0
    found = backbone.readout(run(backbone, ids[:, PAST + 1 :], cache, past=PAST + 1, padding=padding))
    kept = backbone.readout(run(backbone, ids[:1], None))[:, -MORE:]
    alone = backbone.readout(run(backbone, ids[1:][padding[1:].bool()].unsqueeze(0), None))[:, -MORE:]
    assert same(found[:1], kept)
    assert same(found[1:], alone)


@torch.no_grad()
def test_a_few_logits_are_those_of_all(case: Case) -> None:
    h, tokens = run(case.backbone, random_ids(2, 4), None), random_ids(2, 4 * 5, seed=1).view(2, 4, 5)
    assert same(case.backbone.readout_of(h, tokens), case.backbone.readout(h).gather(-1, tokens))


@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba"])
def test_stock_mamba1_forgets_its_state_in_a_longer_step(family: str) -> None:
    """Why the adapter goes token by token; when this fails, transformers has learned it and the adapter need not."""
    backbone = adapt(tiny_model(family))
    h, stock, ours = torch.randn(2, PAST + MORE, backbone.width), backbone.new_cache(), backbone.new_cache()
    ctx = backbone.context(h)
    whole = backbone.layer(0, h, None, ctx)[:, PAST:]
    for cache in (stock, ours):
        backbone.layer(0, h[:, :PAST], cache, ctx)
    assert backbone.kinds[0] == "mamba" and not backbone.can_continue_multi_token
    name = "past_key_values" if family == "jamba" else "cache_params"
    wrong = backbone.layers[0](h[:, PAST:], **{name: stock})
    assert (wrong - whole).abs().max() > 1e-2
    assert same(backbone.layer(0, h[:, PAST:], ours, ctx), whole)


@torch.no_grad()
@pytest.mark.parametrize("family", ["zamba2", "nemotron_h", "mamba2", "bamba"])
def test_stock_clamp_of_dt_is_told(family: str) -> None:
    """At these families' own time_step_min a stock layer's pass and its single steps leave different states."""
    own = {"time_step_min": 0.001, "time_step_max": 0.1, "time_step_floor": 1e-4}
    backbone = adapt(tiny_model(family, **(own if family in ("zamba2", "nemotron_h") else {})))
    h, name = torch.randn(2, PAST + MORE, backbone.width), "cache_params" if family == "mamba2" else "past_key_values"
    once, steps = backbone.new_cache(), backbone.new_cache()
    for cache, parts in ((once, [h]), (steps, h.split(1, dim=1))):
        for part in parts:
            backbone.layers[0](part, **{name: cache})
    apart = (once.recurrent(0, 1)[1] - steps.recurrent(0, 1)[1]).abs().max()
    assert backbone.clamps_dt == (family in ("zamba2", "nemotron_h")) == bool(apart > 1e-4)


@torch.no_grad()
def test_costs_are_the_products_that_run(case: Case) -> None:
    """Counted by torch while one token goes through; torch does not count elementwise convolution and cell updates."""
    backbone = case.backbone
    backbone.config._experts_implementation = "eager"  # torch does not count grouped products
    cache, costs = backbone.new_cache(), backbone.costs()
    run(backbone, random_ids(1, PAST), cache)
    h = backbone.embed(random_ids(1, 1))
    ctx = backbone.context(h, past=PAST)
    for index, (kind, cost) in enumerate(zip(backbone.kinds, costs.layers, strict=True)):
        layer, state = (
            counted(lambda step=step, index=index: step(index, h, cache, ctx))
            for step in (backbone.layer, backbone.update_state)
        )
        aside = elementwise(backbone, index)
        assert cost.layer == layer + aside
        assert cost.state == (state + aside if kind != "none" else 0)
        assert 0 < cost.state < cost.layer or kind == "none"
    assert costs.readout == counted(lambda: backbone.readout(h))
    assert costs.total == sum(cost.layer for cost in costs.layers) + costs.readout


def counted(action) -> int:
    """Multiply-accumulates of all matrix products in ``action``."""
    with FlopCounterMode(display=False) as counter:
        action()
    counts = counter.get_flop_counts().get("Global", {})
    return sum(count for op, count in counts.items() if op in PRODUCTS) // 2


PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)


def elementwise(backbone: Backbone, index: int) -> int:
    """Multiply-accumulates of a layer's convolution and of two of the three passes over its SSM state."""
    mixers = [module for module in backbone.layers[index].modules() if hasattr(module, "A_log")]
    return sum(m.conv1d.weight.numel() + 2 * m.intermediate_size * m.ssm_state_size for m in mixers)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_changed_biases_and_key_norms_are_noticed(family: str) -> None:
    """Skipped layers' stacked weights follow parameters that the two older families do not have."""
    backbone, h = adapt(tiny_model(family)), torch.randn(2, 3, 36)
    ctx = backbone.context(h)
    backbone.update_states(0, 5, h, backbone.new_cache(), ctx)
    for layer in backbone.layers:
        layer.self_attn.k_proj.bias.mul_(2.0)
        if family == "qwen3":
            layer.self_attn.k_norm.weight.mul_(1.5)
    backbone.refresh()
    caches = backbone.new_cache(), backbone.new_cache()
    backbone.update_states(0, 5, h, caches[0], ctx)
    for index in range(5):
        backbone.update_state(index, h, caches[1], ctx)
    stacked, single = (cache.snapshot().tensors[0] for cache in caches)
    assert torch.allclose(stacked, single, atol=1e-5)


def test_only_mamba1_mixers_keep_the_token_by_token_path(case: Case) -> None:
    mixers = [m for layer in case.backbone.layers for m in layer.modules() if hasattr(m, "A_log")]
    assert case.backbone.can_continue_multi_token == (not any(hasattr(mixer, "x_proj") for mixer in mixers))


def test_bidirectional_gemma_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"attends in both directions.*Use a causal gemma checkpoint"):
        adapt(tiny_model("gemma", use_bidirectional_attention=True))
