"""The transformer block: pre-norm attention over the last W tokens with rotary positions, then a feed-forward part.

Its layout is that of a Llama layer, so it can start from a backbone's last layer. Shapes: B batch, T tokens, F forks,
d width, H heads, G heads of keys and values, P channels of a head, W window, S = W - 1 + T slots.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamax_llm.exits.block_kinds.base import Block, BlockShape, FeedForward, Fork, linear, matrix, rms_norm
from dynamax_llm.exits.state import State


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary positions (B or 1, T) applied to x (B, T, heads, P), halves as in Llama."""
    half = x.shape[-1] // 2
    angles = (positions.unsqueeze(-1) * _frequencies(half, theta, x.device)).unsqueeze(2)  # (B or 1, T, 1, P / 2)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.float().split(half, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@lru_cache(maxsize=16)
def _frequencies(half: int, theta: float, device: torch.device) -> Tensor:
    """The rotary frequencies (P / 2,), made once."""
    with torch.inference_mode(False):
        return theta ** -(torch.arange(half, device=device, dtype=torch.float32) / half)


class TransformerBlock(Block):
    """State: keys and values (B, W - 1, G, P) of the last tokens, turned; which of them hold a token (B, W - 1); and
    how many tokens there were (B,)."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__(shape)
        rows, kv_rows = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        self.norm = nn.Parameter(torch.ones(shape.inputs))
        self.query, self.key, self.value = (matrix(count, shape.inputs) for count in (rows, kv_rows, kv_rows))
        self.out = matrix(shape.width, rows, scale=0.1)
        self.feed_forward = FeedForward(shape.width, shape.inner)

    def initial_state(self, batch: int, device: torch.device | str) -> State:
        shape = self.shape
        kv = (batch, shape.window - 1, shape.kv_heads, shape.head_width)
        none = torch.zeros(batch, shape.window - 1, dtype=torch.bool, device=device)
        counts = torch.zeros(batch, dtype=torch.int64, device=device)
        return (
            torch.zeros(kv, dtype=self.dtype, device=device),
            torch.zeros(kv, dtype=self.dtype, device=device),
            none,
            counts,
        )

    def forward(self, x: Tensor, state: State, padding: Tensor | None = None) -> tuple[Tensor, State]:
        n, stream = self._read(x)
        real, positions = _positions(x, state[3], padding)
        keys, values, seen, after = self._append(n, state, real, positions, None)
        q = rotate(linear(n, self.query).unflatten(-1, (self.shape.heads, -1)), positions, self.shape.theta)
        y = self._attend(q, keys, values, self._visible(seen, x.shape[1]))
        return self.feed_forward(stream + linear(y, self.out)), after

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What queries, keys and values are made from, and the residual stream, from x (B, T, d or 2 d)."""
        if not self.shape.paired:
            return rms_norm(x, self.norm), x
        parts = zip(x.chunk(2, dim=-1), self.norm.chunk(2), strict=True)
        first, second = (rms_norm(part, weight) for part, weight in parts)
        return torch.cat((first, second), dim=-1), second

    def _is_key(self, n: Tensor) -> Tensor:
        """Which of normed inputs n (B, T, d or 2 d) others may attend to (B, T)."""
        if not self.shape.paired:
            return torch.ones(n.shape[:2], dtype=torch.bool, device=n.device)
        return n.chunk(2, dim=-1)[1].any(-1)

    def update(self, x: Tensor, state: State, padding: Tensor | None = None, counts: Tensor | None = None) -> State:
        real, positions = _positions(x, state[3], padding)
        return self._append(self._read(x)[0], state, real, positions, counts)[3]

    def _keys_values(self, n: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Of normed inputs n (B, T, d): (B, T, G, P) each, keys turned."""
        k, v = (linear(n, weight).unflatten(-1, (self.shape.kv_heads, -1)) for weight in (self.key, self.value))
        return rotate(k, positions, self.shape.theta), v

    def _append(
        self, n: Tensor, state: State, real: Tensor, positions: Tensor, counts: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        """Keys, values (B, S, G, P) and validity (B, S) of the state and the new tokens, and the state after them."""
        fresh = (*self._keys_values(n, positions), real & self._is_key(n))
        joined = [torch.cat((past.to(new.dtype), new), dim=1) for past, new in zip(state[:3], fresh, strict=True)]
        count = n.shape[1]
        if counts is None:
            kept = [part[:, count:] for part in joined]
            ends = positions[:, -1] + 1
        else:  # each row's last W - 1 slots end with its own last token
            rows = torch.arange(len(n), device=n.device).unsqueeze(1)
            slots = counts.unsqueeze(1) + torch.arange(self.shape.window - 1, device=n.device)
            kept, ends = [part[rows, slots] for part in joined], state[3] + counts
        keys, values, seen = joined
        return keys, values, seen, (*kept, ends)

    def _visible(self, seen: Tensor, count: int) -> Tensor:
        """Which slots each of the newest ``count`` tokens attends to (B, 1, T, S): itself at least."""
        if count == 1:  # the state holds no more than the window
            return torch.cat((seen[:, :-1], torch.ones_like(seen[:, -1:])), dim=1)[:, None, None]
        slots = torch.arange(seen.shape[1], device=seen.device)
        own = slots[-count:].unsqueeze(1)
        inside = (slots <= own) & (slots > own - self.shape.window)
        return ((seen.unsqueeze(1) & inside) | (slots == own)).unsqueeze(1)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
        """Attention of q (B, T, H, P) over keys and values (B, S, G, P): (B, T, H P). ``visible`` None: causal."""
        q, keys, values = (part.transpose(1, 2) for part in (q, keys, values))
        grouped = self.shape.heads != self.shape.kv_heads
        y = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=visible, is_causal=visible is None, enable_gqa=grouped
        )
        return y.transpose(1, 2).flatten(2)

    def fork(self, x: Tensor, forks: Tensor) -> tuple[Tensor, Fork]:
        n, stream = self._read(x)
        keys, values = self._keys_values(n, torch.arange(x.shape[1], device=x.device).unsqueeze(0))
        fork = _TransformerFork(self, forks, keys, values, self._is_key(n))
        return fork.first(stream[:, forks], n[:, forks]), fork

    def forks(self, count: int, every: int, generator: torch.Generator) -> Tensor:
        start = int(torch.randint(min(every, count), (1,), generator=generator))
        return torch.arange(start, count, every)

    def macs(self) -> int:
        return self.shape.attention_size + self.feed_forward.macs()

    def update_macs(self) -> int:
        return self.key.numel() + self.value.numel()


class _TransformerFork(Fork):
    """Keys and values of the sequence (B, T, G, P), shared by all forks, and of each fork's own tokens."""

    def __init__(self, block: TransformerBlock, forks: Tensor, keys: Tensor, values: Tensor, is_key: Tensor) -> None:
        self.block, self.positions, self.keys, self.values = block, forks, keys, values
        slots = torch.arange(keys.shape[1], device=forks.device)
        own = forks.unsqueeze(1)
        # (B, F, T): the sequence up to the fork
        self._before = (slots <= own) & (is_key.unsqueeze(1) | (slots == own))
        self._slots = slots
        self._own: list[tuple[Tensor, Tensor]] = []

    def first(self, x: Tensor, n: Tensor) -> Tensor:
        """The outputs at the forks themselves, from the stream x and the normed inputs n (B, F, ...)."""
        q = self._queries(n)
        y = self.block._attend(q, self.keys, self.values, self._inside())
        return self.block.feed_forward(x + linear(y, self.block.out))

    def step(self, x: Tensor) -> Tensor:
        self.positions = self.positions + 1
        n, stream = self.block._read(x)
        newest = self.block._keys_values(n, self.positions.unsqueeze(0))
        self._own = [*self._own, newest][-self.block.shape.window :]
        q = self._queries(n).transpose(1, 2)  # (B, H, F, P)
        groups = self.block.shape.heads // self.block.shape.kv_heads

        def spread(part: Tensor) -> Tensor:  # (B, T, G, P) to (B, H, T, P)
            return part.transpose(1, 2).repeat_interleave(groups, dim=1)

        scores = q @ spread(self.keys).transpose(-1, -2)  # (B, H, F, T)
        scores = scores.masked_fill(~self._inside(), torch.finfo(scores.dtype).min)
        own = [(q * spread(k)).sum(-1, keepdim=True) for k, _ in self._own]
        weights = torch.cat((scores, *own), dim=-1).float() * q.shape[-1] ** -0.5
        weights = weights.softmax(-1).to(q.dtype)
        y = weights[..., : -len(own)] @ spread(self.values)
        for place, (_, v) in enumerate(self._own):
            y = y + weights[..., place - len(own), None] * spread(v)
        return self.block.feed_forward(stream + linear(y.transpose(1, 2).flatten(2), self.block.out))

    def _queries(self, n: Tensor) -> Tensor:
        block = self.block
        q = linear(n, block.query).unflatten(-1, (block.shape.heads, -1))
        return rotate(q, self.positions.unsqueeze(0), block.shape.theta)

    def _inside(self) -> Tensor:
        """Which positions of the sequence each fork's newest token attends to (B, 1, F, T)."""
        inside = self._before & (self._slots > self.positions.unsqueeze(1) - self.block.shape.window)
        return inside.unsqueeze(1)


def _positions(x: Tensor, past: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which of x (B, T, d) are tokens (B, T) bool, and their positions (B, T) after ``past`` (B,) tokens."""
    if padding is None:
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return real, past.unsqueeze(1) + torch.arange(x.shape[1], device=x.device)
    real = padding.bool()
    return real, (past.unsqueeze(1) + real.cumsum(1) - 1).clamp(min=0)
