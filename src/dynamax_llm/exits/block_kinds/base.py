"""The interface of a block: one trained layer of a readout, causal over the tokens of a sequence, with its own state.

A block reads whole runs of tokens or one token, from a state or from the start of a sequence; the state has a fixed
size, so it is copied, selected by row and rolled back like every state of an exit. For training, ``fork`` gives outputs
at chosen positions alone, and from each of them the block can go on over tokens of its own.

Shapes: B batch, T tokens, F forks, d width.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynamax_llm.exits.state import State

#: Added to mean squares under a root.
EPSILON = 1e-5
#: Channels of an attention head where nothing else is asked for.
HEAD_WIDTH = 64


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a block of width d: attention heads and their channels, inner width of the feed-forward part, tokens
    that attention reaches back (``window``), base of the rotary positions (``theta``).

    ``paired``: the block reads pairs of vectors side by side (2 d wide), and its residual stream begins as the second
    of each, normed: the form of EAGLE-3's layer (arXiv 2503.01840). A token whose second vector is zero is no key.
    """

    width: int
    heads: int
    kv_heads: int
    head_width: int
    inner: int
    window: int
    theta: float
    paired: bool = False

    @classmethod
    def of(
        cls,
        width: int,
        *,
        heads: int = 0,
        kv_heads: int = 0,
        head_width: int = 0,
        inner: int = 0,
        window: int = 512,
        theta: float = 10_000.0,
        paired: bool = False,
    ) -> BlockShape:
        """Sizes given as 0 follow from the width: heads of HEAD_WIDTH channels, a third of them with keys and values
        of their own where that divides, and an inner width of eight thirds of the width."""
        head_width = head_width or min(HEAD_WIDTH, width)
        heads = heads or max(1, width // head_width)
        kv_heads = kv_heads or (heads // 3 if heads % 3 == 0 else heads)
        return cls(width, heads, kv_heads, head_width, inner or 8 * width // 3, window, theta, paired)

    @property
    def inputs(self) -> int:
        """Width of what queries, keys and values are made from."""
        return 2 * self.width if self.paired else self.width

    @property
    def attention_size(self) -> int:
        """Weights of the attention part."""
        return self.head_width * (self.inputs * (self.heads + 2 * self.kv_heads) + self.width * self.heads)

    @property
    def size(self) -> int:
        """Weights of a transformer block of this shape: what a block of another kind matches."""
        return self.attention_size + 3 * self.width * self.inner


class Fork(abc.ABC):
    """A block after each of F positions of every row, going on over tokens of its own."""

    @abc.abstractmethod
    def step(self, x: Tensor) -> Tensor:
        """The next token of every fork, x (B, F, d): the block's outputs (B, F, d)."""


class Block(nn.Module, abc.ABC):
    """One trained layer of width d. Its weights are cast to the dtype of what it reads."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.shape = shape

    @abc.abstractmethod
    def forward(self, x: Tensor, state: State, padding: Tensor | None = None) -> tuple[Tensor, State]:
        """Outputs (B, T, d) of x (B, T, d) after ``state``, and the state after them.

        ``padding`` (B, T), 0 at left pads, is allowed at the start of a sequence.
        """

    @abc.abstractmethod
    def update(self, x: Tensor, state: State, padding: Tensor | None = None, counts: Tensor | None = None) -> State:
        """The state that ``forward`` leaves, without outputs; of the first ``counts`` (B,) tokens of every row."""

    @abc.abstractmethod
    def initial_state(self, batch: int, device: torch.device | str) -> State:
        """The state before any token."""

    @abc.abstractmethod
    def fork(self, x: Tensor, forks: Tensor) -> tuple[Tensor, Fork]:
        """Outputs (B, F, d) at positions ``forks`` (F,) of x (B, T, d), whole sequences, and the block after each."""

    @abc.abstractmethod
    def forks(self, count: int, every: int, generator: torch.Generator) -> Tensor:
        """Positions (F,) of ``count``, about one in ``every``, from which ``fork`` can go on."""

    @abc.abstractmethod
    def macs(self) -> int:
        """Multiply-accumulates of one token; attention over the state is not counted."""

    @abc.abstractmethod
    def update_macs(self) -> int:
        """Multiply-accumulates of ``update`` by one token."""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def matrix(out: int, inputs: int, scale: float = 1.0) -> nn.Parameter:
    """A weight (out, inputs), normal with deviation ``scale`` over the root of the inputs."""
    return nn.Parameter(torch.randn(out, inputs) * scale * inputs**-0.5)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x at unit root mean square along its last axis, times ``weight``, in x's dtype."""
    return nn.functional.rms_norm(x, x.shape[-1:], weight.to(x.dtype), EPSILON)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., inputs) by ``weight`` (out, inputs) in the dtype of x."""
    return nn.functional.linear(x, weight.to(x.dtype))


class FeedForward(nn.Module):
    """Pre-norm gated feed-forward: x + down(silu(gate(n)) * up(n)), n = norm(x)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(width))
        self.gate, self.up = matrix(inner, width), matrix(inner, width)
        self.down = matrix(width, inner, scale=0.1)

    def forward(self, x: Tensor) -> Tensor:
        n = rms_norm(x, self.norm)
        return x + linear(nn.functional.silu(linear(n, self.gate)) * linear(n, self.up), self.down)

    def macs(self) -> int:
        """Multiply-accumulates of one token."""
        return self.gate.numel() + self.up.numel() + self.down.numel()
