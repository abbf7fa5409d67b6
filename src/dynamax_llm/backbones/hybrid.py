"""Hybrids: attention and Mamba mixers in one model, layer after layer or side by side; some with experts.

- bamba: Mamba-2 or attention, then an MLP; rotary positions on half of each head.
- granitemoehybrid: Mamba-2 or attention, then experts; scaled embeddings, residuals and logits; rotary optional.
- nemotron_h: a layer is one thing: Mamba-2, attention, an MLP or experts; no rotary.
- falcon_h1: Mamba-2 and attention on the same input, then an MLP; a multiplier everywhere.
- zamba2: Mamba-2; before some of them a shared transformer that reads the embeddings again.
- jamba: Mamba-1 or attention, then an MLP or experts; no rotary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dynamax_llm.backbones.attention import causal_mask, keys_values, slot_positions
from dynamax_llm.backbones.base import Backbone, Context, Costs, LayerCost, linear_macs, weight_macs
from dynamax_llm.backbones.cache import StackedCache
from dynamax_llm.backbones.mamba import recurrent_padding
from dynamax_llm.backbones.mamba1 import TokenByToken
from dynamax_llm.backbones.mixers import (
    StackedMixerWeights,
    advance_mamba1,
    clamps_dt,
    continue_mamba2,
    continues,
    mamba2_rows,
    mixer_cost,
    prepare,
    some_rows,
    stacked_mixer_weights,
)
from dynamax_llm.backbones.rotary import rotary_positions
from dynamax_llm.backbones.stock import Layers, Mixer, Norm


@dataclass(frozen=True)
class LayerParts:
    """What of a layer makes its state: both modules read ``norm(h)``; either or both may be missing (None)."""

    norm: Norm
    attention: Any  # SelfAttention
    mamba: Any  # Mixer, of the family's kind

    @property
    def kind(self) -> str:
        """One of ``cache.KINDS``."""
        if self.attention is not None:
            return "attention" if self.mamba is None else "hybrid"
        return "none" if self.mamba is None else "mamba"


class HybridBackbone(Backbone):
    """What the families share: Bamba as it is, and rows below for what the others do differently."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        mixers = (self._parts(layer).mamba for layer in self.layers)
        self.clamps_dt = any(clamps_dt(mixer) for mixer in mixers if mixer is not None)
        self._small: dict[int, StackedMixerWeights] = {}  # by layer, since the last refresh
        self._rotary: nn.Module | None = getattr(self.model.model, "rotary_emb", None)
        self.needs_positions = self._rotary is not None

    def _find_layers(self) -> Layers:
        return self.model.model.layers

    def _find_kinds(self) -> tuple[str, ...]:
        return tuple(self._parts(layer).kind for layer in self.layers)

    def _parts(self, layer: Any) -> LayerParts:
        return LayerParts(layer.input_layernorm, getattr(layer, "self_attn", None), getattr(layer, "mamba", None))

    def context(
        self, h: Tensor, *, past: int = 0, padding: Tensor | None = None, embedded: Tensor | None = None
    ) -> Context:
        all_positions = slot_positions(h, past, padding)
        positions = all_positions[:, past:]
        rotary = None if self._rotary is None else rotary_positions(self._rotary, h, positions, past, padding)
        return Context(
            positions=positions,
            mask=causal_mask(self.config, h, past, padding, all_positions),
            padding=recurrent_padding(self.config, h, padding),
            rotary=rotary,
            embedded=(h if embedded is None else embedded) if self.needs_embedding else None,
        )

    def layer(self, index: int, h: Tensor, cache: StackedCache | None, ctx: Context) -> Tensor:
        layer = self.layers[index]
        mixer = self._parts(layer).mamba
        if mixer is not None and self.can_continue_multi_token:
            layer = prepare(layer, mixer, h, continues(index, h, cache))
        return self._run(layer, index, h, cache, ctx)

    def _run(self, layer: Any, index: int, h: Tensor, cache: StackedCache | None, ctx: Context) -> Tensor:
        """``layer``, which is layer ``index`` or its copy, as the stock model calls it."""
        out = layer(h, **self._arguments(index, cache, ctx))
        return out if isinstance(out, Tensor) else out[0]

    def _arguments(self, index: int, cache: StackedCache | None, ctx: Context) -> dict[str, Any]:
        """What the stock model passes to layer ``index`` besides h."""
        mask = {"attention": ctx.mask, "mamba": ctx.padding}.get(self.kinds[index])
        arguments = {"attention_mask": mask, "past_key_values": cache, "use_cache": cache is not None}
        arguments["position_ids"] = ctx.positions
        return arguments if ctx.rotary is None else {**arguments, "position_embeddings": ctx.rotary}

    def update_state(self, index: int, h: Tensor, cache: StackedCache, ctx: Context) -> None:
        if self.kinds[index] == "none":
            return
        parts = self._parts(self.layers[index])
        if parts.mamba is not None and cache.get_recurrent_state(index) is None:
            self.layer(index, h, cache, ctx)  # a prompt's parallel scan yields output and state together
            return
        x = parts.norm(h.to(parts.norm.weight.dtype))
        if parts.mamba is not None:
            self._advance(index, parts.mamba, x, cache)
        if parts.attention is not None:
            cache.update(*self._keys_values(index, parts.attention, x, ctx), index)

    def _keys_values(self, index: int, attention: Any, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """The K/V entries of layer ``index`` from its normed input x (B, T, d)."""
        return keys_values(attention, x, ctx)

    def _advance(self, index: int, mixer: Any, x: Tensor, cache: StackedCache) -> None:
        """Normed input x (B, T, d) through the state of layer ``index``'s mixer."""
        small = self._small  # another thread's refresh replaces the dict
        if index not in small:
            small[index] = stacked_mixer_weights([mixer])
        continue_mamba2(mixer, self._project(mixer, x), small[index], *cache.recurrent(index, index + 1))

    def _project(self, mixer: Any, x: Tensor) -> Tensor:
        """What the mixer's state depends on (B, T, R), before the convolution, from its normed input x (B, T, d)."""
        return some_rows(mixer.in_proj, x, mamba2_rows(mixer))

    def refresh(self) -> None:
        self._small = {}

    def final_norm(self, h: Tensor) -> Tensor:
        return self.model.model.final_layernorm(h)

    def costs(self) -> Costs:
        layers = tuple(LayerCost(self._layer_macs(index), self._state_macs(index)) for index in range(self.n_layers))
        return Costs(layers=layers, readout=linear_macs(self.model.get_output_embeddings()))

    def _layer_macs(self, index: int) -> int:
        mixer = self._parts(self.layers[index]).mamba
        weights = weight_macs(self._modules(index), getattr(self.config, "num_experts_per_tok", 0) or 0)
        return weights + (0 if mixer is None else self._mixer_cost(mixer).layer - weight_macs(mixer.modules()))

    def _modules(self, index: int) -> Iterator[nn.Module]:
        """All modules that a token may go through in layer ``index``."""
        return self.layers[index].modules()

    def _state_macs(self, index: int) -> int:
        parts = self._parts(self.layers[index])
        keys = 0 if parts.attention is None else linear_macs(parts.attention.k_proj, parts.attention.v_proj)
        return keys + (0 if parts.mamba is None else self._mixer_cost(parts.mamba).state)

    def _mixer_cost(self, mixer: Mixer) -> LayerCost:
        return mixer_cost(mixer, mamba1=not self.can_continue_multi_token)


class GraniteMoeHybridBackbone(HybridBackbone):
    """Granite 4: experts, and multipliers on embeddings, residuals (inside the layer) and logits."""

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids) * self.model.model.embedding_multiplier

    def _arguments(self, index: int, cache: StackedCache | None, ctx: Context) -> dict[str, Any]:
        arguments = super()._arguments(index, cache, ctx)
        del arguments["position_ids"]  # they would be passed on to the mixer's kernels
        return arguments

    def final_norm(self, h: Tensor) -> Tensor:
        return self.model.model.norm(h)

    def _scale(self, logits: Tensor) -> Tensor:
        return logits / self.config.logits_scaling


