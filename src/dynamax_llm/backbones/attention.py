"""Transformers of the Llama kind: pre-norm attention with rotary positions and a K/V cache.

- llama, mistral, qwen2: ``AttentionBackbone`` as it is (in qwen2 some layers may see a sliding window, others all).
- qwen3: its keys are normed per head before they turn.
- gemma: its norms multiply by 1 + weight, so skipped layers are updated one by one.

The functions on top serve the attention layers of hybrids too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from dynamax_llm.backbones.base import Backbone, Context, Costs, LayerCost, PastLength, linear_macs, weight_macs
from dynamax_llm.backbones.cache import StackedCache
from dynamax_llm.backbones.rotary import rotary_positions
from dynamax_llm.backbones.stacking import Source, StackedWeights, normalise, state_rows
from dynamax_llm.backbones.stock import Layers, Norm, SelfAttention
from dynamax_llm.errors import UnsupportedModelError


def rotate(x: Tensor, ctx: Context) -> Tensor:
    """Apply the context's rotary positions, if it has any, to the leading dims of each head of x (..., B, H, T, D)."""
    if ctx.rotary is None:
        return x
    cos, sin = (part.unsqueeze(1) for part in ctx.rotary)
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    half = turning.shape[-1] // 2
    turned = turning * cos + torch.cat((-turning[..., half:], turning[..., :half]), dim=-1) * sin
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)


