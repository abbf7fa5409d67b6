"""Our pass of Mamba-2 mixers over several tokens on a CPU, against the stock mixers: outputs, and states left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone, StackedCache, adapt, mixer_pass, mixers
from dynamax_llm.backbones.scan import CHUNK, chunked_scan
from dynamax_llm.testing import random_ids, tiny_model
from tests.laws.conftest import left_padding

FAMILIES = ("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2")
#: Variants that take other branches of the mixers.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "clamped dt": ("mamba2", {"time_step_limit": (0.02, 0.08)}),
    "no convolution bias": ("mamba2", {"use_conv_bias": False, "use_bias": True}),
    "gate without norm": ("falcon_h1", {"mamba_rms_norm": False}),
    "norm before gate": ("falcon_h1", {"mamba_norm_before_gate": True}),
    "gelu": ("mamba2", {"hidden_act": "gelu"}),
    "one group": ("mamba2", {"n_groups": 1, "conv_kernel": 3}),
}
PAST, MORE = 7, 6


def run(backbone: Backbone, ids: Tensor, cache: StackedCache | None, past: int, padding: Tensor | None) -> Tensor:
    """h (B, T, d) of ids (B, T) after all layers."""
    h = backbone.embed(ids)
    ctx = backbone.context(h, past=past, padding=padding)
    for index in range(backbone.n_layers):
        h = backbone.layer(index, h, cache, ctx)
    return h


def both(monkeypatch: pytest.MonkeyPatch, backbone: Backbone, parts: list[Tensor], padding: Tensor | None) -> list:
    """[ours, stock] of the passes over ``parts`` with one cache: h of each pass, then conv and SSM states."""
    found, calls = [], []
    monkeypatch.setattr(mixers, "run_pass", lambda *a, **k: calls.append(1) or mixer_pass.run_pass(*a, **k))
    for can_run in (mixer_pass.can_run, lambda *a: False):
        monkeypatch.setattr(mixers, "can_run", can_run)
        cache, past, values = backbone.new_cache(), 0, []
        for part in parts:
            end = past + part.shape[1]
            values.append(run(backbone, part, cache, past, None if padding is None else padding[:, :end]))
            past = end
        found.append([*values, *cache.recurrent_parts(0, backbone.n_layers)])
    several = sum(part.shape[1] > 1 for part in parts)
    assert len(calls) == several * sum(kind in ("mamba", "hybrid") for kind in backbone.kinds) > 0
    return found


def close(found: list[Tensor], expected: list[Tensor], share: float = 1e-5) -> bool:
    """Whether each tensor is off by at most ``share`` of its greatest value (of 1, where that is less)."""
    return len(found) == len(expected) and all(
        a.dtype == b.dtype and float((a - b).abs().max()) <= share * max(1.0, float(b.abs().max()))
        for a, b in zip(found, expected, strict=True)
    )


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_states_are_the_stock_mixers(monkeypatch: pytest.MonkeyPatch, variant: str, padded: bool) -> None:
    """A prompt, one token, and a window that continues; left padding longer than the convolution in the last row."""
    family, sizes = VARIANTS[variant]
    backbone = adapt(tiny_model(family, layers=3, **sizes))
    ids = random_ids(6, PAST + 1 + MORE)
    padding = left_padding(6, PAST + 1 + MORE) if padded else None
    ours, stock = both(monkeypatch, backbone, list(ids.split([PAST, 1, MORE], dim=1)), padding)
    assert close(ours, stock)
    assert stock[-1].abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("length", [2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_every_length(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Prompts shorter than the convolution, of exact chunks and of ragged ones."""
    backbone = adapt(tiny_model("mamba2", layers=2))
    assert close(*both(monkeypatch, backbone, [random_ids(2, length)], None))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_without_a_cache_and_right_padding(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    backbone, ids = adapt(tiny_model(family, layers=3)), random_ids(3, 11)
    padding = left_padding(3, 11).flip(1)
    for mask in (None, padding):
        ours = run(backbone, ids, None, 0, mask)
        with monkeypatch.context() as patch:
            patch.setattr(mixers, "can_run", lambda *a: False)
            stock = run(backbone, ids, None, 0, mask)
        assert close([ours], [stock])
        assert not torch.equal(ours, stock)  # else both went the same way


@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba2", "falcon_h1", "zamba2"])
def test_half_precision_rounds_where_the_stock_mixer_does(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    backbone = adapt(tiny_model(family, layers=1).to(torch.bfloat16))
    ids = random_ids(2, PAST + MORE)
    ours, stock = both(monkeypatch, backbone, list(ids.split([PAST, MORE], dim=1)), None)
    assert stock[-2].dtype == torch.bfloat16 and close(ours, stock, share=2e-2)


def test_with_gradients_the_stock_mixer_runs() -> None:
    backbone = adapt(tiny_model("mamba2", layers=2))
    h = run(backbone, random_ids(1, 5), None, 0, None)
    h.sum().backward()
    assert backbone.layers[0].mixer.A_log.grad.abs().max() > 0
    with torch.no_grad():
        assert torch.allclose(run(backbone, random_ids(1, 5), None, 0, None), h.detach(), atol=1e-4)


def recurrence(x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The scan, token by token, in float64."""
    x, dt, decay, b, c, state = (part.double() for part in (x, dt, decay, b, c, state))
    each, ys = x.shape[2] // b.shape[2], []
    b, c = (part.repeat_interleave(each, dim=2) for part in (b, c))
    for t in range(x.shape[1]):
        fed = (dt[:, t, :, None] * x[:, t]).unsqueeze(-1) * b[:, t].unsqueeze(2)
        state = state * torch.exp(dt[:, t] * decay)[..., None, None] + fed
        ys.append((state * c[:, t].unsqueeze(2)).sum(-1))
    return torch.stack(ys, dim=1), state


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize(
    "speeds", [(1.0,) * 6, (2.0, 3.0, 3.5, 4.0, 4.5, 3.0), (1.0, 300.0, 1.0, 2000.0, 20.0, 1.0), (500.0,) * 6]
)
@pytest.mark.parametrize("length", [1, 5, 3 * CHUNK + 7])
def test_the_scan_is_the_recurrence_at_any_decay(length: int, speeds: tuple[float, ...], start: bool) -> None:
    """Heads of one group that decay slowly and at once; the state that is given is not written to."""
    torch.manual_seed(length)
    x, dt = torch.randn(2, length, 6, 5), torch.rand(2, length, 6)
    decay = -torch.tensor(speeds) * torch.linspace(0.7, 1.0, 6)
    b, c = torch.randn(2, length, 3, 4), torch.randn(2, length, 3, 4)
    state = torch.randn(2, 6, 5, 4)
    before = state.clone()
    y, last = chunked_scan(x, dt, decay, b, c, state if start else None)
    expected = recurrence(x, dt, decay, b, c, state if start else torch.zeros_like(state))
    assert torch.equal(state, before)
    for found, wanted in zip((y, last), expected, strict=True):
        assert found.dtype == torch.float32 and wanted.abs().max() > 0.1
        assert torch.allclose(found.double(), wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_replaced_and_hooked_mixers_are_left_to_themselves() -> None:
    model = tiny_model("mamba2", layers=2)
    mixer, h = model.backbone.layers[0].mixer, torch.randn(1, 4, 36)
    assert mixer_pass.can_run(mixer, h) and not mixer_pass.can_run(mixer, h[:, :1])
    seen: list[int] = []
    handle = mixer.register_forward_hook(lambda *a: seen.append(1))
    assert not mixer_pass.can_run(mixer, h)
    handle.remove()
    assert mixer_pass.can_run(mixer, h)

    class Own(type(mixer)):  # type: ignore[misc]
        pass

    mixer.__class__ = Own
    assert not mixer_pass.can_run(mixer, h)
