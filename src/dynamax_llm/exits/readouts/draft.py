"""The ``draft`` readout: an exit of depth 0, which runs no layer of the backbone at all.

Its block reads the embedding of the newest token and, as features, h after a few *tapped* layers at the last position
that ran at full depth. While it drafts, the block's own output takes the features' place, so a chain of tokens follows
without the backbone; a pass of the backbone over the chain then checks it (``verify``) and gives features again.
(Drafting on a target's features is the idea of EAGLE, arXiv 2401.15077; several layers and training over own outputs
are EAGLE-3's, arXiv 2503.01840.)

Shapes: B batch, T tokens, d width, N tapped layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from dynamax_llm.backbones.base import Backbone
from dynamax_llm.errors import ExitPlacementError, UsageError
from dynamax_llm.exits.block_kinds.base import linear, rms_norm
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.features import ExitFeatures
from dynamax_llm.exits.readouts.trained import TrainedOptions, TrainedReadout, TrainedWeights
from dynamax_llm.exits.state import State

#: Where features are taken by default, as shares of the depth.
TAPS = (1 / 3, 2 / 3, 1.0)
#: How the embedding and the features reach the block: mixed by a matrix, or side by side.
JOINS = ("matrix", "concatenate")


@final
@dataclass(frozen=True)
class DraftOptions(TrainedOptions):
    """``taps``: depths whose h are the features, ascending; empty: at a third, two thirds and the last layer.

    ``join``: "matrix", one matrix makes the block's input of embedding and features; "concatenate", a transformer block
    reads both side by side, as EAGLE-3's does (what ``exits.speculators`` can export).
    """

    vocabulary: int = 16384
    taps: tuple[int, ...] = ()
    join: str = "matrix"

    def __post_init__(self) -> None:
        object.__setattr__(self, "taps", tuple(self.taps))

    def check(self, layers: Sequence[int], n_layers: int) -> None:
        super().check(layers, n_layers)
        if tuple(layers) != (0,):
            raise ExitPlacementError(f"exits after layers {tuple(layers)}: a draft is one exit, of depth 0.")
        if self.join not in JOINS:
            raise UsageError(f"join {self.join!r}: give one of {', '.join(JOINS)}.")
        if self.paired and self.block != "transformer":
            raise UsageError(
                f"join 'concatenate' with the block {self.block!r}: give the block transformer, or matrix."
            )
        ascending = list(self.taps) == sorted(set(self.taps))
        if not ascending or any(not 1 <= depth <= n_layers for depth in self.taps):
            raise UsageError(f"taps {self.taps}: give depths from 1 to {n_layers}, ascending, each once.")

    @property
    def paired(self) -> bool:
        return self.join == "concatenate"


@final
class DraftWeights(TrainedWeights):
    """Norms and the matrix of the features, norms of embedding and features and the matrix that joins them unless the
    block reads them side by side, and the block."""

    def __init__(self, config: ExitConfig, width: int) -> None:
        options = config.readout_options
        assert isinstance(options, DraftOptions)
        super().__init__(options.vocabulary)
        taps = max(len(options.taps), 1)
        self.tap_norm = nn.Parameter(torch.ones(taps, width))
        shares = [0.2] * (taps - 1) + [0.8]
        self.mix = nn.Parameter(torch.cat([torch.eye(width) * share for share in shares], dim=1))
        if not options.paired:
            self.embedding_norm, self.feature_norm = (nn.Parameter(torch.ones(width)) for _ in range(2))
            self.join = nn.Parameter(torch.cat([torch.eye(width)] * 2, dim=1) * 0.7)
        self.block = options.new_block(width)

    def mixed(self, tapped: Sequence[Tensor]) -> Tensor:
        """Features (B, T, d) of h (B, T, d) after every tapped layer."""
        normed = [rms_norm(h, weight) for h, weight in zip(tapped, self.tap_norm, strict=True)]
        return linear(torch.cat(normed, dim=-1), self.mix)

    def joined(self, embedded: Tensor, features: Tensor) -> Tensor:
        """The block's input (B, T, d or 2 d) from embeddings of tokens and the features before each, (B, T, d) both."""
        if self.block.shape.paired:
            return torch.cat((embedded, features.to(embedded.dtype)), dim=-1)
        parts = (rms_norm(embedded, self.embedding_norm), rms_norm(features, self.feature_norm))
        return linear(torch.cat(parts, dim=-1), self.join)

    @property
    def join_size(self) -> int:
        """Weights of the matrix that joins embedding and features."""
        return 0 if self.block.shape.paired else self.join.numel()


@final
class DraftReadout(TrainedReadout):
    """The chain's next token: final norm and LM head of the block's output. State: the features, then the block's."""

    Options = DraftOptions
    learner = "draft"
    drafts = True

    @classmethod
    def new_weights(cls, config: ExitConfig, width: int) -> DraftWeights:
        return DraftWeights(config, width)

    @classmethod
    def fitted(cls, config: ExitConfig, backbone: Backbone) -> ExitConfig:
        config = super().fitted(config, backbone)
        options = config.readout_options
        assert isinstance(options, DraftOptions)
        if not options.taps:
            taps = sorted({max(1, round(share * backbone.n_layers)) for share in TAPS})
            options = dataclasses.replace(options, taps=tuple(taps))
        return dataclasses.replace(config, readout_options=options)

    @property
    def taps(self) -> tuple[int, ...]:
        assert isinstance(self.config.readout_options, DraftOptions)
        return self.config.readout_options.taps

    @property
    def _draft(self) -> DraftWeights:
        assert isinstance(self.weights, DraftWeights)
        return self.weights

    def initial_state(self, batch: int, device: torch.device | str = "cpu") -> list[State]:
        block = self._draft.block
        features = torch.zeros(batch, 1, self.backbone.width, dtype=block.dtype, device=device)
        return [(features, *block.initial_state(batch, device))]

    def transform(
        self, exit: int, h: Tensor, state: State | None = None, padding: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """The block's output for one token, h (B, 1, d) its embedding; it becomes the features of the next."""
        assert state is not None and h.shape[1] == 1, "a draft reads one token at a time, from a state"
        output, after = self._draft.block(self._draft.joined(h, state[0]), state[1:])
        return output, (output, *after)

    def advance(
        self, first: int, h: Tensor, features: ExitFeatures, states: list[State] | None, padding: Tensor | None = None
    ) -> list[State] | None:
        return states  # there is no exit before this one

    def observe(
        self,
        embedded: Tensor,
        tapped: Sequence[Tensor],
        states: list[State],
        padding: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> list[State]:
        features, *past = states[0]
        mixed = self._draft.mixed(tapped)
        if padding is not None:
            mixed = mixed * padding.unsqueeze(-1).to(mixed.dtype)
        before = torch.cat((features, mixed[:, :-1]), dim=1)  # each token follows the features of the one before it
        after = self._draft.block.update(self._draft.joined(embedded, before), tuple(past), padding, counts)
        if counts is None:
            newest = mixed[:, -1:]
        else:
            newest = mixed[torch.arange(len(mixed), device=mixed.device), counts - 1].unsqueeze(1)
        return [(newest, *after)]

    def transform_macs(self, exit: int) -> int:
        return self._draft.join_size + self._draft.block.macs()

    def update_macs(self, exit: int) -> int:
        return self._draft.join_size + self._draft.mix.numel() + self._draft.block.update_macs()
