"""Training forward of the two stock architectures, layer by layer, on the stock modules' own parameters.

Mirrors MistralDecoderLayer and Mamba2Block of transformers (without cache, mask or dropout) so that compiled
training is fast and every layer's hidden state is at hand; tests hold the two equal. Each layer is one pure
function of tensors: compiled once, it serves all layers. The residual stream is float32, products run in `dtype`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamax_llm.exits.blocks import scan


def rms_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm in float32; h (..., d), weight (d)."""
    h = h.float()
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, T, heads, hd) by cos and sin (T, hd / 2), first half paired with second."""
    first, second = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def attention_layer(
    h: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: tuple[Tensor, ...],
    head_dim: int,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """One MistralDecoderLayer: h (B, T, d) float32 -> (B, T, d) float32."""
    norm_1, q, k, v, o, norm_2, gate, up, down = weights
    batch, length, _ = h.shape
    x = rms_norm(h, norm_1, eps).to(dtype)
    qkv = F.linear(x, torch.cat((q, k, v)).to(dtype))  # one product instead of three: width 192 is memory-bound
    queries, keys, values = qkv.split([q.shape[0], k.shape[0], v.shape[0]], -1)
    queries = rotate(queries.reshape(batch, length, -1, head_dim), cos, sin).transpose(1, 2)  # (B, nh, T, hd)
    keys = rotate(keys.reshape(batch, length, -1, head_dim), cos, sin).transpose(1, 2)
    values = values.reshape(batch, length, -1, head_dim).transpose(1, 2)
    groups = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    h = h + F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), o.to(dtype))
    x = rms_norm(h, norm_2, eps).to(dtype)
    gated, lifted = F.linear(x, torch.cat((gate, up)).to(dtype)).chunk(2, -1)
    return h + F.linear(F.silu(gated) * lifted, down.to(dtype))


def mamba_layer(h: Tensor, weights: tuple[Tensor, ...], inner: int, eps: float, dtype: torch.dtype) -> Tensor:
    """One Mamba2Block with one B/C group: h (B, T, d) float32 -> (B, T, d) float32."""
    norm, in_proj, conv, conv_bias, dt_bias, a_log, skip, gated_norm, out_proj = weights
    batch, length, _ = h.shape
    heads, taps = a_log.shape[0], conv.shape[-1]
    channels = conv.shape[0]  # inner + 2 n
    x = rms_norm(h, norm, eps).to(dtype)
    gate, xbc, dt = F.linear(x, in_proj.to(dtype)).split([inner, channels, heads], -1)
    padded = F.pad(xbc, (0, 0, taps - 1, 0)).float()  # causal depthwise convolution as `taps` shifted products
    xbc = sum(padded[:, tap : tap + length] * conv[:, 0, tap] for tap in range(taps))
    xbc = F.silu(xbc + conv_bias).to(dtype)
    x, b, c = xbc.split([inner, (channels - inner) // 2, (channels - inner) // 2], -1)
    dt = F.softplus(dt.float() + dt_bias)
    y = ssd(x.reshape(batch, length, heads, inner // heads), dt, a_log, b, c, skip).reshape(batch, length, inner)
    y = rms_norm(y.float() * F.silu(gate.float()), gated_norm, eps).to(dtype)
    return h + F.linear(y, out_proj.to(dtype))


def ssd(x: Tensor, dt: Tensor, a_log: Tensor, b: Tensor, c: Tensor, skip: Tensor) -> Tensor:
    """The package's scan from a zero state in float32, one B/C group for all heads, plus the skip: (B, T, h, p).

    x (B, T, h, p), dt (B, T, h) positive, a_log and skip (h), b and c (B, T, n).
    """
    x, b, c = (part.float().unsqueeze(0) for part in (x, b, c))
    _, batch, _, heads, width = x.shape
    state = x.new_zeros(1, batch, heads, width, b.shape[-1])
    y, _ = scan(x, dt.unsqueeze(0), -torch.exp(a_log.float()).view(1, 1, 1, heads), b, c, state)
    return (y + x * skip[:, None])[0]


class Stack:
    """A stock model's embedding, layers, final norm and tied head as plain functions.

    `model` is MistralForCausalLM or Mamba2ForCausalLM; its parameters are used, never copied.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32, compiled: bool = False) -> None:
        self.model, self.dtype = model, dtype
        self.kind: str = model.config.model_type
        if self.kind not in ("mistral", "mamba2"):
            raise ValueError(f"model_type {self.kind!r} has no training forward here; allowed: 'mistral', 'mamba2'")
        if self.kind == "mamba2" and model.config.n_groups != 1:
            raise ValueError(f"n_groups is {model.config.n_groups}; this scan shares B and C over all heads: use 1")
        base = model.model if self.kind == "mistral" else model.backbone
        self.layers: nn.ModuleList = base.layers
        self.embedding: Tensor = model.get_input_embeddings().weight
        self.head: Tensor = model.get_output_embeddings().weight
        self.norm: Tensor = (base.norm if self.kind == "mistral" else base.norm_f).weight
        wrap: Callable[[Any], Any] = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self._layer = wrap(attention_layer if self.kind == "mistral" else mamba_layer)
        self._norm = wrap(lambda h, weight, eps, dtype: rms_norm(h, weight, eps).to(dtype))
        self._rotary: tuple[Tensor, Tensor] | None = None

    @property
    def depth(self) -> int:
        """Number of layers, L."""
        return len(self.layers)

    def states(self, ids: Tensor) -> list[Tensor]:
        """Hidden states (B, T, d), float32, after each of the L layers, before the final norm; ids (B, T)."""
        config = self.model.config
        h = F.embedding(ids, self.embedding).float()
        found = []
        for layer in self.layers:
            if self.kind == "mistral":
                cos, sin = self._angles(ids.shape[1], h.device)
                h = self._layer(h, cos, sin, attention_weights(layer), config.head_dim, config.rms_norm_eps, self.dtype)
            else:
                inner = layer.mixer.intermediate_size
                h = self._layer(h, mamba_weights(layer), inner, config.layer_norm_epsilon, self.dtype)
            found.append(h)
        return found

    def normed(self, h: Tensor) -> Tensor:
        """The final norm, cast for the head: (..., d) -> (..., d) in `dtype`."""
        config = self.model.config
        eps = config.rms_norm_eps if self.kind == "mistral" else config.layer_norm_epsilon
        return self._norm(h, self.norm, eps, self.dtype)

    def _angles(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin (T, hd / 2) of the default rotary embedding; computed once per length."""
        if self._rotary is None or self._rotary[0].shape[0] != length:
            config = self.model.config
            half = config.head_dim // 2
            theta = config.rope_parameters["rope_theta"]
            frequency = theta ** (-torch.arange(half, dtype=torch.float32, device=device) / half)
            angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequency
            self._rotary = (angle.cos(), angle.sin())
        return self._rotary


def attention_weights(layer: nn.Module) -> tuple[Tensor, ...]:
    """A MistralDecoderLayer's parameters in `attention_layer`'s order."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        layer.input_layernorm.weight,
        attention.q_proj.weight,
        attention.k_proj.weight,
        attention.v_proj.weight,
        attention.o_proj.weight,
        layer.post_attention_layernorm.weight,
        mlp.gate_proj.weight,
        mlp.up_proj.weight,
        mlp.down_proj.weight,
    )


def mamba_weights(layer: nn.Module) -> tuple[Tensor, ...]:
    """A Mamba2Block's parameters in `mamba_layer`'s order."""
    mixer = layer.mixer
    return (
        layer.norm.weight,
        mixer.in_proj.weight,
        mixer.conv1d.weight,
        mixer.conv1d.bias,
        mixer.dt_bias,
        mixer.A_log,
        mixer.D,
        mixer.norm.weight,
        mixer.out_proj.weight,
    )
