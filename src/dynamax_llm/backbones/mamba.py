"""Mamba-2 (arXiv 2405.21060): each layer remembers a short convolution window and a matrix-valued SSM state."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import create_recurrent_attention_mask

from dynamax_llm.backbones.base import Backbone, Context, Costs, linear_macs
from dynamax_llm.backbones.cache import StackedCache
from dynamax_llm.backbones.mixers import (
    StackedMixerWeights,
    advance_mamba2,
    clamps_dt,
    continue_mamba2,
    continues,
    mamba2_rows,
    mixer_cost,
    prepare,
    some_rows,
    stacked_mixer_weights,
)
from dynamax_llm.backbones.stacking import Source, StackedWeights, normalise, state_rows
from dynamax_llm.backbones.stock import Layers


def recurrent_padding(config: Any, h: Tensor, padding: Tensor | None) -> Tensor | None:
    """The part of ``padding`` that covers h (B, T, d), or None if all its tokens are real."""
    if h.shape[1] == 1 or padding is None:
        return None
    return create_recurrent_attention_mask(config=config, inputs_embeds=h, attention_mask=padding)


class MambaBackbone(Backbone):
    """What models of nothing but Mamba layers share."""

    def _find_layers(self) -> Layers:
        return self.model.backbone.layers

    def _find_kinds(self) -> tuple[str, ...]:
        return ("mamba",) * self.n_layers

    def context(
        self, h: Tensor, *, past: int = 0, padding: Tensor | None = None, embedded: Tensor | None = None
    ) -> Context:
        return Context(padding=recurrent_padding(self.config, h, padding))

    def layer(self, index: int, h: Tensor, cache: StackedCache | None, ctx: Context) -> Tensor:
        return self.layers[index](h, cache_params=cache, attention_mask=ctx.padding)

    def final_norm(self, h: Tensor) -> Tensor:
        return self.model.backbone.norm_f(h).to(self.model.get_output_embeddings().weight.dtype)

    def costs(self) -> Costs:
        mamba1 = not self.can_continue_multi_token
        layers = tuple(mixer_cost(layer.mixer, mamba1) for layer in self.layers)
        return Costs(layers=layers, readout=linear_macs(self.model.get_output_embeddings()))


class Mamba2Backbone(MambaBackbone):
    """Stock Mamba-2, Codestral Mamba among them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.clamps_dt = any(clamps_dt(layer.mixer) for layer in self.layers)
        self._stacked = StackedWeights(self.layers, self._rows)
        self._small: dict[tuple[int, int], StackedMixerWeights] = {}  # by run of layers, since the last refresh

    def layer(self, index: int, h: Tensor, cache: StackedCache | None, ctx: Context) -> Tensor:
        layer = self.layers[index]
        layer = prepare(layer, layer.mixer, h, continues(index, h, cache), ("mixer",))
        return layer(h, cache_params=cache, attention_mask=ctx.padding)

    @staticmethod
    def _rows(layer: Any) -> Source:
        return layer.norm, ((layer.mixer.in_proj, mamba2_rows(layer.mixer)),)

    def update_state(self, index: int, h: Tensor, cache: StackedCache, ctx: Context) -> None:
        if cache.get_recurrent_state(index) is None:
            self.layer(index, h, cache, ctx)  # a prompt's parallel scan yields output and state together
            return
        layer = self.layers[index]
        x, mixer = layer.norm(h.to(layer.norm.weight.dtype)), layer.mixer
        rows = some_rows(mixer.in_proj, x, mamba2_rows(mixer))
        continue_mamba2(mixer, rows, self._small_weights(index, index + 1), *cache.recurrent(index, index + 1))

    def state_projection(self, index: int, h: Tensor) -> Tensor:
        return state_rows(self._rows(self.layers[index]), h)

    def update_states(self, first: int, stop: int, h: Tensor, cache: StackedCache, ctx: Context) -> None:
        single = h.shape[1] == 1 and stop - first > 1 and cache.get_recurrent_state(first) is not None
        weights = self._stacked.get(first, stop) if single and cache.stackable(first, stop) else None
        if weights is None:
            return super().update_states(first, stop, h, cache, ctx)
        rows = weights.project(normalise(h, weights.eps, self.dtype))  # (n, B, R)
        small = self._small_weights(first, stop)
        advance_mamba2(self.layers[first].mixer, rows, small, *cache.recurrent(first, stop))

    def _small_weights(self, first: int, stop: int) -> StackedMixerWeights:
        """Those of layers ``first`` to ``stop - 1``."""
        small = self._small  # another thread's refresh replaces the dict
        if (first, stop) not in small:
            small[first, stop] = stacked_mixer_weights([layer.mixer for layer in self.layers[first:stop]])
        return small[first, stop]

    def refresh(self) -> None:
        self._stacked.refresh()
        self._small = {}
