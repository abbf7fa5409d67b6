"""Mamba-2 layers on the GPU engine: three kernels each, weights read where the model keeps them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynamax_llm.backbones import Backbone
from dynamax_llm.backbones.cache import SSMLayer, StackedCache
from dynamax_llm.engines.cuda.kernels.mamba import convolve_kernel, mamba_cell_kernel, mamba_in_kernel
from dynamax_llm.engines.cuda.launch import add_linear, norm_groups, overlaps, ready_for, settings
from dynamax_llm.engines.cuda.passes import Pass
from dynamax_llm.engines.cuda.tiles import blocks, power_of_two, tile

#: Tokens whose inputs the ring remembers beyond the largest pass: the convolution's window, with room.
SPARE = 16
#: Channels of a head that one program carries.
CHANNELS = 32


class Mamba2Layers:
    """The layers of a mamba2 model, on states that the stock prompt pass left.

    ``most`` is the largest number of tokens in a pass. With ``buffers`` 2 states are read in one buffer and written in
    the other, so that the older ones remain to roll back to: ``index`` (segments, 2) names, for the layers from each of
    ``starts``, the buffer to read and the buffer to write.
    """

    replays = True
    kernels = ("mamba_in_kernel", "convolve_kernel", "mamba_cell_kernel", "norm_groups_kernel")

    def __init__(
        self, backbone: Backbone, batch: int, most: int = 1, buffers: int = 1, starts: Sequence[int] = (0,)
    ) -> None:
        self.backbone, self.batch = backbone, batch
        mixer = backbone.layers[0].mixer
        self.heads, self.dim, self.size = mixer.num_heads, mixer.head_dim, mixer.ssm_state_size
        self.groups, self.taps, self.channels = mixer.n_groups, mixer.conv_kernel_size, mixer.conv_dim
        self.inner, self.width = mixer.intermediate_size, mixer.conv_dim + mixer.num_heads
        self.ring_size = power_of_two(most + SPARE)
        self.part = min(CHANNELS, power_of_two(self.dim))
        self.biased = mixer.in_proj.bias is not None
        device, n = backbone.device, backbone.n_layers
        self.ring = torch.zeros(n, batch, self.ring_size, self.width, dtype=backbone.dtype, device=device)
        # float32, as the stock prompt pass leaves them.
        self.states = torch.zeros(buffers, n, batch, self.heads, self.dim, self.size, device=device)
        self.starts = tuple(starts)
        self.index = torch.zeros(len(self.starts), 2, dtype=torch.int32, device=device)
        self.table = torch.tensor([self._addresses(layer) for layer in backbone.layers], device=device)
        self._stack_small_weights([layer.mixer for layer in backbone.layers])

    @staticmethod
    def _addresses(layer: nn.Module) -> list[int]:
        linear_, norm = layer.mixer.in_proj, layer.norm
        tensors = (linear_.weight, linear_.bias, norm.weight)
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]

    @torch.no_grad()
    def _stack_small_weights(self, mixers: list[nn.Module]) -> None:
        """Small weights of all layers, float32, stacked: a few megabytes."""
        self.conv = torch.stack([mixer.conv1d.weight.squeeze(1).float() for mixer in mixers])
        none = self.conv.new_zeros(self.channels)
        biases = [none if mixer.conv1d.bias is None else mixer.conv1d.bias.float() for mixer in mixers]
        self.conv_bias = torch.stack(biases)
        self.dt_bias = torch.stack([mixer.dt_bias.float() for mixer in mixers])
        self.decay = -torch.exp(torch.stack([mixer.A_log.float() for mixer in mixers]))
        self.skip = torch.stack([mixer.D.float() for mixer in mixers])

    def load(self, cache: StackedCache, length: int) -> None:
        """Go on from ``cache``, whose layers have read ``length`` slots."""
        conv, ssm = _states(cache)
        self.ring[:, :, self._times(length), : self.channels] = conv.transpose(2, 3).to(self.ring.dtype)
        self.states[0] = ssm
        self.commit(0)

    def load_empty(self, like: StackedCache) -> None:
        """Begin with rows that hold nothing."""
        self.commit(0)

    def load_row(self, row: int, cache: StackedCache, length: int) -> None:
        """Row ``row`` begins with the states of ``cache``, a cache of one row after ``length`` slots."""
        conv, ssm = _states(cache)
        self.ring[:, row, self._times(length), : self.channels] = conv[:, 0].transpose(1, 2).to(self.ring.dtype)
        self.states[self.committed, :, row] = ssm[:, 0]

    def _times(self, length: int) -> Tensor:
        """Places in the ring of the last inputs of the convolution before slot ``length``."""
        return torch.arange(length - self.taps, length, device=self.ring.device) % self.ring_size

    def commit(self, buffer: int) -> None:
        """The states in ``buffer`` are those of every token so far; what comes next is written into the other."""
        self.committed = buffer
        self.index[:, 0] = buffer
        self.index[:, 1] = 1 - buffer if len(self.states) > 1 else buffer

    def buffer_index(self, segment: int) -> Tensor:
        """(2,) the buffers that a segment's states are read from and written to."""
        return self.index[segment]

    def spare_bytes(self) -> int:
        """Memory that rolling back takes."""
        return self.states[0].nbytes if len(self.states) > 1 else 0

    @property
    def replay_macs(self) -> int:
        """Multiply-accumulates of replaying one token in one layer: convolution and state, of what in_proj had made."""
        mixer = self.backbone.layers[0].mixer
        state = 2 * mixer.intermediate_size * mixer.ssm_state_size
        return state + mixer.conv_dim * mixer.conv_kernel_size

    def reserve(self, length: int) -> None:
        """Nothing grows."""

    def layer(self, index: int, p: Pass, *, fresh: bool, keep: Tensor | None = None) -> None:
        """Layer ``index`` on p.h, in place where rows are live; every row's token goes into the state.

        ``fresh``: p.h does not come from the layer before, so p.ready is not what this one reads. ``keep`` (M, d), if
        given, is left what p.h was before.
        """
        mixer = self.backbone.layers[index].mixer
        gated = p.buffer("gated", p.rows, self.inner, dtype=mixer.in_proj.weight.dtype)
        squares = p.buffer("squares", p.rows, self.heads * blocks(self.dim, self.part), dtype=torch.float32)
        self._project(index, index + 1, p, skip=False, fresh=fresh)
        self._advance(index, index + 1, p, gated, squares)
        weight, bias = mixer.out_proj.weight, mixer.out_proj.bias
        norm, eps, size = mixer.norm.weight, mixer.norm.variance_epsilon, self.inner // self.groups
        if p.rows == 1:
            grouped: dict[str, Any] = {"norm": norm, "eps": eps, "sums": squares, "size": size}
            add_linear(gated, weight, p, self._next_norm(index), bias=bias, keep=keep, **grouped)
        else:  # tensor cores take their vectors as they lie
            norm_groups(gated, norm, squares, size, eps)
            add_linear(gated, weight, p, self._next_norm(index), bias=bias, keep=keep)

    def _next_norm(self, index: int) -> Tensor:
        """Weight of the norm that reads what layer ``index`` leaves."""
        if index + 1 == self.backbone.n_layers:
            return self.backbone.model.backbone.norm_f.weight
        return self.backbone.layers[index + 1].norm.weight

    def update_states(self, first: int, stop: int, p: Pass) -> None:
        """States of layers ``first`` to ``stop - 1``, all from p.h, in three kernels."""
        if first < stop:
            self._project(first, stop, p, skip=True, fresh=False)
            self._advance(first, stop, p, None, None)

    def replay(self, p: Pass) -> None:
        """States of all layers over tokens that are still in the ring, as p.slot names them."""
        self._advance(0, self.backbone.n_layers, p, None, None)

    def _project(self, first: int, stop: int, p: Pass, *, skip: bool, fresh: bool) -> None:
        layer = self.backbone.layers[first]
        weight, bias, norm = layer.mixer.in_proj.weight, layer.mixer.in_proj.bias, layer.norm
        z = p.buffer("z", p.rows, self.inner, dtype=weight.dtype)
        outputs = self.width if skip else self.inner + self.width
        t = tile(max(outputs, 8192 if skip else 0), self.backbone.width, p.rows, weight.dtype)
        x, sums = (p.h, norm.weight) if fresh else (p.ready, p.sums)
        if skip:
            x, sums = ready_for(p, self.table, self.table.shape[1] - 1, first, stop, weight.dtype)
        kind = "whole" if fresh else "ready"
        parts = 1 if fresh or sums is None else sums.shape[1]
        mamba_in_kernel[blocks(outputs, t.rows), blocks(p.rows, t.vectors), stop - first](
            x,
            weight,
            weight if bias is None else bias,
            norm.weight,
            sums,
            self.table,
            p.slot,
            z,
            self.ring,
            first,
            p.rows,
            p.tokens,
            p.batch,
            self.inner,
            self.width,
            self.ring_size,
            skip,
            skip,
            self.backbone.width,
            t.vectors,
            t.rows,
            t.columns,
            kind,
            parts,
            power_of_two(parts),
            norm.variance_epsilon,
            bias is not None,
            t.stages,
            overlaps(p.h.device),
            **settings(p.h.device, t.warps),
        )

    def _advance(self, first: int, stop: int, p: Pass, out: Tensor | None, squares: Tensor | None) -> None:
        z = p.buffer("z", p.rows, self.inner, dtype=self.ring.dtype)
        ready = self._convolve(first, p) if out is not None and p.tokens > 1 else None
        programs = p.batch * self.heads * blocks(self.dim, self.part)
        mamba_cell_kernel[programs, stop - first](
            self.ring,
            z,
            self.conv,
            self.conv_bias,
            self.dt_bias,
            self.decay,
            self.skip,
            self.states,
            self.index[bisect_right(self.starts, first) - 1],
            p.slot,
            self.skip if ready is None else ready,
            z if out is None else out,
            self.skip if squares is None else squares,
            first,
            p.tokens,
            p.batch,
            len(self.ring) * p.batch,
            self.heads,
            self.dim,
            self.size,
            self.groups,
            self.ring_size,
            self.taps,
            self.part,
            power_of_two(self.size),
            power_of_two(p.tokens),
            out is not None,
            ready is not None,
            overlaps(p.h.device),
            **settings(p.h.device, 4),
        )

    def _convolve(self, layer: int, p: Pass) -> Tensor:
        """x, B and C (M, C) of a pass of several tokens, after the convolution."""
        ready = p.buffer("convolved", p.rows, self.channels, dtype=torch.float32)
        convolve_kernel[p.rows, blocks(self.channels, 1024)](
            self.ring,
            self.conv,
            self.conv_bias,
            p.slot,
            ready,
            layer,
            p.tokens,
            p.batch,
            self.channels,
            self.width,
            self.ring_size,
            self.taps,
            1024,
            overlaps(ready.device),
            **settings(ready.device, 4),
        )
        return ready


def _states(cache: StackedCache) -> tuple[Tensor, Tensor]:
    """Conv windows (n, B, C, K) and SSM states (n, B, H, P, N) of all layers."""
    layer = cache.layers[0]
    assert isinstance(layer, SSMLayer) and layer.ssm.conv is not None and layer.ssm.ssm is not None
    return layer.ssm.conv, layer.ssm.ssm
