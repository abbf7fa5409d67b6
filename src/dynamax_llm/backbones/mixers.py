"""State updates of stock Mamba mixers, without computing their output; shared by all families with such mixers.

The attributes read here (``in_proj``, ``conv1d``, ``intermediate_size``, …) have the same names in every family's copy
of the mixer in transformers.

Shapes: n layers, B batch, C convolution channels, K kernel, H heads, P head dim, G groups, N state size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamax_llm.backbones.base import LayerCost, linear_macs, weight_macs
from dynamax_llm.backbones.cache import StackedCache
from dynamax_llm.backbones.mixer_pass import can_run, run_pass
from dynamax_llm.backbones.stacking import is_plain_linear
from dynamax_llm.backbones.stock import Mamba1Mixer, Mamba2Mixer, Mixer

#: Scans are not cut shorter than this: kernels want a power of two, and tensor cores tiles of 16.
LEAST_CHUNK = 16


class StackedMixerWeights(NamedTuple):
    """The small weights of n Mamba-2 mixers, stacked."""

    conv: Tensor  # (n, 1, C, K)
    conv_bias: Tensor  # (n, 1, C)
    dt_bias: Tensor  # (n, 1, H)
    decay: Tensor  # (n, 1, H), float32: A


@torch.no_grad()
def stacked_mixer_weights(mixers: Sequence[Mamba2Mixer]) -> StackedMixerWeights:
    """The small weights of these Mamba-2 mixers."""
    conv = torch.stack([mixer.conv1d.weight.squeeze(1) for mixer in mixers]).unsqueeze(1)
    zero = conv.new_zeros(conv.shape[2])
    bias = torch.stack([zero if mixer.conv1d.bias is None else mixer.conv1d.bias for mixer in mixers])
    dt_bias = torch.stack([mixer.dt_bias for mixer in mixers])
    decay = -torch.exp(torch.stack([mixer.A_log.float() for mixer in mixers]))
    return StackedMixerWeights(conv, bias.unsqueeze(1), dt_bias.unsqueeze(1), decay.unsqueeze(1))


def mamba2_rows(mixer: Mamba2Mixer) -> slice:
    """The rows of a Mamba-2 in_proj (gate, x, B, C, dt) that the state depends on: all but the gate's."""
    return slice(mixer.intermediate_size, None)


def mamba1_rows(mixer: Mamba1Mixer) -> slice:
    """The rows of a Mamba-1 in_proj (x, gate) that the state depends on."""
    return slice(0, mixer.intermediate_size)


def clamps_dt(mixer: Mixer) -> bool:
    """Whether this mixer's parallel scan clamps dt; no stock single step does."""
    limit = getattr(mixer, "time_step_limit", None)
    return limit is not None and tuple(limit) != (0.0, float("inf"))


def continues(index: int, h: Tensor, cache: StackedCache | None) -> bool:
    """Whether h (B, T, d) are several tokens that follow a state layer ``index`` already has."""
    return h.shape[1] > 1 and cache is not None and cache.get_recurrent_state(index) is not None


def path_to(layer: nn.Module, mixer: Mixer) -> list[str]:
    """The attribute names that lead from a layer to its mixer."""
    return next(name for name, module in layer.named_modules() if module is mixer).split(".")


def prepare(
    layer: nn.Module, mixer: Mixer, h: Tensor, continuing: bool, path: Sequence[str] | None = None
) -> nn.Module:
    """The layer with Mamba-2 ``mixer`` as it should run on h (B, T, d): itself, or a copy whose mixer is set otherwise.

    ``continuing``: h are several tokens that follow a state, and the pass must do what as many single steps do. The
    stock pass clamps dt and single steps do not; and it fills its scan up to ``chunk_size`` (256, say), which for a
    window of 16 is most of the work. On a CPU a pass over several tokens is our own (``mixer_pass``). ``path`` are the
    names that lead to the mixer, if they are known.

    The copy has its own values of these settings and shares everything else (parameters, buffers, hooks, submodules).
    The stock layer is not written to, so any number of threads may run it at the same time.
    """
    ours = can_run(mixer, h)
    if not (continuing or ours):
        return layer
    twin = parent = _twin(layer)
    for name in path or path_to(layer, mixer):
        parent._modules[name] = _twin(getattr(parent, name))
        parent = parent._modules[name]
    if continuing:
        parent.chunk_size = min(parent.chunk_size, max(LEAST_CHUNK, 1 << (h.shape[1] - 1).bit_length()))
        parent.time_step_limit = (0.0, float("inf"))
    if ours:
        parent.forward = partial(run_pass, parent)
    return twin


