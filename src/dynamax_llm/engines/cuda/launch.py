"""Kernels launched: which block sizes, which grid, and what a device without a GPU makes of it.

Without a GPU the kernels run in Triton's interpreter, if it was asked for when they were defined
(``TRITON_INTERPRET=1``): that is how tests run them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynamax_llm.engines.cuda.kernels.product import linear_kernel, norm_groups_kernel, ready_kernel
from dynamax_llm.engines.cuda.passes import Pass
from dynamax_llm.engines.cuda.tiles import blocks, power_of_two, tile


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
    sums: Tensor | None = None,
    size: int = 0,
) -> None:
    """out (M, N) = norm(x) weightᵀ, x (M, K), in one kernel; ``second``: silu of that, times norm(x) secondᵀ.

    ``sums``: x is ready, weighted by the norm, and these (M, parts) are its sums of squares. With ``size`` the norm is
    over groups of so many inputs, with (M, K / size * parts) sums of squares.
    """
    _linear(x, weight, out, second, bias, norm, eps, sums, size, None, None)


def add_linear(
    x: Tensor,
    weight: Tensor,
    p: Pass,
    next_norm: Tensor,
    *,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    sums: Tensor | None = None,
    size: int = 0,
    keep: Tensor | None = None,
) -> None:
    """p.h += norm(x) weightᵀ where rows are live; and p.ready, p.sums for the norm of weight ``next_norm``.

    What p.h was before is left in ``keep`` (M, d), if given.
    """
    _linear(x, weight, p.h, None, bias, norm, eps, sums, size, p, next_norm, keep)


def _linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    second: Tensor | None,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    sums: Tensor | None,
    size: int,
    p: Pass | None,
    next_norm: Tensor | None,
    keep: Tensor | None = None,
) -> None:
    vectors, inputs = x.shape
    outputs = len(weight)
    t = tile(outputs, inputs, vectors, weight.dtype, pairs=second is not None, group=size)
    kind = "groups" if size else "ready" if sums is not None else "none" if norm is None else "whole"
    parts = 1 if sums is None else sums.shape[1] * size // inputs if size else sums.shape[1]
    programs = blocks(outputs, t.rows)
    if p is not None:
        p.prepare(programs, weight.dtype)
    anything = weight  # stands for what a kernel of this kind does not read
    linear_kernel[programs, blocks(vectors, t.vectors)](
        x,
        weight,
        anything if second is None else second,
        anything if bias is None else bias,
        anything if norm is None else norm,
        anything if sums is None else sums,
        anything if p is None else p.live,
        out,
        anything if next_norm is None else next_norm,
        anything if p is None else p.ready,
        anything if p is None else p.sums,
        anything if keep is None else keep,
        vectors,
        outputs,
        inputs,
        t.vectors,
        t.rows,
        t.columns,
        kind,
        max(size, 1),
        parts,
        power_of_two(parts),
        eps,
        second is not None,
        bias is not None,
        p is not None,
        keep is not None,
        t.stages,
        overlaps(x.device),
        **settings(x.device, t.warps),
    )


def norm_groups(x: Tensor, norm: Tensor, sums: Tensor, size: int, eps: float) -> None:
    """RMSNorm of x (M, K) in place, over groups of ``size``, given (M, K / size * parts) sums of squares."""
    rows, width = x.shape
    norm_groups_kernel[rows, width // size](
        x,
        norm,
        sums,
        width,
        size,
        power_of_two(size),
        sums.shape[1] * size // width,
        eps,
        overlaps(x.device),
        **settings(x.device, 4),
    )


def ready_for(p: Pass, table: Tensor, column: int, first: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """p.h made ready for the norms of layers ``first`` to ``stop - 1``: (layers, M, d) and sums of squares (M, 1).

    ``table`` (all layers, columns) holds the norms' addresses in ``column``.
    """
    width = p.h.shape[1]
    out = p.buffer(f"ready {stop - first}", stop - first, p.rows, width, dtype=dtype)
    sums = p.buffer("ready sums", p.rows, 1, dtype=torch.float32)
    ready_kernel[p.rows, stop - first](
        p.h,
        table,
        out,
        sums,
        first,
        p.rows,
        table.shape[1],
        column,
        width,
        power_of_two(width),
        overlaps(out.device),
        **settings(out.device, 8),
    )
    return out, sums
