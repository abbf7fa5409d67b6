"""Mamba-1 (arXiv 2312.00752): each layer remembers a short convolution window and a vector-valued SSM state.

``Mamba1Backbone`` drives mamba and falcon_mamba; jamba's mixers (see hybrid.py) are of this kind too. The stock mixer's
multi-token form always starts its scan at zero, which is silently wrong with a state in the cache. ``TokenByToken``
replaces it by single steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamax_llm.backbones.base import Backbone, Context
from dynamax_llm.backbones.cache import StackedCache
from dynamax_llm.backbones.mamba import MambaBackbone
from dynamax_llm.backbones.mixers import advance_mamba1


class TokenByToken(Backbone):
    """Goes through Mamba-1 layers token by token wherever the stock layer would restart its scan.

    Stands before the adapter among the bases: ``class Adapter(TokenByToken, SomeBackbone)``.
    """

    can_continue_multi_token = False
    #: True where a mixer's dt and B pass a norm each.
    norms_steps = False

    def layer(self, index: int, h: Tensor, cache: StackedCache | None, ctx: Context) -> Tensor:
        run = super().layer  # type: ignore[safe-super]  # of the adapter beside this class
        continues = cache is not None and self.kinds[index] == "mamba" and cache.get_recurrent_state(index) is not None
        if h.shape[1] == 1 or not continues:
            return run(index, h, cache, ctx)
        steps = [run(index, token, cache, _token(ctx, place)) for place, token in enumerate(h.split(1, dim=1))]
        return torch.cat(steps, dim=1)


def _token(ctx: Context, place: int) -> Context:
    """The context of one token for a Mamba layer: whether it is padding."""
    return Context(padding=None if ctx.padding is None else ctx.padding[:, place : place + 1])


class Mamba1Backbone(TokenByToken, MambaBackbone):
    """Stock Mamba. Skipped layers are updated one by one."""

    def update_state(self, index: int, h: Tensor, cache: StackedCache, ctx: Context) -> None:
        if cache.get_recurrent_state(index) is None or ctx.padding is not None:
            self.layer(index, h, cache, ctx)
            return
        layer = self.layers[index]
        x = layer.norm(h.to(layer.norm.weight.dtype))
        conv_state, ssm_state = (part[0] for part in cache.recurrent(index, index + 1))
        advance_mamba1(layer.mixer, x, conv_state, ssm_state, self.norms_steps)


class FalconMambaBackbone(Mamba1Backbone):
    """Falcon Mamba: norms on dt, B and C."""

    norms_steps = True