def _twin(module: nn.Module) -> Any:
    """A shallow copy of a module, with a dict of submodules of its own; what is bound to the module is bound anew."""
    twin = module.__new__(type(module))
    vars(twin).update(vars(module), _modules=dict(module._modules), _compiled_call_impl=None)
    for name in ("forward", "_old_forward"):  # where accelerate placed or offloaded the weights
        bound = vars(module).get(name)
        if isinstance(bound, MethodType) and bound.__self__ is module:
            vars(twin)[name] = MethodType(bound.__func__, twin)
        elif isinstance(bound, partial) and bound.args[:1] == (module,):
            vars(twin)[name] = partial(bound.func, twin, *bound.args[1:], **bound.keywords)
    return twin


def some_rows(linear: Any, x: Tensor, rows: slice) -> Tensor:
    """The outputs ``rows`` of a linear module on x (..., d)."""
    if not is_plain_linear(linear):
        return linear(x)[..., rows]  # quantised, adapted or hooked
    return F.linear(x, linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def advance_mamba2(
    mixer: Mamba2Mixer, rows: Tensor, small: StackedMixerWeights, conv_state: Tensor, ssm_state: Tensor
) -> None:
    """One token through conv window and SSM of n Mamba-2 layers, in place, in the order stock single steps round.

    rows (n, B, C + H): x, B and C before the convolution, then dt. No clamp on dt: the stock step has none.
    ``mixer`` is any of the n, for the sizes.
    """
    fresh, dt = rows.split([mixer.conv_dim, mixer.num_heads], dim=-1)
    conv_state.copy_(torch.cat((conv_state[..., 1:], fresh.unsqueeze(-1)), dim=-1))
    used = mixer.intermediate_size + mixer.n_groups * mixer.ssm_state_size  # C is only for the output
    window = conv_state[..., :used, :].to(small.conv.dtype)
    active = mixer.act((window * small.conv[..., :used, :]).sum(-1) + small.conv_bias[..., :used])
    n, batch, _ = active.shape
    x = active[..., : mixer.intermediate_size].view(n, batch, mixer.num_heads, mixer.head_dim, 1)
    b = active[..., mixer.intermediate_size :].view(n, batch, mixer.n_groups, 1, 1, mixer.ssm_state_size)
    dt = F.softplus(dt + small.dt_bias)  # (n, B, H)
    per_group = (n, batch, mixer.n_groups, -1, 1, 1)
    step = (dt.view(per_group) * b).flatten(2, 3)  # (n, B, H, 1, N)
    ssm_state.mul_(torch.exp(dt.float() * small.decay)[..., None, None]).add_(step * x)


def advance_mamba2_over(
    mixer: Mamba2Mixer, rows: Tensor, small: StackedMixerWeights, conv_state: Tensor, ssm_state: Tensor
) -> None:
    """Several tokens through conv window (B, C, K) and SSM (B, H, P, N) of one Mamba-2 layer, in place.

    rows (B, T, C + H). As many single steps, in closed form: the last state is the first one decayed by all steps, plus
    what every token fed, decayed by the steps after it (arXiv 2405.21060). No clamp on dt, as in single steps.
    """
    fresh, dt = rows.split([mixer.conv_dim, mixer.num_heads], dim=-1)
    joined = torch.cat((conv_state[..., 1:], fresh.transpose(1, 2)), dim=-1)  # (B, C, K - 1 + T)
    kernel = conv_state.shape[-1]
    conv_state.copy_(joined[..., -kernel:])
    used = mixer.intermediate_size + mixer.n_groups * mixer.ssm_state_size  # C is only for the output
    windows = joined[:, :used].unfold(-1, kernel, 1).to(small.conv.dtype)  # (B, used, T, K)
    active = mixer.act((windows * small.conv[0, :, :used, None]).sum(-1) + small.conv_bias[0, :, :used, None])
    batch, _, count = active.shape
    x = active[:, : mixer.intermediate_size].view(batch, mixer.n_groups, -1, mixer.head_dim, count)
    b = active[:, mixer.intermediate_size :].view(batch, mixer.n_groups, 1, mixer.ssm_state_size, count)
    dt = F.softplus(dt + small.dt_bias[0]).float().transpose(1, 2)  # (B, H, T)
    decayed = (dt * small.decay[0].unsqueeze(-1)).cumsum(-1)
    weight = dt * torch.exp(decayed[..., -1:] - decayed)
    fed = (x * weight.view(batch, mixer.n_groups, -1, 1, count)) @ b.float().transpose(-1, -2)  # (B, G, H / G, P, N)
    ssm_state.mul_(torch.exp(decayed[..., -1])[..., None, None]).add_(fed.flatten(1, 2))


def continue_mamba2(
    mixer: Mamba2Mixer, rows: Tensor, small: StackedMixerWeights, conv_state: Tensor, ssm_state: Tensor
) -> None:
    """Tokens, one or several, through conv window (1, B, C, K) and SSM (1, B, H, P, N) of one Mamba-2 layer, in place.

    rows (B, T, C + H): x, B and C before the convolution, then dt.
    """
    if rows.shape[1] > 1:
        advance_mamba2_over(mixer, rows, small, conv_state[0], ssm_state[0])
    else:
        advance_mamba2(mixer, rows.transpose(0, 1), small, conv_state, ssm_state)


def advance_mamba1(mixer: Mamba1Mixer, x: Tensor, conv_state: Tensor, ssm_state: Tensor, normed: bool) -> None:
    """Normed input x (B, T, d), token by token, through conv window (B, C, K) and SSM (B, C, N) of one Mamba-1 layer.

    Both are changed in place. ``normed``: the family's mixers have norms on dt and B.
    """
    for row in some_rows(mixer.in_proj, x, mamba1_rows(mixer)).unbind(1):
        _advance_mamba1(mixer, row, conv_state, ssm_state, normed)


def _advance_mamba1(mixer: Any, rows: Tensor, conv_state: Tensor, ssm_state: Tensor, normed: bool) -> None:
    """One token: rows (B, C) are x before the convolution."""
    conv_state.copy_(torch.cat((conv_state[..., 1:], rows.unsqueeze(-1)), dim=-1))
    weight = mixer.conv1d.weight.squeeze(1)
    active = (conv_state.to(weight.dtype) * weight).sum(-1)
    active = mixer.act(active if mixer.conv1d.bias is None else active + mixer.conv1d.bias)
    rank, size = mixer.time_step_rank, mixer.ssm_state_size
    dt, b = some_rows(mixer.x_proj, active, slice(0, rank + size)).split([rank, size], dim=-1)
    if normed:
        dt, b = mixer.dt_layernorm(dt), mixer.b_layernorm(b)
    dt = F.softplus(mixer.dt_proj(dt)).float().unsqueeze(-1)  # (B, C, 1)
    decay = torch.exp(dt * -torch.exp(mixer.A_log.float()))
    ssm_state.mul_(decay).add_(dt * b.float().unsqueeze(1) * active.float().unsqueeze(-1))


def mixer_cost(mixer: Mixer, mamba1: bool = False) -> LayerCost:
    """Multiply-accumulates per token of a mixer, Mamba-2 unless ``mamba1``, and of its state update alone."""
    cell = mixer.intermediate_size * mixer.ssm_state_size  # of one pass over the state
    whole = weight_macs(mixer.modules()) + 3 * cell
    gate = mixer.intermediate_size * mixer.in_proj.in_features
    state = whole - gate - linear_macs(mixer.out_proj) - cell
    if mamba1:
        state -= mixer.ssm_state_size * mixer.intermediate_size  # C's rows of x_proj
    return LayerCost(layer=whole, state=state)
