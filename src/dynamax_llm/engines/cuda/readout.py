"""The final norm and the LM head, in one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.engines.cuda.launch import linear
from dynamax_llm.engines.cuda.passes import Pass


def final_norm(backbone: Backbone) -> torch.nn.Module:
    """The norm between the last layer and the LM head."""
    inner = backbone.model
    return inner.backbone.norm_f if backbone.kinds[0] == "mamba" else inner.model.norm


def read_out(backbone: Backbone, h: Tensor, logits: Tensor, p: Pass | None = None) -> Tensor:
    """``logits`` (M, V), float32, of h (M, d); ``p``: the pass that has just been through the last layer."""
    norm = final_norm(backbone)
    head, eps = backbone.model.get_output_embeddings().weight, norm.variance_epsilon
    if p is None or p.ready is None:
        linear(h, head, logits, norm=norm.weight, eps=eps)
    else:
        linear(p.ready, head, logits, eps=eps, sums=p.sums)
    return logits
