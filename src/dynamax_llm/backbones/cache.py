"""One cache for all layers, in stacked tensors, behind Hugging Face's cache protocol.

Stock layers call ``cache.update`` (attention) or ``update_conv_state`` and friends (Mamba) and never notice. Because
all layers of one kind on one device share a buffer with a leading layer axis, a skipped run of layers is updated by
one write instead of one per layer, and a snapshot is one clone. Attention layers count their own entries, so layers
may hold different numbers of them; the engine says which slots of which rows count.

    cache = StackedCache(["attention"] * 4)
    after a 3-token prompt every layer holds 3 entries:  buffer (4, 2, B, H, capacity >= 3, D), lengths [3, 3, 3, 3]
    a token leaves after layer 2: layers 0 and 1 append theirs; ``append_kv(2, 4, kv)`` appends entry 4 of layers 2, 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, LinearAttentionLayer

#: What a layer remembers: K/V per token; conv window and SSM state; both; nothing (a layer of experts or an MLP).
KINDS = ("attention", "mamba", "hybrid", "none")
#: Entries a K/V buffer starts with, and the factor by which it grows when it is full.
FIRST_CAPACITY = 256
GROWTH = 2


@dataclass(frozen=True)
class Snapshot:
    """A copy of everything a StackedCache holds; valid for the cache that made it."""

    lengths: tuple[int | None, ...]
    tensors: tuple[Tensor | None, ...]


class KVStack:
    """Keys and values of n layers: ``buffer`` (n, 2, B, H, capacity, D), grown by doubling."""

    def __init__(self, n_layers: int) -> None:
        self.n_layers = n_layers
        self.buffer: Tensor | None = None

    def reserve(self, like: Tensor, length: int) -> Tensor:
        """The buffer with room for ``length`` entries; ``like`` (B, H, T, D) gives shape, dtype and device."""
        old = self.buffer
        if old is not None and length <= old.shape[4]:
            return old
        capacity = FIRST_CAPACITY if old is None else old.shape[4]
        while capacity < length:
            capacity *= GROWTH
        batch, heads, _, dim = like.shape
        # Zeros rather than empty memory: a masked but unwritten NaN would poison attention.
        self.buffer = like.new_zeros(self.n_layers, 2, batch, heads, capacity, dim)
        if old is not None:
            self.buffer[:, :, :, :, : old.shape[4]] = old
        return self.buffer

    def empty_like(self, other: KVStack, rows: int) -> None:
        """Allocate ``rows`` empty rows of another stack's shape, unless there are some."""
        if self.buffer is None and other.buffer is not None:
            self.reserve(other.buffer[0, 0, :1].expand(rows, -1, -1, -1), 1)

    def select_rows(self, index: Tensor) -> None:
        if self.buffer is not None:
            self.buffer = self.buffer.index_select(2, index)


class KVLayer(CacheLayerMixin):
    """One attention layer's window onto a KVStack, with its own length."""

    is_sliding = False

    def __init__(self, kv: KVStack, slot: int) -> None:
        CacheLayerMixin.__init__(self)
        self.kv, self.kv_slot, self.length = kv, slot, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.kv.reserve(key_states, key_states.shape[-2])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, D) keys and values; returns all of this layer's, as views."""
        start, end = self.length, self.length + key_states.shape[-2]
        buffer = self.kv.reserve(key_states, end)[self.kv_slot]
        buffer[0, :, :, start:end] = key_states
        buffer[1, :, :, start:end] = value_states
        self.length, self.is_initialized = end, True
        return buffer[0, :, :, :end], buffer[1, :, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.length = 0


class SSMStack:
    """Conv windows (n, B, C, K) and SSM states (n, B, H, P, N) of n Mamba layers."""

    def __init__(self, n_layers: int) -> None:
        self.n_layers = n_layers
        self.conv: Tensor | None = None
        self.ssm: Tensor | None = None

    def empty_like(self, other: SSMStack, rows: int) -> None:
        """Allocate ``rows`` zero rows of another stack's shape, unless there are some."""
        for name in ("conv", "ssm"):
            like = getattr(other, name)
            if getattr(self, name) is None and like is not None:
                setattr(self, name, like.new_zeros(like.shape[0], rows, *like.shape[2:]))

    def select_rows(self, index: Tensor) -> None:
        for name in ("conv", "ssm"):
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, old.index_select(1, index))


