"""Mamba-2 (arXiv 2405.21060): each layer remembers a short convolution window and a matrix-valued SSM state."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import create_recurrent_attention_mask

from dynamax_llm.backbones.base import Backbone, Context, Costs, LayerCost, linear_macs
from dynamax_llm.backbones.cache import StackedCache
from dynamax_llm.backbones.stacking import StackedWeights, normalise


class Mamba2Backbone(Backbone):
    """Stock Mamba-2, Codestral Mamba among them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._stacked = StackedWeights(self.layers, self._rows)
        self._small: dict[tuple[int, int], tuple[Tensor, ...]] = {}  # by run of layers, since the last refresh

    def _find_layers(self) -> nn.ModuleList:
        return self.model.backbone.layers

    def _find_kinds(self) -> tuple[str, ...]:
        return ("mamba",) * self.n_layers

    def context(
        self, h: Tensor, *, past: int = 0, padding: Tensor | None = None, embedded: Tensor | None = None
    ) -> Context:
        if h.shape[1] == 1 or padding is None:
            return Context()
        return Context(
            padding=create_recurrent_attention_mask(config=self.config, inputs_embeds=h, attention_mask=padding)
        )

    def layer(self, index: int, h: Tensor, cache: StackedCache | None, ctx: Context) -> Tensor:
        return self.layers[index](h, cache_params=cache, attention_mask=ctx.padding)

    @staticmethod
    def _rows(layer: nn.Module) -> tuple[nn.Module, tuple[tuple[nn.Module, slice], ...]]:
        mixer = layer.mixer  # in_proj's rows are gate, x, B, C, dt: the state never sees the gate
        return layer.norm, ((mixer.in_proj, slice(mixer.intermediate_size, None)),)

    def update_state(self, index: int, h: Tensor, cache: StackedCache, ctx: Context) -> None:
        if h.shape[1] > 1 or cache.get_recurrent_state(index) is None:
            self.layer(index, h, cache, ctx)  # a parallel scan yields output and state together
            return
        layer = self.layers[index]
        x = layer.norm(h.to(layer.norm.weight.dtype))
        _, ((linear, rows),) = self._rows(layer)
        bias = None if linear.bias is None else linear.bias[rows]
        projected = F.linear(x, linear.weight[rows], bias).transpose(0, 1)  # (1, B, R)
        self._advance(projected, self._small_weights(index, index + 1), *cache.recurrent(index, index + 1))

    def update_states(self, first: int, stop: int, h: Tensor, cache: StackedCache, ctx: Context) -> None:
        single = h.shape[1] == 1 and stop - first > 1 and cache.get_recurrent_state(first) is not None
        weights = self._stacked.get(first, stop) if single and cache.stackable(first, stop) else None
        if weights is None:
            return super().update_states(first, stop, h, cache, ctx)
        rows = weights.project(normalise(h, weights.eps, self.dtype))  # (n, B, R)
        self._advance(rows, self._small_weights(first, stop), *cache.recurrent(first, stop))

    def _small_weights(self, first: int, stop: int) -> tuple[Tensor, ...]:
        """conv weight (n, 1, C, K), conv bias (n, 1, C), dt bias (n, 1, H), A (n, 1, H) of a run of layers."""
        if (first, stop) not in self._small:
            mixers = [layer.mixer for layer in self.layers[first:stop]]
            with torch.no_grad():
                conv = torch.stack([mixer.conv1d.weight.squeeze(1) for mixer in mixers]).unsqueeze(1)
                zero = conv.new_zeros(conv.shape[2])
                bias = torch.stack([zero if mixer.conv1d.bias is None else mixer.conv1d.bias for mixer in mixers])
                dt_bias = torch.stack([mixer.dt_bias for mixer in mixers])
                decay = -torch.exp(torch.stack([mixer.A_log.float() for mixer in mixers]))
            self._small[first, stop] = (conv, bias.unsqueeze(1), dt_bias.unsqueeze(1), decay.unsqueeze(1))
        return self._small[first, stop]

    def _advance(self, rows: Tensor, small: tuple[Tensor, ...], conv_state: Tensor, ssm_state: Tensor) -> None:
        """One token through conv window and SSM of n layers, in place, in the order stock single steps round.

        rows (n, B, C + H): x, B and C before the convolution, then dt. No clamp on dt: the stock step has none.
        """
        mixer = self.layers[0].mixer
        conv_weight, conv_bias, dt_bias, decay = small
        fresh, dt = rows.split([mixer.conv_dim, mixer.num_heads], dim=-1)
        conv_state.copy_(torch.cat((conv_state[..., 1:], fresh.unsqueeze(-1)), dim=-1))
        used = mixer.intermediate_size + mixer.n_groups * mixer.ssm_state_size  # C is only for the output
        window = conv_state[..., :used, :].to(conv_weight.dtype)
        active = mixer.act((window * conv_weight[..., :used, :]).sum(-1) + conv_bias[..., :used])
        n, batch, _ = active.shape
        x = active[..., : mixer.intermediate_size].view(n, batch, mixer.num_heads, mixer.head_dim, 1)
        b = active[..., mixer.intermediate_size :].view(n, batch, mixer.n_groups, 1, 1, mixer.ssm_state_size)
        dt = F.softplus(dt + dt_bias)  # (n, B, H)
        per_group = (n, batch, mixer.n_groups, -1, 1, 1)
        step = (dt.view(per_group) * b).flatten(2, 3)  # (n, B, H, 1, N)
        ssm_state.mul_(torch.exp(dt.float() * decay)[..., None, None]).add_(step * x)

    def refresh(self) -> None:
        self._stacked.refresh()
        self._small.clear()

    def final_norm(self, h: Tensor) -> Tensor:
        return self.model.backbone.norm_f(h).to(self.model.get_output_embeddings().weight.dtype)

    def costs(self) -> Costs:
        layers = []
        for layer in self.layers:
            mixer = layer.mixer
            conv = mixer.conv_dim * mixer.conv_kernel_size
            cell = mixer.intermediate_size * mixer.ssm_state_size  # multiply-accumulates of one pass over the state
            state = linear_macs(mixer.in_proj) - mixer.intermediate_size * self.width + conv + 2 * cell
            whole = linear_macs(mixer.in_proj, mixer.out_proj) + conv + 3 * cell
            layers.append(LayerCost(layer=whole, state=state))
        return Costs(layers=tuple(layers), readout=linear_macs(self.model.get_output_embeddings()))
