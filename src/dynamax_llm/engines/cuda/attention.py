"""Layers of the Llama kind on the GPU engine: five kernels each, weights read where the model keeps them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynamax_llm.backbones import Backbone
from dynamax_llm.backbones.cache import KVLayer, StackedCache
from dynamax_llm.engines.cuda.kernels.attention import attend_kernel, kv_kernel, qkv_kernel
from dynamax_llm.engines.cuda.launch import add_linear, linear, overlaps, ready_for, settings
from dynamax_llm.engines.cuda.passes import Pass
from dynamax_llm.engines.cuda.tiles import LEAST_VECTORS, blocks, power_of_two, tile

#: Programs that share one sequence's look back, per head group, at most.
SPLITS = 16
#: Slots a program looks at in one go.
SLOTS = 64


class AttentionLayers:
    """The layers of a llama, mistral or qwen2 model, on a K/V cache that the stock prompt pass filled."""

    kernels = ("qkv_kernel", "attend_kernel", "kv_kernel")

    replays = False
    replay_macs = 0

    def __init__(
        self, backbone: Backbone, batch: int, most: int = 1, buffers: int = 1, starts: Sequence[int] = (0,)
    ) -> None:
        """``most``, ``buffers`` and ``starts`` are for layers with recurrent state."""
        self.backbone, self.batch = backbone, batch
        self.no_index = torch.zeros(2, dtype=torch.int32, device=backbone.device)
        first = backbone.layers[0]
        config, attention = backbone.config, first.self_attn
        self.queries, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.dim, self.eps = attention.head_dim, first.input_layernorm.variance_epsilon
        self.scale = float(attention.scaling)
        window = getattr(backbone, "window", None)
        self.windows = [window if windowed else 0 for windowed in backbone.windowed]  # type: ignore[attr-defined]
        self.biased = attention.q_proj.bias is not None
        self.cache: StackedCache | None = None
        self.room = 0  # slots that the cache has room for
        device = backbone.device
        self.table = torch.tensor([self._addresses(layer) for layer in backbone.layers], device=device)
        self.turns = self._turns(0)
        # Programs are tried out before there is a cache, on slots that are none.
        self.where = torch.tensor([0, 0, *(part.data_ptr() for part in self.turns)], device=device)

    @staticmethod
    def _addresses(layer: nn.Module) -> list[int]:
        attention = layer.self_attn
        tensors = (attention.k_proj.weight, attention.v_proj.weight, attention.k_proj.bias, attention.v_proj.bias)
        found = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        return [*found, layer.input_layernorm.weight.data_ptr()]

    @torch.no_grad()
    def _turns(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin (positions, D / 2) of at least ``length`` positions, as the stock model makes them."""
        count = power_of_two(max(length, 4096))
        model, device = self.backbone.model.model, self.backbone.device
        like = torch.empty(1, 1, self.backbone.width, dtype=self.backbone.dtype, device=device)
        cos, sin = model.rotary_emb(like, position_ids=torch.arange(count, device=device).unsqueeze(0))
        half = self.dim // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    def load(self, cache: StackedCache, length: int) -> None:
        """Go on from ``cache``, whose layers hold ``length`` slots."""
        self.cache = cache
        self._reserve(length)

    def load_empty(self, like: StackedCache) -> None:
        """Begin with rows that hold nothing; ``like`` is a cache of one row."""
        self.cache = self.backbone.new_cache()
        self.cache.rows = self.batch
        self.cache.put_row(0, like)
        self._reserve(1)

    def load_row(self, row: int, cache: StackedCache, length: int) -> None:
        """Row ``row`` begins with the ``length`` slots of ``cache``, a cache of one row."""
        assert self.cache is not None
        self.cache.put_row(row, cache)
        self._reserve(max(length, self.room))

    def buffer_index(self, segment: int) -> Tensor:
        """Nothing is kept twice."""
        return self.no_index

    def commit(self, buffer: int) -> None:
        """Nothing is kept twice."""

    def replay(self, p: Pass) -> None:
        """Keys and values rolled back are overwritten; nothing is computed again."""

    def spare_bytes(self) -> int:
        """Memory that rolling back takes."""
        return 0

    def reserve(self, length: int) -> None:
        """Make room for ``length`` slots; programs find the cache wherever it then lies."""
        assert self.cache is not None
        if length > self.room:
            self._reserve(length)

    def _reserve(self, length: int) -> None:
        assert self.cache is not None
        layer = self.cache.layers[0]
        assert isinstance(layer, KVLayer) and layer.kv.buffer is not None
        buffer = layer.kv.reserve(layer.kv.buffer[0, 0], length)
        if len(self.turns[0]) < buffer.shape[4]:
            self.turns = self._turns(buffer.shape[4])
        cos, sin = self.turns
        self.room = buffer.shape[4]
        self.where.copy_(torch.tensor([buffer.data_ptr(), buffer.shape[4], cos.data_ptr(), sin.data_ptr()]))

    def layer(self, index: int, p: Pass, *, fresh: bool, keep: Tensor | None = None) -> None:
        """Layer ``index`` on p.h, in place where rows are live; every row's key and value go into the cache.

        ``fresh``: p.h does not come from the layer before, so p.ready is not what this one reads. ``keep`` (M, d), if
        given, is left what p.h was before.
        """
        layer = self.backbone.layers[index]
        dtype, mlp = layer.input_layernorm.weight.dtype, layer.mlp
        q = p.buffer("q", p.rows, self.queries * self.dim, dtype=dtype)
        seen = p.buffer("seen", p.rows, self.queries * self.dim, dtype=dtype)
        inner = p.buffer("inner", p.rows, len(mlp.gate_proj.weight), dtype=dtype)
        self._project(index, p, q, fresh=fresh)
        self._attend(index, p, q, seen)
        norm = layer.post_attention_layernorm
        add_linear(seen, layer.self_attn.o_proj.weight, p, norm.weight, keep=keep)
        assert p.ready is not None
        linear(p.ready, mlp.gate_proj.weight, inner, second=mlp.up_proj.weight, eps=norm.variance_epsilon, sums=p.sums)
        add_linear(inner, mlp.down_proj.weight, p, self._next_norm(index))

    def _next_norm(self, index: int) -> Tensor:
        """Weight of the norm that reads what layer ``index`` leaves."""
        if index + 1 == self.backbone.n_layers:
            return self.backbone.model.model.norm.weight
        return self.backbone.layers[index + 1].input_layernorm.weight

    def _rows(self, p: Pass, rows: int) -> int:
        """Dimensions of a head, and their partners, in one program."""
        if p.rows == 1:
            return max(min(rows, power_of_two(self.dim // 2)), 1)
        return max(min(rows // 2, power_of_two(self.dim // 2)), LEAST_VECTORS // 2)

    def _project(self, index: int, p: Pass, q: Tensor, *, fresh: bool) -> None:
        layer = self.backbone.layers[index]
        attention, norm = layer.self_attn, layer.input_layernorm.weight
        weights = [part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        biases = [part.bias for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        heads = self.queries + 2 * self.groups
        t = tile(heads * self.dim, self.backbone.width, p.rows, norm.dtype, pairs=True)
        rows = self._rows(p, t.rows)
        parts = 1 if fresh or p.sums is None else p.sums.shape[1]
        qkv_kernel[heads * blocks(self.dim // 2, rows), blocks(p.rows, t.vectors)](
            p.h if fresh else p.ready,
            *weights,
            *(biases if self.biased else weights),
            norm,
            norm if fresh else p.sums,
            p.slot,
            p.place,
            q,
            self.where,
            index,
            p.rows,
            p.tokens,
            p.batch,
            self.queries,
            self.groups,
            self.dim,
            self.backbone.width,
            t.vectors,
            rows,
            t.columns,
            "whole" if fresh else "ready",
            parts,
            power_of_two(parts),
            self.eps,
            self.biased,
            t.stages,
            overlaps(p.h.device),
            **settings(p.h.device, t.warps),
        )

    def _attend(self, index: int, p: Pass, q: Tensor, seen: Tensor) -> None:
        shared = self.queries // self.groups
        vectors = max(power_of_two(p.tokens * shared), LEAST_VECTORS)
        programs = p.batch * self.groups
        splits = max(1, min(SPLITS, blocks(264, programs)))
        scratch = p.buffer("parts", programs * splits * vectors * (self.dim + 2), dtype=torch.float32)
        counter = p.buffer("arrived", programs, dtype=torch.int32)
        attend_kernel[programs, splits](
            q,
            self.where,
            p.slot,
            p.pad,
            seen,
            scratch,
            counter,
            index,
            p.tokens,
            p.batch,
            self.scale,
            self.windows[index],
            self.queries,
            self.groups,
            self.dim,
            max(power_of_two(self.dim), LEAST_VECTORS),
            vectors,
            SLOTS if q.device.type == "cuda" else LEAST_VECTORS,
            splits,
            overlaps(p.h.device),
            **settings(p.h.device, 4),
        )

    def update_states(self, first: int, stop: int, p: Pass) -> None:
        """Keys and values of layers ``first`` to ``stop - 1``, all from p.h, in two kernels."""
        if first >= stop:
            return
        norm = self.backbone.layers[0].input_layernorm.weight
        t = tile(8192, self.backbone.width, p.rows, norm.dtype, pairs=True)
        rows = self._rows(p, t.rows)
        programs = 2 * self.groups * blocks(self.dim // 2, rows)
        x, sums = ready_for(p, self.table, self.table.shape[1] - 1, first, stop, norm.dtype)
        kv_kernel[programs, blocks(p.rows, t.vectors), stop - first](
            x,
            sums,
            self.table,
            p.slot,
            p.place,
            self.where,
            first,
            p.rows,
            p.tokens,
            p.batch,
            self.groups,
            self.dim,
            self.backbone.width,
            t.vectors,
            rows,
            t.columns,
            self.eps,
            self.biased,
            t.stages,
            overlaps(p.h.device),
            **settings(p.h.device, t.warps),
        )
