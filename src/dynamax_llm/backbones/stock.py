"""The parts of stock transformers models that adapters read, as types.

Modules of a stock model have the same attributes in every family where they are named here; what a family names in
its own way (the list of layers, the final norm) is read by its adapter. A Mamba-1 mixer has no heads and groups, a
Mamba-2 mixer no ``x_proj`` and ``dt_proj``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, overload

from torch import Tensor, nn


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
    """Attention with a K/V cache."""

    head_dim: int
    k_proj: nn.Linear
    v_proj: nn.Linear
    k_norm: Norm  # Qwen3
    key_multiplier: float  # Falcon-H1


class Mixer(Protocol):
    """A Mamba mixer of either kind."""

    intermediate_size: int
    ssm_state_size: int
    in_proj: nn.Linear
    out_proj: nn.Linear
    conv1d: nn.Conv1d
    act: Callable[[Tensor], Tensor]
    A_log: Tensor
    # Mamba-2
    conv_dim: int
    num_heads: int
    head_dim: int
    n_groups: int
    dt_bias: Tensor
    chunk_size: int
    time_step_limit: tuple[float, float]
    ssm_in_multiplier: float  # Falcon-H1
    mup_vector: Tensor  # Falcon-H1: (1, 1, rows of in_proj)
    # Mamba-1
    time_step_rank: int
    x_proj: nn.Linear
    dt_proj: nn.Linear
    dt_layernorm: Norm  # Falcon Mamba and Jamba
    b_layernorm: Norm

    def modules(self) -> Iterator[nn.Module]: ...