def keys_values(
    attention: SelfAttention, x: Tensor, ctx: Context, scale_keys: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The K/V entries (B, H, T, D) that a stock attention module makes of its normed input x (B, T, d).

    ``scale_keys`` is what a family does to the keys (B, T, H, D) before positions rotate them.
    """
    shape = (*x.shape[:-1], -1, attention.head_dim)
    key, value = attention.k_proj(x).view(shape), attention.v_proj(x).view(shape)
    if scale_keys is not None:
        key = scale_keys(key)
    return rotate(key.transpose(1, 2), ctx), value.transpose(1, 2)


def slot_positions(h: Tensor, past: int, padding: Tensor | None) -> Tensor:
    """The position (B or 1, past + T) of every slot: how many tokens of its row stand before it."""
    if padding is None:
        return torch.arange(past + h.shape[1], device=h.device).unsqueeze(0)
    return (padding.long().cumsum(-1) - 1).clamp_(min=0)


def causal_mask(
    config: Any, h: Tensor, past: int, padding: Tensor | None, all_positions: Tensor, window: int | None = None
) -> Any:
    """The mask (a tensor or a BlockMask) as the model's attention implementation wants it, or None for no mask.

    ``all_positions`` (B or 1, past + T) are positions.
    """
    window = past + h.shape[1] if window is None else window
    within = past + h.shape[1] <= window
    # One new token without padding attends to everything, so it needs no mask (the stock model finds the same).
    if h.shape[1] == 1 and padding is None and within:
        return None
    arguments: dict[str, Any] = {
        "config": config,
        "inputs_embeds": h,
        "attention_mask": padding,
        "past_key_values": PastLength(past),
        "layer_idx": 0,
    }
    if within:
        return create_causal_mask(**arguments)
    if padding is None:
        return create_sliding_window_causal_mask(**arguments)

    # The window counts positions: where tokens were taken back, slots are further apart than positions.
    def near(row: Any, head: Any, query: Any, key: Any) -> Tensor:
        return all_positions[row, key] > all_positions[row, query] - window

    return create_causal_mask(**arguments, and_mask_function=near)


class AttentionBackbone(Backbone):
    """Llama, Mistral and Qwen2, and whatever else shares their layer signature."""

    needs_positions = True
    #: False where a stacked product would not be what the layers compute.
    stacks = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.window: int | None = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None) or ("sliding_attention",) * self.n_layers
        #: Per layer, whether it sees the window only.
        self.windowed = tuple(self.window is not None and kind == "sliding_attention" for kind in kinds)
        self._stacked = StackedWeights(self.layers, self._rows)

    def _find_layers(self) -> Layers:
        return self.model.model.layers

    def _find_kinds(self) -> tuple[str, ...]:
        return ("attention",) * self.n_layers

    def context(
        self, h: Tensor, *, past: int = 0, padding: Tensor | None = None, embedded: Tensor | None = None
    ) -> Context:
        all_positions = slot_positions(h, past, padding)
        positions = all_positions[:, past:]
        rotary = rotary_positions(self.model.model.rotary_emb, h, positions, past, padding)
        mask = window_mask = None
        if not all(self.windowed):
            mask = causal_mask(self.config, h, past, padding, all_positions)
        if any(self.windowed):
            window_mask = causal_mask(self.config, h, past, padding, all_positions, self.window)
        return Context(positions=positions, mask=mask, window_mask=window_mask, rotary=rotary)

    def layer(self, index: int, h: Tensor, cache: StackedCache | None, ctx: Context) -> Tensor:
        return self.layers[index](
            h,
            attention_mask=ctx.window_mask if self.windowed[index] else ctx.mask,
            position_ids=ctx.positions,
            past_key_values=cache,
            use_cache=cache is not None,
            position_embeddings=ctx.rotary,
        )

    def update_state(self, index: int, h: Tensor, cache: StackedCache, ctx: Context) -> None:
        layer = self.layers[index]
        x = layer.input_layernorm(h)
        cache.update(*keys_values(layer.self_attn, x, ctx, self._key_norm(layer)), index)

    def _key_norm(self, layer: Any) -> Norm | None:
        """What the layer's keys pass before positions rotate them."""
        return None

    @staticmethod
    def _rows(layer: Any) -> Source:
        attention = layer.self_attn
        return layer.input_layernorm, ((attention.k_proj, slice(None)), (attention.v_proj, slice(None)))

    def state_projection(self, index: int, h: Tensor) -> Tensor:
        return state_rows(self._rows(self.layers[index]), h)

    def update_states(self, first: int, stop: int, h: Tensor, cache: StackedCache, ctx: Context) -> None:
        stackable = self.stacks and stop - first > 1 and cache.stackable(first, stop)
        weights = self._stacked.get(first, stop) if stackable else None
        if weights is None:
            return super().update_states(first, stop, h, cache, ctx)
        batch, count, _ = h.shape
        rows = weights.project(normalise(h, weights.eps, self.dtype))  # (n, B * T, 2 * H * D)
        dim = self.layers[first].self_attn.head_dim
        kv = rows.view(stop - first, batch, count, 2, -1, dim).permute(0, 3, 1, 4, 2, 5)  # (n, 2, B, H, T, D)
        key = rotate(self._norm_keys(first, stop, kv[:, 0]), ctx)
        cache.append_kv(first, stop, torch.stack((key, kv[:, 1]), dim=1))

    def _norm_keys(self, first: int, stop: int, key: Tensor) -> Tensor:
        """Keys (n, B, H, T, D) of layers ``first`` to ``stop - 1`` as they are when positions turn them."""
        return key

    def refresh(self) -> None:
        if self.stacks:
            self._stacked.refresh()

    def final_norm(self, h: Tensor) -> Tensor:
        return self.model.model.norm(h)

    def costs(self) -> Costs:
        layers = []
        for layer in self.layers:
            state = linear_macs(layer.self_attn.k_proj, layer.self_attn.v_proj)
            layers.append(LayerCost(layer=weight_macs(layer.modules()), state=state))
        return Costs(layers=tuple(layers), readout=linear_macs(self.model.get_output_embeddings()))


class Qwen3Backbone(AttentionBackbone):
    """Qwen3: every head's query and key pass an RMSNorm before they turn."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._key_norms: dict[tuple[int, int], Tensor] = {}  # by run of layers, since the last refresh

    def _norm_keys(self, first: int, stop: int, key: Tensor) -> Tensor:
        norms, cached = [layer.self_attn.k_norm for layer in self.layers[first:stop]], self._key_norms
        if (first, stop) not in cached:
            with torch.no_grad():
                weight = torch.stack([norm.weight for norm in norms])
            cached[first, stop] = weight.view(stop - first, 1, 1, 1, -1)
        return cached[first, stop] * normalise(key, norms[0].variance_epsilon, key.dtype)

    def _key_norm(self, layer: Any) -> Norm | None:
        return layer.self_attn.k_norm

    def refresh(self) -> None:
        super().refresh()
        self._key_norms = {}


class GemmaBackbone(AttentionBackbone):
    """Gemma (the first): scaled embeddings, norms around 1, both inside stock modules."""

    stacks = False  # the norm rounds once, after multiplying by 1 + weight in float32

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if getattr(self.config, "use_bidirectional_attention", None):
            raise UnsupportedModelError(
                "this gemma attends in both directions (use_bidirectional_attention), so its earlier states change "
                "with every token and nothing can be decoded step by step. Use a causal gemma checkpoint."
            )