class NemotronHBackbone(HybridBackbone):
    """Nemotron-H: a layer is a norm and one mixer; MLPs and experts keep no state."""

    def _parts(self, layer: Any) -> LayerParts:
        attends, recurs = (layer.block_type == kind for kind in ("full_attention", "linear_attention"))
        return LayerParts(layer.norm, layer.mixer if attends else None, layer.mixer if recurs else None)

    def final_norm(self, h: Tensor) -> Tensor:
        return self.model.model.norm_f(h)


class FalconH1Backbone(HybridBackbone):
    """Falcon-H1: attention and mixer side by side in every layer, so every layer takes both masks."""

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids) * self.model.model.embedding_multiplier

    def _arguments(self, index: int, cache: StackedCache | None, ctx: Context) -> dict[str, Any]:
        masks = {"attention_mask": ctx.mask, "mamba_attention_mask": ctx.padding}
        return super()._arguments(index, cache, ctx) | masks

    def _keys_values(self, index: int, attention: Any, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        x = x * self.layers[index].attention_in_multiplier
        return keys_values(attention, x, ctx, lambda key: key * attention.key_multiplier)

    def _project(self, mixer: Any, x: Tensor) -> Tensor:
        rows = mamba2_rows(mixer)
        return some_rows(mixer.in_proj, x * mixer.ssm_in_multiplier, rows) * mixer.mup_vector[0, 0, rows]

    def _scale(self, logits: Tensor) -> Tensor:
        return logits * self.model.model.lm_head_multiplier


class Zamba2Backbone(HybridBackbone):
    """Zamba2: Mamba-2 layers, some with a transformer before them that shares weights and reads the embeddings again.

    The output of such a transformer enters the mixer's state, so a skipped layer must run it and saves only the
    mixer's gate and output.
    """

    needs_embedding = True

    def _parts(self, layer: Any) -> LayerParts:
        shared = getattr(layer, "shared_transformer", None)
        decoder = layer if shared is None else layer.mamba_decoder
        return LayerParts(decoder.input_layernorm, None if shared is None else shared.self_attn, decoder.mamba)

    def _run(self, layer: Any, index: int, h: Tensor, cache: StackedCache | None, ctx: Context) -> Tensor:
        return layer(
            h,
            ctx.embedded,
            index,
            ctx.padding,
            ctx.mask,
            past_key_values=cache,
            use_cache=cache is not None,
            position_embeddings=ctx.rotary,
            position_ids=ctx.positions,
        )

    def update_state(self, index: int, h: Tensor, cache: StackedCache, ctx: Context) -> None:
        layer, mixer = self.layers[index], self._parts(self.layers[index]).mamba
        if self.kinds[index] == "mamba" or cache.get_recurrent_state(index) is None:
            return super().update_state(index, h, cache, ctx)
        shared = layer.shared_transformer(
            h,
            original_hidden_states=ctx.embedded,
            layer_idx=index,
            attention_mask=ctx.mask,
            past_key_values=cache,
            position_embeddings=ctx.rotary,
            position_ids=ctx.positions,
        )
        assert mixer is not None
        self._advance(index, mixer, layer.mamba_decoder.input_layernorm(h + layer.linear(shared)), cache)

    def _modules(self, index: int) -> Iterator[nn.Module]:
        # A shared transformer holds one adapter for each layer that shares it; a token takes this layer's.
        ids = self.config.hybrid_layer_ids
        own = f"{ids.index(index)}." if index in ids else ""
        for name, module in self.layers[index].named_modules():
            _, adapter, slot = name.partition("_adapter_list.")
            if not adapter or f"{slot}.".startswith(own):
                yield module

    def _state_macs(self, index: int) -> int:
        mixer = self._parts(self.layers[index]).mamba
        assert mixer is not None
        cost = self._mixer_cost(mixer)
        return self._layer_macs(index) - cost.layer + cost.state


class JambaBackbone(TokenByToken, HybridBackbone):
    """Jamba: Mamba-1 mixers, some experts, no positions at all."""

    norms_steps = True

    def _advance(self, index: int, mixer: Any, x: Tensor, cache: StackedCache) -> None:
        conv_state, ssm_state = (part[0] for part in cache.recurrent(index, index + 1))
        advance_mamba1(mixer, x, conv_state, ssm_state, self.norms_steps)
