"""One cache for all layers, in stacked tensors, behind Hugging Face's cache protocol.

Stock layers call ``cache.update`` (attention) or ``update_conv_state`` and friends (Mamba) and never notice. Because
all layers of one kind on one device share a buffer with a leading layer axis, a skipped run of layers is updated by
one write instead of one per layer, and a snapshot is one clone.

    cache = StackedCache(["attention"] * 4)
    after a 3-token prompt every layer holds 3 entries:  buffer (4, 2, B, H, capacity >= 3, D), lengths [3, 3, 3, 3]
    a token leaves after layer 2: layers 0 and 1 append theirs; ``append_kv(2, 4, kv)`` appends entry 4 of layers 2, 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

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

    def reorder(self, index: Tensor) -> None:
        if self.buffer is not None:
            self.buffer = self.buffer.index_select(2, index)


class KVLayer(CacheLayerMixin):
    """One attention layer's window onto a KVStack, with its own length."""

    is_sliding = False

    def __init__(self, stack: KVStack, slot: int) -> None:
        super().__init__()
        self.stack, self.slot, self.length = stack, slot, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.stack.reserve(key_states, key_states.shape[-2])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, D) keys and values; returns all of this layer's, as views."""
        start, end = self.length, self.length + key_states.shape[-2]
        buffer = self.stack.reserve(key_states, end)[self.slot]
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

    def reorder(self, layers: Sequence[SSMLayer], index: Tensor) -> None:
        for name in ("conv", "ssm"):
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, old.index_select(1, index))
        for layer in layers:
            layer.rebind()


class SSMLayer(LinearAttentionLayer):
    """One Mamba layer's window onto an SSMStack; stock mixers update the views in place."""

    def __init__(self, stack: SSMStack, slot: int) -> None:
        super().__init__()
        self.stack, self.slot = stack, slot

    def lazy_initialization(
        self,
        conv_states: Tensor | None = None,
        recurrent_states: Tensor | None = None,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
    ) -> None:
        n = self.stack.n_layers
        if conv_states is not None:
            size = conv_kernel_size or conv_states.shape[-1]
            self.dtype, self.device = conv_states.dtype, conv_states.device
            self.conv_kernel_size[state_idx] = size
            if self.stack.conv is None:
                self.stack.conv = conv_states.new_zeros(n, *conv_states.shape[:-1], size)
            self.is_conv_states_initialized[state_idx] = True
        if recurrent_states is not None:
            if self.stack.ssm is None:
                self.stack.ssm = recurrent_states.new_zeros(n, *recurrent_states.shape)
            self.is_recurrent_states_initialized[state_idx] = True
        self.rebind()

    def rebind(self) -> None:
        """Point the views at the stack's present tensors."""
        if self.stack.conv is not None and self.is_conv_states_initialized[0]:
            self.conv_states[0] = self.stack.conv[self.slot]
        if self.stack.ssm is not None and self.is_recurrent_states_initialized[0]:
            self.recurrent_states[0] = self.stack.ssm[self.slot]


class StackedCache(Cache):
    """All layers' state. ``kinds`` names each layer's ("attention" or "mamba"), ``devices`` where it lives."""

    def __init__(self, kinds: Sequence[str], devices: Sequence[torch.device] | None = None) -> None:
        groups = list(zip(kinds, devices or [None] * len(kinds), strict=True))
        stacks: dict[tuple, KVStack | SSMStack] = {
            group: (KVStack if group[0] == "attention" else SSMStack)(groups.count(group)) for group in set(groups)
        }
        used = dict.fromkeys(stacks, 0)
        layers: list[KVLayer | SSMLayer] = []
        for group in groups:
            slot, stack = used[group], stacks[group]
            used[group] += 1
            layers.append(KVLayer(stack, slot) if isinstance(stack, KVStack) else SSMLayer(stack, slot))
        super().__init__(layers=layers)
        self.stacks = list(stacks.values())

    def length(self, layer: int) -> int:
        """Entries layer ``layer`` holds; 0 for a recurrent layer, which keeps no entries."""
        item = self.layers[layer]
        return item.length if isinstance(item, KVLayer) else 0

    def stackable(self, first: int, stop: int) -> bool:
        """Whether layers ``first`` to ``stop - 1`` sit side by side in one stack, equally long."""
        run = self.layers[first:stop]
        same = all(item.stack is run[0].stack for item in run)
        return same and all(getattr(item, "length", 0) == getattr(run[0], "length", 0) for item in run)

    def append_kv(self, first: int, stop: int, kv: Tensor) -> None:
        """Append kv (n, 2, B, H, T, D) to attention layers ``first`` to ``stop - 1`` of one stack in one write."""
        head = self.layers[first]
        start, end = head.length, head.length + kv.shape[4]
        buffer = head.stack.reserve(kv[0, 0], end)
        buffer[head.slot : head.slot + stop - first, :, :, :, start:end] = kv
        for item in self.layers[first:stop]:
            item.length, item.is_initialized = end, True

    def repeat_last_kv(self, first: int, stop: int) -> None:
        """Append each attention layer's newest entry once more (the ``copy`` policy)."""
        for item in self.layers[first:stop]:
            end = item.length + 1
            buffer = item.stack.reserve(item.stack.buffer[0, 0], end)[item.slot]
            buffer[:, :, :, end - 1] = buffer[:, :, :, end - 2]
            item.length = end

    def replace_last_kv(self, layer: int, rows: Tensor) -> None:
        """In ``rows`` (B,) bool, overwrite the newest entry of ``layer`` with the one before it."""
        item = self.layers[layer]
        buffer = item.stack.buffer[item.slot]
        buffer[:, rows, :, item.length - 1] = buffer[:, rows, :, item.length - 2]

    def recurrent(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Views of conv (n, B, C, K) and SSM (n, B, H, P, N) state of Mamba layers ``first`` to ``stop - 1``."""
        head = self.layers[first]
        run = slice(head.slot, head.slot + stop - first)
        return head.stack.conv[run], head.stack.ssm[run]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep rows ``beam_idx`` (B',) of the batch, in that order."""
        for stack in self.stacks:
            if isinstance(stack, KVStack):
                stack.reorder(beam_idx)
            else:
                stack.reorder([item for item in self.layers if item.stack is stack], beam_idx)

    def snapshot(self) -> Snapshot:
        """A copy of all state; ``restore`` puts it back. Recurrent state cannot be cropped, only restored."""
        lengths = tuple(getattr(item, "length", None) for item in self.layers)
        tensors: list[Tensor | None] = []
        for stack in self.stacks:
            if isinstance(stack, KVStack):
                longest = max(item.length for item in self.layers if item.stack is stack)
                tensors.append(None if stack.buffer is None else stack.buffer[:, :, :, :, :longest].clone())
            else:
                tensors += [None if part is None else part.clone() for part in (stack.conv, stack.ssm)]
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
