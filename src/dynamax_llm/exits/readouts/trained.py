"""What readouts with trained blocks share: the block's options, and reading through a part of the vocabulary.

A *vocabulary* of the K most frequent tokens keeps the LM head small: its rows are gathered once, and an exit then
speaks only these tokens. Shapes: B batch, T tokens, d width, V vocabulary, K tokens of a part of it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynamax_llm.backbones.base import Backbone
from dynamax_llm.errors import UsageError
from dynamax_llm.exits.block_kinds.base import Block, BlockShape
from dynamax_llm.exits.config import LEAST_CANDIDATES, ExitConfig, ReadoutOptions
from dynamax_llm.exits.readouts.base import Readout
from dynamax_llm.exits.registries import BLOCKS
from dynamax_llm.shapes import Hidden, Spoken


@dataclass(frozen=True)
class TrainedOptions(ReadoutOptions):
    """Options of a readout with trained blocks.

    ``block``: a kind of ``BLOCKS``. ``vocabulary``: how many tokens it speaks, the most frequent of its training text;
    0: all. The rest are sizes as in ``BlockShape``; 0 takes the backbone's own where its last layer is an attention
    layer, else what follows from the width.
    """

    block: str = "transformer"
    vocabulary: int = 8192
    block_heads: int = 0
    block_kv_heads: int = 0
    block_head_width: int = 0
    block_inner: int = 0
    block_window: int = 512
    block_theta: float = 0.0

    def check(self, layers: Sequence[int], n_layers: int) -> None:
        BLOCKS.lookup(self.block)
        if self.vocabulary and self.vocabulary < LEAST_CANDIDATES:
            raise UsageError(f"vocabulary {self.vocabulary!r}: give at least {LEAST_CANDIDATES} tokens, or 0 for all.")
        if self.block_window < 2:
            raise UsageError(f"block_window {self.block_window!r}: give the tokens a block reaches back, at least 2.")
        for name in ("block_heads", "block_kv_heads", "block_head_width", "block_inner", "block_theta"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} {getattr(self, name)!r}: give 0 for its default, or a positive number.")
        if self.block_head_width % 2:
            raise UsageError(f"block_head_width {self.block_head_width}: give an even number: channels turn in pairs.")
        if self.block_heads:
            self._check_groups(self.block_heads, self.block_kv_heads)

    @staticmethod
    def _check_groups(heads: int, groups: int) -> None:
        if groups and heads % groups:
            raise UsageError(f"block_kv_heads {groups}: give a divisor of the {heads} heads.")

    @property
    def paired(self) -> bool:
        """Whether the block reads pairs of vectors side by side."""
        return False

    def shape(self, width: int) -> BlockShape:
        """Of a block of this width. Raises UsageError if its heads do not share keys and values evenly."""
        shape = BlockShape.of(
            width,
            heads=self.block_heads,
            kv_heads=self.block_kv_heads,
            head_width=self.block_head_width,
            inner=self.block_inner,
            window=self.block_window,
            theta=self.block_theta or 10_000.0,
            paired=self.paired,
        )
        self._check_groups(shape.heads, shape.kv_heads)
        return shape

    def new_block(self, width: int) -> Block:
        """An untrained block."""
        return BLOCKS.lookup(self.block)(self.shape(width))


class TrainedWeights(nn.Module):
    """The tokens a readout speaks, ascending (K,), where that is a part of the vocabulary."""

    tokens: Tensor | None

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.arange(vocabulary) if vocabulary else None)


class TrainedReadout(Readout):
    """A readout with trained blocks; heads read the block's output in place of h."""

    Options: type[ReadoutOptions] = TrainedOptions
    recurrent = True
    heads_read_output = True

    def __init__(self, backbone: Backbone, config: ExitConfig, weights: nn.Module | None = None) -> None:
        assert isinstance(weights, TrainedWeights)
        if next(weights.parameters()).dtype != backbone.dtype:
            weights = copy.deepcopy(weights).to(backbone.dtype)
        super().__init__(backbone, config, weights)
        if weights.tokens is not None:
            self.vocabulary = weights.tokens.to(backbone.device)
            self._rows = backbone.output_rows(self.vocabulary)  # (K, d)
            bias = getattr(backbone.model.get_output_embeddings(), "bias", None)
            self._bias = None if bias is None else bias[self.vocabulary]

    @classmethod
    def options_of(cls, config: ExitConfig) -> TrainedOptions:
        """The options in ``config``, which is one of this readout."""
        assert isinstance(config.readout_options, TrainedOptions)
        return config.readout_options

    @classmethod
    def fitted(cls, config: ExitConfig, backbone: Backbone) -> ExitConfig:
        options = cls.options_of(config)
        if options.vocabulary > backbone.vocab_size:
            raise UsageError(
                f"vocabulary {options.vocabulary}: this model has {backbone.vocab_size} tokens. Give at most that "
                "many, or 0 for all."
            )
        own = dataclasses.asdict(options)
        sizes = attention_sizes(backbone)
        changes: dict[str, Any] = {name: value for name, value in sizes.items() if not own[name]}
        options = dataclasses.replace(options, **changes)
        options.shape(backbone.width)
        return dataclasses.replace(config, readout_options=options)

    @classmethod
    def fault(cls, weights: nn.Module, vocab_size: int) -> str | None:
        tokens = getattr(weights, "tokens", None)
        if tokens is None:
            return None
        if tokens.dtype != torch.int64:
            return f"its vocabulary is of {tokens.dtype}, not torch.int64"
        if len(tokens) > vocab_size or int(tokens[0]) < 0 or int(tokens[-1]) >= vocab_size:
            return f"its vocabulary of {len(tokens)} tokens is not part of the model's {vocab_size}"
        return None if bool((tokens[1:] > tokens[:-1]).all()) else "its vocabulary is not in ascending order"

    def scores(self, exit: int, moved: Hidden) -> Spoken:
        if self.vocabulary is None:
            return self.backbone.readout(moved)
        return self.backbone.readout_through(moved, self._rows, self._bias)

    def head_macs(self) -> int:
        if self.vocabulary is None:
            return self.backbone.costs().readout
        return len(self.vocabulary) * self.backbone.width


def attention_sizes(backbone: Backbone) -> dict[str, float | int]:
    """The block sizes of the backbone's last layer, by option; nothing where that is not an attention layer."""
    if backbone.kinds[-1] != "attention":
        return {}
    config = backbone.config
    heads = int(config.num_attention_heads)
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        "block_heads": heads,
        "block_kv_heads": int(getattr(config, "num_key_value_heads", None) or heads),
        "block_head_width": int(getattr(config, "head_dim", None) or backbone.width // heads),
        "block_inner": int(config.intermediate_size),
        "block_theta": float(rope.get("rope_theta", 10_000.0)),
    }
