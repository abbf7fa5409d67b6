"""The parts of stock transformers models that adapters read, as types.

These attributes have the same names in every family. What a family names in its own way (the list of layers, the final
norm) or has alone is read by its adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, overload

from torch import Tensor, nn

if TYPE_CHECKING:

    class Layers(Protocol):
        """A model's ``nn.ModuleList`` of decoder layers, whose attributes depend on the family."""

        @overload
        def __getitem__(self, index: int) -> Any: ...
        @overload
        def __getitem__(self, index: slice) -> Layers: ...
        def __iter__(self) -> Iterator[Any]: ...
        def __delitem__(self, index: int) -> None: ...
        def __len__(self) -> int: ...
        def parameters(self) -> Iterator[nn.Parameter]: ...

    class Norm(Protocol):
        """An RMSNorm over the last axis."""

        weight: Tensor
        variance_epsilon: float

        def __call__(self, x: Tensor) -> Tensor: ...

    class SelfAttention(Protocol):
        """Attention with a K/V cache. Projections may be quantised or adapted modules."""

        head_dim: int
        k_proj: nn.Module
        v_proj: nn.Module

    class Mixer(Protocol):
        """A Mamba mixer of either kind."""

        intermediate_size: int
        ssm_state_size: int
        in_proj: Any  # a linear module, perhaps quantised or adapted
        out_proj: nn.Module
        conv1d: nn.Conv1d
        act: Callable[[Tensor], Tensor]
        A_log: Tensor

        def modules(self) -> Iterator[nn.Module]: ...

    class Mamba2Mixer(Mixer, Protocol):
        """State per head and group; dt, B and C come from ``in_proj``."""

        conv_dim: int
        num_heads: int
        head_dim: int
        n_groups: int
        dt_bias: Tensor
        chunk_size: int
        time_step_limit: tuple[float, float]

    class Mamba1Mixer(Mixer, Protocol):
        """State per channel; dt, B and C come from the convolved input, through ``x_proj`` and ``dt_proj``."""

        time_step_rank: int
        x_proj: nn.Module
        dt_proj: nn.Module

else:  # at run time they are modules, whose parts an isinstance check of a protocol does not find
    Layers = Norm = SelfAttention = Mixer = Mamba2Mixer = Mamba1Mixer = nn.Module
