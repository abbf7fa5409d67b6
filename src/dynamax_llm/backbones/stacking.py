"""Stacked weights: skipped layers all read the same h, so their state projections are one matrix product."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynamax_llm.backbones.stock import Layers
from dynamax_llm.errors import BackboneError

#: Stacked rows are a copy. Above this share of the layers' own bytes (and above 64 MiB) layers are updated one by one.
MEMORY_SHARE = 0.05
MEMORY_FLOOR = 64 * 2**20


#: A layer's input norm, and the (linear, rows) whose product makes its state. ``Rows`` finds them.
Source = tuple[Any, tuple[tuple[Any, slice], ...]]
Rows = Callable[[Any], Source]


def is_plain(module: nn.Module) -> bool:
    """Whether nothing but the module's class decides what it computes: no hooks, no replaced forward."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module's product is that of its ``weight`` and ``bias``; not so where it is quantised or adapted."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and is_plain(module)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a linear module or embedding, dequantised where it is stored in another form.

    Raises BackboneError, naming the module's and the weight's class, where that cannot be had.
    """
    stored: Any = module.weight
    weight = stored() if callable(stored) else stored
    if type(weight) is nn.Parameter:
        return weight
    try:
        return weight.dequantize().to(torch.float32)
    except Exception as error:  # each quantisation library raises its own
        raise BackboneError(
            f"the weight of a {type(module).__name__} is a {type(weight).__name__}, whose values cannot be read "
            f"({str(error).strip()[:100]}). Load the model in bfloat16, float16 or float32."
        ) from error


def state_rows(source: Source, h: Tensor) -> Tensor:
    """The state rows (..., R) of one layer from its input h (..., d)."""
    norm, parts = source
    x = norm(h)
    return torch.cat([nn.functional.linear(x, dense_weight(linear)[rows].to(x.dtype)) for linear, rows in parts], -1)


def weights_signature(modules: Iterable[nn.Module]) -> tuple[tuple, ...]:
    """Address, dtype, shape and a checksum of the content of every parameter that these modules hold themselves.

    Signatures that were taken before and after a change differ however the change was made: by replacing a parameter,
    by an in-place operation, or through ``.data``, which autograd's version counter does not record. The checksum is a
    sum of the values' bits, so it reads the weights once, and it does not see values that only change places.
    """
    tensors = [parameter.detach() for module in modules for parameter in module.parameters(recurse=False)]
    sums: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.device.type != "meta":
            sums.setdefault(tensor.device, []).append(_bit_sum(tensor))
    values = {device: iter(torch.stack(parts).tolist()) for device, parts in sums.items()}  # one transfer per device
    return tuple(
        (
            tensor.data_ptr(),
            tensor.dtype,
            tuple(tensor.shape),
            next(values[tensor.device]) if tensor.device in values else None,
        )
        for tensor in tensors
    )


def _bit_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits as int64 words, wrapping around."""
    size = tensor.element_size()
    whole_words = tensor.dim() > 0 and tensor.shape[-1] * size % 8 == 0 and tensor.storage_offset() * size % 8 == 0
    if whole_words and tensor.is_contiguous():
        return tensor.view(torch.int64).sum()
    return tensor.double().sum().view(torch.int64)


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
    """Builds the stack on first use, rebuilds it when a weight was replaced or changed."""

    def __init__(self, layers: Layers, rows: Rows) -> None:
        self.layers, self._rows = layers, rows
        self._built: Stack | None = None
        self._signature: tuple | None = None
        self._slices: dict[tuple[int, int], Stack] = {}

    def refresh(self) -> None:
        """Check the stack against the weights; called once per generation, not per token."""
        sources = [self._rows(layer) for layer in self.layers]
        stackable = self._can_stack(sources)
        signature = weights_signature(_modules(sources)) if stackable else ()
        if signature == self._signature:
            return
        # A new dict rather than a cleared one: another thread may be reading the old one.
        self._built, self._slices = self._build(sources) if stackable else None, {}
        self._signature = signature

    def get(self, first: int, stop: int) -> Stack | None:
        """The stack of layers ``first`` to ``stop - 1``, or None where layers must go one by one."""
        if self._signature is None:
            self.refresh()
        slices, built = self._slices, self._built
        if built is None:
            return None
        return slices.get((first, stop)) or slices.setdefault((first, stop), built.narrow(first, stop))

    def _can_stack(self, sources: list[Source]) -> bool:
        """Whether a stacked product is what the layers compute, and is worth its memory."""
        kinds = {(type(layer), type(norm)) for layer, (norm, _) in zip(self.layers, sources, strict=True)}
        norms, linears = [norm for norm, _ in sources], [linear for _, parts in sources for linear, _ in parts]
        hooked = any(getattr(layer, "_hf_hook", None) for layer in self.layers)
        if len(kinds) > 1 or hooked or not all(map(is_plain, norms)) or not all(map(is_plain_linear, linears)):
            return False  # offloaded, quantised, adapted or hooked modules compute their own products
        tensors = [module.weight for module in _modules(sources)]
        one_place = len({(tensor.device, tensor.dtype) for tensor in tensors}) == 1
        if not (one_place and tensors[0].is_floating_point() and tensors[0].device.type != "meta"):
            return False
        copied = sum(linear.weight[rows].nbytes for _, parts in sources for linear, rows in parts)
        whole = sum(parameter.nbytes for parameter in self.layers.parameters())
        return copied <= max(MEMORY_FLOOR, MEMORY_SHARE * whole)

    @staticmethod
    @torch.no_grad()
    def _build(sources: list[Source]) -> Stack:
        norm = torch.stack([source.weight for source, _ in sources])  # (n, d)
        weight = torch.stack([torch.cat([linear.weight[rows] for linear, rows in parts]) for _, parts in sources])
        if weight.dtype == torch.float32:
            weight = weight * norm.unsqueeze(1)
        return Stack(weight, norm, _stacked_bias(sources, weight), float(sources[0][0].variance_epsilon))


def _modules(sources: list[Source]) -> list[Any]:
    """The norms and linears of all layers."""
    return [module for norm, parts in sources for module in (norm, *(linear for linear, _ in parts))]


def _stacked_bias(sources: list[Source], weight: Tensor) -> Tensor | None:
    """Biases (n, R) of the stacked rows, zeros where a linear has none; None if no linear has any."""
    if all(linear.bias is None for _, parts in sources for linear, _ in parts):
        return None
    stacked = []
    for _, parts in sources:
        whole = [weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias for linear, _ in parts]
        stacked.append(torch.cat([bias[rows] for bias, (_, rows) in zip(whole, parts, strict=True)]))
    return torch.stack(stacked)
