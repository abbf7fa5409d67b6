"""A new block as a copy of the backbone's last layer, where the two have the same form: half of the training saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dynamax_llm.backbones import Backbone
from dynamax_llm.backbones.stacking import dense_weight
from dynamax_llm.exits.block_kinds.base import Block
from dynamax_llm.exits.block_kinds.transformer import TransformerBlock

#: Families whose last layer is what a transformer block computes, up to biases.
SAME_FORM = ("llama", "mistral", "qwen2")


@torch.no_grad()
def start_from_last_layer(block: Block, backbone: Backbone) -> bool:
    """Copy the last layer's weights into ``block`` if both are of one form and size; returns whether they are."""
    if not isinstance(block, TransformerBlock) or backbone.model_type not in SAME_FORM:
        return False
    layer: Any = backbone.layers[-1]
    pairs: list[tuple[nn.Parameter, nn.Module]] = [
        (block.norm, layer.input_layernorm),
        (block.query, layer.self_attn.q_proj),
        (block.key, layer.self_attn.k_proj),
        (block.value, layer.self_attn.v_proj),
        (block.out, layer.self_attn.o_proj),
        (block.feed_forward.norm, layer.post_attention_layernorm),
        (block.feed_forward.gate, layer.mlp.gate_proj),
        (block.feed_forward.up, layer.mlp.up_proj),
        (block.feed_forward.down, layer.mlp.down_proj),
    ]
    weights = [(own, dense_weight(module)) for own, module in pairs]
    if block.shape.paired:
        weights = _side_by_side(block, weights)
    if any(own.shape != weight.shape for own, weight in weights):
        return False
    for own, weight in weights:
        own.copy_(weight)
    return True


def _side_by_side(
    block: TransformerBlock, weights: list[tuple[nn.Parameter, Tensor]]
) -> list[tuple[nn.Parameter, Tensor]]:
    """The same for a block that reads pairs: both halves as the layer reads its stream, which is normed without a
    weight, because the block's own stream begins there."""
    norm = weights[0][1]
    found = [(block.norm, torch.ones_like(block.norm))]
    for own, weight in weights[1:4]:
        found.append((own, torch.cat((weight * norm, weight * norm), dim=1) * 0.7))
    return found + weights[4:]
