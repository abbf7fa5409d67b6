"""The layers of one family on the GPU engine, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from dynamax_llm.backbones.cache import StackedCache
from dynamax_llm.engines.cuda.attention import AttentionLayers
from dynamax_llm.engines.cuda.mamba import Mamba2Layers
from dynamax_llm.engines.cuda.passes import Pass


class Layers(Protocol):
    """All layers of one backbone, in memory that programs can be recorded over."""

    kernels: tuple[str, ...]
    replays: bool  # whether rolling back computes state again

    @property
    def replay_macs(self) -> int:
        """Multiply-accumulates of replaying one token in one layer."""

    def load(self, cache: StackedCache, length: int) -> None:
        """All rows go on from ``cache``, whose layers hold ``length`` slots."""

    def load_empty(self, like: StackedCache) -> None:
        """Rows hold nothing; ``like`` is the cache of one row."""

    def load_row(self, row: int, cache: StackedCache, length: int) -> None:
        """Row ``row`` goes on from ``length`` slots of ``cache``, a cache of one row."""

    def reserve(self, length: int) -> None:
        """Make room for ``length`` slots."""

    def layer(self, index: int, p: Pass, *, fresh: bool, keep: Tensor | None = None) -> None:
        """Layer ``index`` on p.h, in place where rows are live; every row's token goes into the layer's state."""

    def update_states(self, first: int, stop: int, p: Pass) -> None:
        """States of layers ``first`` to ``stop - 1``, all from p.h."""

    def replay(self, p: Pass) -> None:
        """States of all layers over tokens whose inputs are still kept, as p.slot names them."""

    def commit(self, buffer: int) -> None:
        """The states in ``buffer`` are those of every token so far."""

    def buffer_index(self, segment: int) -> Tensor:
        """(2,) the buffers that a segment's states are read from and written to."""

    def spare_bytes(self) -> int:
        """Memory that rolling back takes."""


#: By what a backbone's layers remember: (backbone, batch, largest pass, buffers of state, segment starts) to layers.
LAYERS: dict[str, Callable[..., Any]] = {"attention": AttentionLayers, "mamba": Mamba2Layers}