class SSMLayer(LinearAttentionLayer):
    """One Mamba layer's window onto an SSMStack; stock mixers update the views in place."""

    def __init__(self, ssm: SSMStack, slot: int) -> None:
        LinearAttentionLayer.__init__(self)
        self.ssm, self.ssm_slot = ssm, slot

    def lazy_initialization(
        self,
        conv_states: Tensor | None = None,
        recurrent_states: Tensor | None = None,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
    ) -> None:
        n = self.ssm.n_layers
        if conv_states is not None:
            size = conv_kernel_size or conv_states.shape[-1]
            self.dtype, self.device = conv_states.dtype, conv_states.device
            self.conv_kernel_size[state_idx] = size
            if self.ssm.conv is None:
                self.ssm.conv = conv_states.new_zeros(n, *conv_states.shape[:-1], size)
            self.is_conv_states_initialized[state_idx] = True
        if recurrent_states is not None:
            if self.ssm.ssm is None:
                self.ssm.ssm = recurrent_states.new_zeros(n, *recurrent_states.shape)
            self.is_recurrent_states_initialized[state_idx] = True
        self.rebind()

    def initialize_like(self, other: SSMLayer) -> None:
        """Count as a layer that has seen what ``other`` has; the stack's tensors must exist."""
        self.dtype, self.device = other.dtype, other.device
        for name in (
            "conv_kernel_size",
            "is_conv_states_initialized",
            "is_recurrent_states_initialized",
            "has_previous_state",
        ):
            setattr(self, name, dict(getattr(other, name)))
        self.rebind()

    def rebind(self) -> None:
        """Point the views at the stack's present tensors."""
        if self.ssm.conv is not None and self.is_conv_states_initialized[0]:
            self.conv_states[0] = self.ssm.conv[self.ssm_slot]
        if self.ssm.ssm is not None and self.is_recurrent_states_initialized[0]:
            self.recurrent_states[0] = self.ssm.ssm[self.ssm_slot]


class HybridLayer(SSMLayer, KVLayer):
    """A layer that remembers both: attention and a Mamba mixer side by side, or one after the other."""

    def __init__(self, ssm: SSMStack, ssm_slot: int, kv: KVStack, kv_slot: int) -> None:
        KVLayer.__init__(self, kv, kv_slot)
        SSMLayer.__init__(self, ssm, ssm_slot)

    def reset(self) -> None:
        KVLayer.reset(self)
        SSMLayer.reset(self)


