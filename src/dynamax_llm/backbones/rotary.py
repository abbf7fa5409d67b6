"""Rotary positions of every kind that transformers has, those that depend on the text's length among them.

With the kinds ``dynamic`` and ``longrope`` the frequencies are a function of how long the text is when a token enters.
The stock module takes one length for all tokens of a pass and keeps it, so a pass over several tokens that continue a
text would give them other positions than single steps do. Here every token has the length of its own step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def depends_on_length(rotary: nn.Module) -> bool:
    """Whether this stock rotary module changes its frequencies with the length of the text."""
    kind = getattr(rotary, "rope_type", "default")
    return "dynamic" in kind or kind == "longrope"


def rotary_positions(
    rotary: nn.Module, h: Tensor, positions: Tensor, past: int, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (B or 1, T, rotary dims), of tokens h (B, T, d) at ``positions`` (B or 1, T) after ``past``.

    A prompt (``past`` 0) has one length for all its tokens, as in the stock model. The stock module is not changed.
    """
    if not depends_on_length(rotary):
        return rotary(h, position_ids=positions)
    lengths = text_lengths(positions, past, padding)
    distinct, which = lengths.unique(return_inverse=True)
    parts = [_frequencies(rotary, length) for length in distinct]
    frequencies = torch.stack([part for part, _ in parts])[which]  # (B or 1, T, half the rotary dims)
    scale = torch.tensor([scale for _, scale in parts], device=h.device)[which].unsqueeze(-1)
    angles = positions.unsqueeze(-1).float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scale).to(h.dtype), (angles.sin() * scale).to(h.dtype)


def text_lengths(positions: Tensor, past: int, padding: Tensor | None) -> Tensor:
    """The length (B or 1, T) of the text in the step in which each token enters: the longest row's, as in a batch.

    Rows of a batch that starts with left pads (``padding`` (B, past + T), 0 = pad) enter their tokens together: a row
    that began with n pads is n tokens shorter than the longest.
    """
    shorter = torch.zeros_like(positions[:, :1])
    if padding is not None:
        leading = (padding.cumsum(-1) == 0).sum(-1, keepdim=True)
        shorter = leading - leading.min()
    lengths = positions + shorter + 1
    return lengths.max().expand_as(lengths) if past == 0 else lengths


def _frequencies(rotary: Any, length: Tensor) -> tuple[Tensor, float]:
    """The module's frequencies and scale for a text of this length, as the stock module would set them."""
    config, kind, device = rotary.config, rotary.rope_type, length.device
    if kind == "longrope":
        original = config.rope_parameters["original_max_position_embeddings"]
        long, _ = ROPE_INIT_FUNCTIONS[kind](config, device, seq_len=original + 1)
        return (long if length > original else rotary.original_inv_freq.to(device)), float(rotary.attention_scaling)
    if length <= rotary.original_max_seq_len:
        return rotary.original_inv_freq.to(device), float(rotary.attention_scaling)
    return ROPE_INIT_FUNCTIONS[kind](config, device, seq_len=length)
