"""Skipped layers all read the same h, so their state projections are one product: the stacked weights for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: Stacked rows are a copy. Above this share of the layers' own bytes (and above 64 MiB) layers are updated one by one.
MEMORY_SHARE = 0.05
MEMORY_FLOOR = 64 * 2**20

#: ``rows(layer)`` names a layer's input norm and the (linear, rows) whose product makes its state.
Rows = Callable[[nn.Module], tuple[nn.Module, tuple[tuple[nn.Module, slice], ...]]]


def normalise(h: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMS-normalise h (..., d) in float32 without a weight, cast to ``dtype`` as stock RMSNorm does."""
    x = h.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).to(dtype)


@dataclass(frozen=True)
class Stack:
    """State rows of n consecutive layers: ``weight`` (n, R, d), ``norm`` (n, d), ``bias`` (n, R) or None.

    In float32 the norm's weight is already folded into ``weight``.
    """

    weight: Tensor
    norm: Tensor
    bias: Tensor | None
    eps: float

    def project(self, x: Tensor) -> Tensor:
        """x (B, T, d), normalised but not weighted, to every layer's rows (n, B * T, R)."""
        flat = x.reshape(-1, x.shape[-1])
        if flat.dtype == torch.float32:
            out = torch.matmul(flat, self._folded.t()).view(flat.shape[0], len(self.weight), -1).transpose(0, 1)
        else:
            # Folding would round the weights once more; weighting the input is what the layer itself does.
            out = torch.bmm(flat * self.norm.unsqueeze(1), self.weight.transpose(1, 2))
        return out if self.bias is None else out + self.bias.unsqueeze(1)

    @property
    def _folded(self) -> Tensor:
        """All rows as one matrix (n * R, d)."""
        return self.weight.reshape(-1, self.weight.shape[-1])

    def narrow(self, first: int, stop: int) -> Stack:
        """Layers ``first`` to ``stop - 1`` of this stack, as views."""
        bias = None if self.bias is None else self.bias[first:stop]
        return Stack(self.weight[first:stop], self.norm[first:stop], bias, self.eps)


class StackedWeights:
    """Builds the stack on first use, rebuilds it when a weight was replaced or changed, declines where it must."""

    def __init__(self, layers: nn.ModuleList, rows: Rows) -> None:
        self.layers, self._rows = layers, rows
        self._built: Stack | None = None
        self._signature: tuple | None = None
        self._slices: dict[tuple[int, int], Stack] = {}

    def refresh(self) -> None:
        """Check the stack against the weights; called once per generation, not per token."""
        sources = [(norm, parts) for norm, parts in map(self._rows, self.layers)]
        linears = [linear for _, parts in sources for linear, _ in parts]
        tensors = [norm.weight for norm, _ in sources] + [linear.weight for linear in linears]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        signature = tuple((tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors + biases)
        if signature == self._signature:
            return
        self._signature, self._slices = signature, {}
        self._built = self._build(sources) if self._worthwhile(tensors) else None

    def get(self, first: int, stop: int) -> Stack | None:
        """The stack of layers ``first`` to ``stop - 1``, or None where layers must go one by one."""
        if self._signature is None:
            self.refresh()
        if self._built is None:
            return None
        if (first, stop) not in self._slices:
            self._slices[first, stop] = self._built.narrow(first, stop)
        return self._slices[first, stop]

    def _worthwhile(self, tensors: list[Tensor]) -> bool:
        kind = type(self.layers[0])
        plain = all(type(layer) is kind and not getattr(layer, "_hf_hook", None) for layer in self.layers)
        one_place = len({(tensor.device, tensor.dtype) for tensor in tensors}) == 1
        if not (plain and one_place and tensors[0].is_floating_point() and tensors[0].device.type != "meta"):
            return False  # offloaded, sharded, quantised or mixed layers keep their own products
        copied = sum(linear.weight[rows].nbytes for layer in self.layers for linear, rows in self._rows(layer)[1])
        whole = sum(parameter.nbytes for parameter in self.layers.parameters())
        return copied <= max(MEMORY_FLOOR, MEMORY_SHARE * whole)

    @staticmethod
    @torch.no_grad()
    def _build(sources: list) -> Stack:
        norm = torch.stack([source.weight for source, _ in sources])  # (n, d)
        weight = torch.stack([torch.cat([linear.weight[rows] for linear, rows in parts]) for _, parts in sources])
        if weight.dtype == torch.float32:
            weight = weight * norm.unsqueeze(1)
        return Stack(weight, norm, _stacked_bias(sources, weight), float(sources[0][0].variance_epsilon))


def _stacked_bias(sources: list, weight: Tensor) -> Tensor | None:
    """Biases (n, R) of the stacked rows, zeros where a linear has none; None if no linear has any."""
    if all(linear.bias is None for _, parts in sources for linear, _ in parts):
        return None
    stacked = []
    for _, parts in sources:
        whole = [weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias for linear, _ in parts]
        stacked.append(torch.cat([bias[rows] for bias, (_, rows) in zip(whole, parts, strict=True)]))
    return torch.stack(stacked)