class StackedCache(Cache):
    """All layers' state. ``kinds`` names each layer's (one of KINDS), ``devices`` where it lives.

    Rows are set by the first tokens that layers append, or, in a cache that is filled by ``put_row``, by ``rows``.
    Row r of every layer belongs to one sequence. Attention layers have one length for all rows: where sequences
    differ in length, the caller's padding mask says which slots of a row hold tokens.
    """

    def __init__(
        self, kinds: Sequence[str], devices: Sequence[torch.device] | None = None, rows: int | None = None
    ) -> None:
        self.rows = rows
        places = list(devices) if devices is not None else [None] * len(kinds)
        kv_places = [place for kind, place in zip(kinds, places, strict=True) if kind in ("attention", "hybrid")]
        ssm_places = [place for kind, place in zip(kinds, places, strict=True) if kind in ("mamba", "hybrid")]
        self._kv = {place: KVStack(kv_places.count(place)) for place in dict.fromkeys(kv_places)}
        self._ssm = {place: SSMStack(ssm_places.count(place)) for place in dict.fromkeys(ssm_places)}
        used: dict[int, int] = {}
        layers: list[Any] = []
        for kind, place in zip(kinds, places, strict=True):
            assert kind in KINDS, kind
            # Each stack hands out its slots in the order of layers, so a run of layers is a run of slots.
            stacks: list[KVStack | SSMStack] = [self._ssm[place]] if kind in ("mamba", "hybrid") else []
            stacks += [self._kv[place]] if kind in ("attention", "hybrid") else []
            arguments: list[Any] = []
            for stack in stacks:
                arguments += [stack, used.setdefault(id(stack), 0)]
                used[id(stack)] += 1
            layers.append(_LAYER_OF_KIND[kind](*arguments))
        super().__init__(layers=layers)

    @property
    def stacks(self) -> list[KVStack | SSMStack]:
        """Every stack, those of K/V first."""
        return [*self._kv.values(), *self._ssm.values()]

    def length(self, layer: int) -> int:
        """Entries layer ``layer`` holds; 0 for a layer that keeps none."""
        item = self.layers[layer]
        return item.length if isinstance(item, KVLayer) else 0

    def stackable(self, first: int, stop: int) -> bool:
        """Whether layers ``first`` to ``stop - 1`` are of one kind, side by side in one stack, equally long."""
        run = self.layers[first:stop]
        if any(type(item) is not type(run[0]) for item in run) or type(run[0]) not in (KVLayer, SSMLayer):
            return False
        if isinstance(run[0], KVLayer):
            return all(item.kv is run[0].kv and item.length == run[0].length for item in run)
        return all(item.ssm is run[0].ssm for item in run)

    def append_kv(self, first: int, stop: int, kv: Tensor) -> None:
        """Append kv (n, 2, B, H, T, D) to attention layers ``first`` to ``stop - 1`` of one stack in one write."""
        head = self.layers[first]
        start, end = head.length, head.length + kv.shape[4]
        buffer = head.kv.reserve(kv[0, 0], end)
        buffer[head.kv_slot : head.kv_slot + stop - first, :, :, :, start:end] = kv
        for item in self.layers[first:stop]:
            item.length, item.is_initialized = end, True

    def repeat_last_kv(self, first: int, stop: int) -> None:
        """Append each attention layer's newest entry once more (the ``copy`` policy)."""
        for item in self.layers[first:stop]:
            end = item.length + 1
            buffer = item.kv.reserve(item.kv.buffer[0, 0], end)[item.kv_slot]
            buffer[:, :, :, end - 1] = buffer[:, :, :, end - 2]
            item.length = end

    def replace_last_kv(self, layer: int, rows: Tensor) -> None:
        """In ``rows`` (B,) bool, overwrite the newest entry of ``layer`` with the one before it."""
        item = self.layers[layer]
        buffer = item.kv.buffer[item.kv_slot]
        buffer[:, rows, :, item.length - 1] = buffer[:, rows, :, item.length - 2]

    def set_length(self, first: int, stop: int, length: int) -> None:
        """Let the attention layers among ``first`` to ``stop - 1`` hold their first ``length`` entries.

        Later entries are forgotten; entries forgotten before come back, unless others were written in their place.
        """
        for item in self.layers[first:stop]:
            if isinstance(item, KVLayer):
                item.length = length

    def recurrent(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Views of conv (n, B, C, K) and SSM (n, B, ...) state of Mamba layers ``first`` to ``stop - 1``."""
        head = self.layers[first]
        run = slice(head.ssm_slot, head.ssm_slot + stop - first)
        return head.ssm.conv[run], head.ssm.ssm[run]

    def recurrent_parts(self, first: int, stop: int) -> list[Tensor]:
        """Views (n, B, ...) of all recurrent state of whatever layers among ``first`` to ``stop - 1`` have any."""
        parts: list[Tensor] = []
        for stack in self._ssm.values():
            slots = [i.ssm_slot for i in self.layers[first:stop] if isinstance(i, SSMLayer) and i.ssm is stack]
            if slots:
                run = slice(slots[0], slots[-1] + 1)
                parts += [part[run] for part in (stack.conv, stack.ssm) if part is not None]
        return parts

    def select_rows(self, index: Tensor) -> None:
        """Keep rows ``index`` (B',) of the batch, in that order; a row may be repeated."""
        for stack in self.stacks:
            stack.select_rows(index)
        self.rows = len(index)
        self._rebind()

    def put_row(self, row: int, other: StackedCache, other_row: int = 0, start: int = 0) -> None:
        """Copy row ``other_row`` of another cache of the same backbone into row ``row``: K/V, conv and SSM states.

        Its K/V entries go to slots ``start`` and after; layers grow as needed, and every attention layer's length
        becomes at least ``start`` plus the entries copied. What the row held in other slots stays and must be masked.
        """
        for mine, theirs in zip(self.stacks, other.stacks, strict=True):
            mine.empty_like(theirs, self._count_rows(row))  # type: ignore[arg-type]
        for layer, source in zip(self.layers, other.layers, strict=True):
            if isinstance(layer, KVLayer) and source.kv.buffer is not None:
                end = start + source.length
                buffer = layer.kv.reserve(layer.kv.buffer[0, 0], end)[layer.kv_slot]
                buffer[:, row, :, start:end] = source.kv.buffer[source.kv_slot, :, other_row, :, : source.length]
                layer.length, layer.is_initialized = max(layer.length, end), True
            if isinstance(layer, SSMLayer):
                layer.initialize_like(source)
        for mine, theirs in zip(self._ssm.values(), other._ssm.values(), strict=True):
            for part, source in ((mine.conv, theirs.conv), (mine.ssm, theirs.ssm)):
                if part is not None and source is not None:
                    part[:, row] = source[:, other_row]

    def clear_row(self, row: int) -> None:
        """Zero everything row ``row`` holds. Lengths stay: its slots must be masked until ``put_row`` fills them."""
        for kv in self._kv.values():
            if kv.buffer is not None:
                kv.buffer[:, :, row] = 0
        for ssm in self._ssm.values():
            for part in (ssm.conv, ssm.ssm):
                if part is not None:
                    part[:, row] = 0

    def compact(self, padding: Tensor) -> Tensor:
        """Drop slots that rows do not use; returns the new padding (B, S'), S' = the longest row's tokens.

        ``padding`` (B, S) is 1 where a slot of a row holds a token; all attention layers hold S entries. Each row's
        tokens keep their order and end in the last slot; keys keep the positions by which they were rotated.
        """
        longest = int(padding.sum(1).max())
        order = padding.bool().sort(dim=1, stable=True).indices[:, padding.shape[1] - longest :]  # (B, S')
        for kv in self._kv.values():
            if kv.buffer is not None:
                n, pair, rows, heads, _, dim = kv.buffer.shape
                index = order.to(kv.buffer.device)[None, None, :, None, :, None]
                kept = kv.buffer.gather(4, index.expand(n, pair, rows, heads, longest, dim))
                kv.buffer[:, :, :, :, :longest] = kept
        self.set_length(0, len(self.layers), longest)
        return padding.gather(1, order)

    def _count_rows(self, row: int) -> int:
        """Rows of this cache, at least ``row + 1`` where it was not told."""
        return row + 1 if self.rows is None else self.rows

    def _rebind(self) -> None:
        for layer in self.layers:
            if isinstance(layer, SSMLayer):
                layer.rebind()

    def snapshot(self) -> Snapshot:
        """A copy of all state; ``restore`` puts it back. Recurrent state cannot be cropped, only restored."""
        lengths = tuple(item.length if isinstance(item, KVLayer) else None for item in self.layers)
        tensors: list[Tensor | None] = []
        for kv in self._kv.values():
            longest = max(item.length for item in self.layers if isinstance(item, KVLayer) and item.kv is kv)
            tensors.append(None if kv.buffer is None else kv.buffer[:, :, :, :, :longest].clone())
        for ssm in self._ssm.values():
            tensors += [None if part is None else part.clone() for part in (ssm.conv, ssm.ssm)]
        return Snapshot(lengths, tuple(tensors))

    def restore(self, snapshot: Snapshot) -> None:
        """Put back what ``snapshot`` copied; anything written since is forgotten."""
        for item, length in zip(self.layers, snapshot.lengths, strict=True):
            if length is not None:
                item.length = length
        parts = iter(snapshot.tensors)
        for stack in self.stacks:
            for name in ("buffer",) if isinstance(stack, KVStack) else ("conv", "ssm"):
                saved, present = next(parts), getattr(stack, name)
                if saved is not None:
                    (present[:, :, :, :, : saved.shape[4]] if name == "buffer" else present).copy_(saved)


_LAYER_OF_KIND: dict[str, Any] = {
    "attention": KVLayer,
    "mamba": SSMLayer,
    "hybrid": HybridLayer,
    "none": DummyLayer,
}
