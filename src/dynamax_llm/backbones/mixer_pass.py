"""A pass of a stock Mamba-2 mixer over several tokens on a CPU, by the operations of ``scan``.

Stock mixers without kernels build matrices per head and token pair; they read a prompt four to five times more slowly
(recipes/cpu).
``run_pass`` takes the place of a mixer's ``forward`` in a copy of its layer (``mixers.prepare``): same arguments, same
output, same states in the cache, to floating-point noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamax_llm.backbones.scan import causal_convolution, chunked_scan
from dynamax_llm.backbones.stacking import is_plain, is_plain_linear

#: The stock classes whose ``forward`` this is, all of transformers.
MIXERS = frozenset(
    {
        "BambaMixer",
        "FalconH1Mixer",
        "GraniteMoeHybridMambaLayer",
        "Mamba2Mixer",
        "NemotronHMamba2Mixer",
        "Zamba2MambaMixer",
    }
)


def can_run(mixer: Any, h: Tensor) -> bool:
    """Whether ``run_pass`` does what this mixer does with h (B, T, d): several tokens, a CPU, no gradients wanted.

    Not where the mixer or its convolution was replaced or has hooks (offloaded weights, adapters).
    """
    if h.shape[1] == 1 or h.device.type != "cpu" or torch.is_grad_enabled():
        return False
    kind, conv = type(mixer), mixer.conv1d
    stock = kind.__name__ in MIXERS and kind.__module__.startswith("transformers.models.")
    return stock and type(conv) is nn.Conv1d and is_plain(mixer) and is_plain(conv) and mixer.A_log.device == h.device


def run_pass(
    mixer: Any,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: object,
) -> Tensor:
    """The stock forward over normed h (B, T, d) with T > 1, from the state in ``cache_params`` if it has one.

    ``attention_mask`` (B, T) is 0 at pads: as in the stock mixer, they feed neither window nor state.
    """
    dtype, index = hidden_states.dtype, mixer.layer_idx
    gate, fresh, dt = _project(mixer, _masked(hidden_states, attention_mask)).split(
        [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1
    )
    window = state = None
    if cache_params is not None:
        window, state = cache_params.get_conv_state(index), cache_params.get_recurrent_state(index)
        state = None if state is None else state.float()
    active = _masked(_convolve(mixer, fresh, window), attention_mask)
    if cache_params is not None:
        cache_params.update_conv_state(fresh.transpose(1, 2), index, conv_kernel_size=mixer.conv_kernel_size)
    width = mixer.n_groups * mixer.ssm_state_size
    x, b, c = active.float().split([mixer.intermediate_size, width, width], dim=-1)
    x = x.unflatten(2, (mixer.num_heads, mixer.head_dim))
    b, c = (part.unflatten(2, (mixer.n_groups, mixer.ssm_state_size)) for part in (b, c))
    dt = F.softplus(dt + mixer.dt_bias.to(dt.dtype)).clamp(*mixer.time_step_limit).float()
    y, last = chunked_scan(x, dt, -torch.exp(mixer.A_log.float()), b, c, state)
    if cache_params is not None:
        cache_params.update_recurrent_state(last, index)
    y.addcmul_(x, mixer.D.float().unsqueeze(-1))
    return mixer.out_proj(_gated(mixer, y.flatten(2), gate).to(dtype))


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """Values (B, T, C), zero where mask (B, T) is."""
    return values if mask is None else (values * mask.unsqueeze(-1)).to(values.dtype)


def _project(mixer: Any, h: Tensor) -> Tensor:
    """in_proj of masked h (B, T, d), with Falcon-H1's multipliers: gate, then x, B and C, then dt."""
    if hasattr(mixer, "mup_vector"):
        return mixer.in_proj(h * mixer.ssm_in_multiplier) * mixer.mup_vector
    return mixer.in_proj(h)


def _convolve(mixer: Any, fresh: Tensor, window: Tensor | None) -> Tensor:
    """Convolution and activation of rows (B, T, C); ``window`` (B, C, K) is that of the tokens before."""
    conv = mixer.conv1d
    dtype = conv.weight.dtype
    before = None if window is None else window[..., 1:].transpose(1, 2).to(dtype)
    mixed = causal_convolution(fresh.to(dtype), conv.weight, conv.bias, before)
    silu = mixer.activation in ("silu", "swish")
    return (F.silu(mixed, inplace=True) if silu else mixer.act(mixed)).to(fresh.dtype)


def _gated(mixer: Any, y: Tensor, gate: Tensor) -> Tensor:
    """What the mixer's norm makes of y (B, T, I) float32 and the gate; both may be overwritten."""
    norm = mixer.norm
    if not getattr(mixer, "mamba_rms_norm", True):
        return y * F.silu(gate)
    if not (hasattr(norm, "group_size") and is_plain(norm)):
        return norm(y, gate)
    own = gate.dtype == y.dtype and is_plain_linear(mixer.in_proj)  # the projection's output is nobody else's
    y.mul_(F.silu(gate, inplace=True) if own else F.silu(gate.float()))
    grouped = y.unflatten(2, (-1, norm.group_size))
    power = torch.linalg.vector_norm(grouped, dim=-1, keepdim=True).square_()
    grouped.mul_(power.div_(norm.group_size).add_(norm.variance_epsilon).rsqrt_())
    return norm.weight * y if norm.weight.dtype != y.dtype else y.mul_(norm.weight)
