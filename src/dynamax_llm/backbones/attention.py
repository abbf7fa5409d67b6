"""Transformers of the Llama and Mistral kind: pre-norm attention with rotary positions and a K/V cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from dynamax_llm.backbones.base import Backbone, Context, Costs, Held, LayerCost, linear_macs
from dynamax_llm.backbones.cache import StackedCache
from dynamax_llm.backbones.stacking import StackedWeights, normalise


def rotate(x: Tensor, ctx: Context) -> Tensor:
    """Apply the context's rotary positions to x (..., B, H, T, D)."""
    assert ctx.rotary is not None
    cos, sin = (part.unsqueeze(1) for part in ctx.rotary)
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


class AttentionBackbone(Backbone):
    """Llama and Mistral, and whatever else shares their layer signature."""

    needs_positions = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.window: int | None = getattr(self.config, "sliding_window", None)
        self._stacked = StackedWeights(self.layers, self._rows)

    def _find_layers(self) -> nn.ModuleList:
        return self.model.model.layers

    def _find_kinds(self) -> tuple[str, ...]:
        return ("attention",) * self.n_layers

    def context(
        self, h: Tensor, *, past: int = 0, padding: Tensor | None = None, embedded: Tensor | None = None
    ) -> Context:
        count = h.shape[1]
        if padding is None:
            places = torch.arange(past + count, device=h.device).unsqueeze(0)
        else:
            places = (padding.long().cumsum(-1) - 1).clamp_(min=0)
        positions = places[:, past:]
        rotary = self.model.model.rotary_emb(h, position_ids=positions)
        return Context(positions=positions, mask=self._mask(h, past, padding, places), rotary=rotary)

    def _mask(self, h: Tensor, past: int, padding: Tensor | None, places: Tensor) -> Tensor | None:
        """The mask as the model's attention implementation wants it; ``places`` (B or 1, past + T) are positions."""
        within = self.window is None or past + h.shape[1] <= self.window
        # One new token without padding sees everything: no mask, as the stock model decides more slowly.
        if h.shape[1] == 1 and padding is None and within:
            return None
        arguments: dict[str, Any] = {
            "config": self.config,
            "inputs_embeds": h,
            "attention_mask": padding,
            "past_key_values": Held(past),
            "layer_idx": 0,
        }
        if within:
            return create_causal_mask(**arguments)
        if padding is None:
            return create_sliding_window_causal_mask(**arguments)
        # Where a token was taken back, slots are further apart than positions are; the window is one of positions.
        window = self.window

        def near(row: int, head: int, query: int, key: int) -> Any:
            return places[row, key] > places[row, query] - window

        return create_causal_mask(**arguments, and_mask_function=near)

    def layer(self, index: int, h: Tensor, cache: StackedCache | None, ctx: Context) -> Tensor:
        return self.layers[index](
            h,
            attention_mask=ctx.mask,
            position_ids=ctx.positions,
            past_key_values=cache,
            use_cache=cache is not None,
            position_embeddings=ctx.rotary,
        )

    def update_state(self, index: int, h: Tensor, cache: StackedCache, ctx: Context) -> None:
        attention = self.layers[index].self_attn
        x = self.layers[index].input_layernorm(h)
        shape = (*x.shape[:-1], -1, attention.head_dim)
        key, value = (project(x).view(shape).transpose(1, 2) for project in (attention.k_proj, attention.v_proj))
        cache.update(rotate(key, ctx), value, index)

    @staticmethod
    def _rows(layer: nn.Module) -> tuple[nn.Module, tuple[tuple[nn.Module, slice], ...]]:
        attention = layer.self_attn
        return layer.input_layernorm, ((attention.k_proj, slice(None)), (attention.v_proj, slice(None)))

    def update_states(self, first: int, stop: int, h: Tensor, cache: StackedCache, ctx: Context) -> None:
        weights = self._stacked.get(first, stop) if stop - first > 1 and cache.stackable(first, stop) else None
        if weights is None:
            return super().update_states(first, stop, h, cache, ctx)
        batch, count, _ = h.shape
        rows = weights.project(normalise(h, weights.eps, self.dtype))  # (n, B * T, 2 * H * D)
        dim = self.layers[first].self_attn.head_dim
        kv = rows.view(stop - first, batch, count, 2, -1, dim).permute(0, 3, 1, 4, 2, 5)  # (n, 2, B, H, T, D)
        key = rotate(kv[:, 0], ctx)
        cache.append_kv(first, stop, torch.stack((key, kv[:, 1]), dim=1))

    def refresh(self) -> None:
        self._stacked.refresh()

    def final_norm(self, h: Tensor) -> Tensor:
        return self.model.model.norm(h)

    def costs(self) -> Costs:
        layers = []
        for layer in self.layers:
            state = linear_macs(layer.self_attn.k_proj, layer.self_attn.v_proj)
            linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
            layers.append(LayerCost(layer=linear_macs(*linears), state=state))
        return Costs(layers=tuple(layers), readout=linear_macs(self.model.get_output_embeddings()))
