"""Kernels launched: which block sizes, which grid, and what a device without a GPU makes of it.

Without a GPU the kernels run in Triton's interpreter, if it was asked for when they were defined
(``TRITON_INTERPRET=1``): that is how tests run them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynamax_llm.engines.cuda.kernels.product import linear_kernel
from dynamax_llm.engines.cuda.tiles import blocks, tile


def settings(device: torch.device, warps: int = 4, stages: int | None = None) -> dict[str, Any]:
    """How to launch a kernel there; programmatic dependent launch wants Hopper or newer."""
    if device.type != "cuda":
        return {}
    found: dict[str, Any] = {"num_warps": warps, "launch_pdl": overlaps(device)}
    return found if stages is None else {**found, "num_stages": stages}


def overlaps(device: torch.device) -> bool:
    """Whether a kernel may start to load its weights before the one before it has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    second: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    squares: Tensor | None = None,
    size: int = 1,
    live: Tensor | None = None,
) -> None:
    """out (M, N) = norm(x) weightᵀ, x (M, K), in one kernel.

    ``second``: silu of that, times norm(x) secondᵀ. ``live`` (M,) int32: added to ``out`` instead, where it is not 0.
    ``squares`` (M, K / size * parts): the norm is over groups of ``size`` inputs, and these are their sums of squares.
    """
    vectors, inputs = x.shape
    outputs = len(weight)
    group = size if squares is not None else 0
    t = tile(outputs, inputs, vectors, weight.dtype, pairs=second is not None, group=group)
    kind = "none" if norm is None else "whole" if squares is None else "groups"
    parts = 1 if squares is None else squares.shape[1] * size // inputs
    anything = weight  # stands for what a kernel of this kind does not read
    linear_kernel[blocks(outputs, t.rows), blocks(vectors, t.vectors)](
        x,
        weight,
        anything if second is None else second,
        anything if bias is None else bias,
        anything if norm is None else norm,
        anything if squares is None else squares,
        anything if live is None else live,
        out,
        vectors,
        outputs,
        inputs,
        t.vectors,
        t.rows,
        t.columns,
        kind,
        size,
        parts,
        eps,
        second is not None,
        bias is not None,
        live is not None,
        t.stages,
        overlaps(x.device),
        **settings(x.device, t.warps),
    )
