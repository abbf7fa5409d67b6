"""Exit heads: learned classifiers of P(stopping here gives the full model's token), one independent head per exit.

Four kinds, on the hidden state, on the readout's statistics, or on both:

- ``linear``: one logit, straight from the inputs.
- ``mlp``: down-projection, GELU layer, logit.
- ``transformer``: down-projection, causal self-attention over the last 64 tokens, feed-forward, logit.
- ``mamba``: down-projection, a selective state-space block in the state-space-dual form of Mamba-2 (arXiv 2405.21060)
  whose output projection goes to the exit decision instead of back to the width, as arXiv 2504.20922 describes.

The last two are recurrent over the tokens of a sequence. **What they see of a token that left before their exit** is
the hidden state and the statistics with which it left; training sees the same (see ``training/trainer.py``).

All heads of one kind live in one bank whose parameters have a leading exit axis, so that the states of all later
exits can be advanced at once by a token that left. Everything runs in float32.

Shapes: B batch, T tokens, d width, D inputs, w inner width, E exits, S exits run side by side.
"""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamax_llm.exits.blocks import advance_cell, causal_convolution, scan, windowed_attention
from dynamax_llm.exits.config import INPUTS, ExitConfig
from dynamax_llm.exits.features import STATISTICS, ConfidenceEstimator, ExitFeatures, State
from dynamax_llm.registry import Registry


def auto_width(width: int) -> int:
    """Inner width of a head on a backbone of this width: under 2 % of a 7B layer, small on small backbones."""
    return max(16, min(64, width // 6))


class Bank(nn.Module, abc.ABC):
    """E heads of one kind, computed for any run of consecutive exits at once. ``exits`` is that run."""

    recurrent = False

    def __init__(self, n_exits: int, inputs: int, width: int) -> None:
        super().__init__()
        self.n_exits, self.inputs, self.width = n_exits, inputs, width

    def matrix(self, *shape: int) -> nn.Parameter:
        """(E, *shape), drawn for inputs along the first axis of ``shape``."""
        return nn.Parameter(torch.randn(self.n_exits, *shape) * shape[0] ** -0.5)

    def constant(self, *shape: int, value: float = 0.0) -> nn.Parameter:
        return nn.Parameter(torch.full((self.n_exits, *shape), value))

    @abc.abstractmethod
    def forward(self, exits: slice, x: Tensor, state: State | None, padding: Tensor | None) -> tuple[Tensor, State]:
        """Logits (S, B, T) from inputs x (S, B, T, D), and the state, whose tensors are (S, B, ...)."""

    def advance(self, exits: slice, x: Tensor, state: State, padding: Tensor | None) -> State:
        """The state that ``forward`` would return, without the logits."""
        return self(exits, x, state, padding)[1]

    def initial_state(self, batch: int, device: torch.device | str) -> State:
        """(E, B, ...) zeros: a state that has seen nothing."""
        return ()

    @abc.abstractmethod
    def macs(self) -> int:
        """Multiply-accumulates of one head on one token."""

    def update_macs(self) -> int:
        """Multiply-accumulates of advancing one head's state by one token."""
        return 0


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (S, B, T, D), each exit by its own weight (S, D, w) and bias (S, 1, w), to (S, B, T, w)."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    out = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias, rows, weight)
    return out.view(*x.shape[:-1], -1)


def unit_rms(h: Tensor) -> Tensor:
    """h scaled to root mean square 1 along its last axis, in float32."""
    h = h.float()
    return h * (math.sqrt(h.shape[-1]) / torch.linalg.vector_norm(h, dim=-1, keepdim=True).clamp(min=1e-12))


class LinearBank(Bank):
    """One logit, straight from the inputs."""

    def __init__(self, n_exits: int, inputs: int, width: int) -> None:
        super().__init__(n_exits, inputs, width)
        self.weight, self.bias = self.constant(inputs, 1), self.constant(1, 1)

    def forward(self, exits: slice, x: Tensor, state: State | None, padding: Tensor | None) -> tuple[Tensor, State]:
        return project(x, self.weight[exits], self.bias[exits]).squeeze(-1), ()

    def macs(self) -> int:
        return self.inputs


class MlpBank(Bank):
    """Down-projection to w, GELU layer of 2 w, logit."""

    def __init__(self, n_exits: int, inputs: int, width: int) -> None:
        super().__init__(n_exits, inputs, width)
        self.embed, self.embed_bias = self.matrix(inputs, width), self.constant(1, width)
        self.up, self.up_bias = self.matrix(width, 2 * width), self.constant(1, 2 * width)
        self.out, self.out_bias = self.constant(2 * width, 1), self.constant(1, 1)

    def forward(self, exits: slice, x: Tensor, state: State | None, padding: Tensor | None) -> tuple[Tensor, State]:
        x = project(x, self.embed[exits], self.embed_bias[exits])
        x = F.gelu(project(x, self.up[exits], self.up_bias[exits]))
        return project(x, self.out[exits], self.out_bias[exits]).squeeze(-1), ()

    def macs(self) -> int:
        return self.inputs * self.width + 2 * self.width * self.width + 2 * self.width


class TransformerBank(Bank):
    """One pre-norm block: causal attention over the last WINDOW tokens and feed-forward, then the logit."""

    recurrent = True
    WINDOW = 64
    HEADS = 2

    def __init__(self, n_exits: int, inputs: int, width: int) -> None:
        super().__init__(n_exits, inputs, width)
        self.embed, self.embed_bias = self.matrix(inputs, width), self.constant(1, width)
        self.qkv, self.distance = self.matrix(width, 3 * width), self.constant(self.HEADS, self.WINDOW)
        self.mix = self.matrix(width, width)
        self.up, self.up_bias = self.matrix(width, 2 * width), self.constant(1, 2 * width)
        self.down = self.matrix(2 * width, width)
        self.out, self.out_bias = self.constant(width, 1), self.constant(1, 1)

    def forward(self, exits: slice, x: Tensor, state: State | None, padding: Tensor | None) -> tuple[Tensor, State]:
        x = project(x, self.embed[exits], self.embed_bias[exits])
        q, k, v = project(unit_rms(x), self.qkv[exits]).unflatten(-1, (3 * self.HEADS, -1)).chunk(3, dim=3)
        past, valid = self._past(exits, x, state), self._valid(x, padding)
        y, after = windowed_attention(q, k, v, valid, self.distance[exits], past)
        x = x + project(y.flatten(-2), self.mix[exits])
        x = x + project(F.gelu(project(unit_rms(x), self.up[exits], self.up_bias[exits])), self.down[exits])
        return project(unit_rms(x), self.out[exits], self.out_bias[exits]).squeeze(-1), after

    def advance(self, exits: slice, x: Tensor, state: State, padding: Tensor | None) -> State:
        x = project(x, self.embed[exits], self.embed_bias[exits])
        kv = project(unit_rms(x), self.qkv[exits][..., self.width :]).unflatten(-1, (2 * self.HEADS, -1))
        fresh = (*kv.chunk(2, dim=3), self._valid(x, padding))
        keep = self.WINDOW - 1
        return tuple(torch.cat(pair, dim=2)[:, :, -keep:] for pair in zip(state, fresh, strict=True))

    def _valid(self, x: Tensor, padding: Tensor | None) -> Tensor:
        return x.new_ones(x.shape[:3]) if padding is None else padding.to(x.dtype).expand(x.shape[0], -1, -1)

    def _past(self, exits: slice, x: Tensor, state: State | None) -> State:
        return tuple(part[exits] for part in self.initial_state(x.shape[1], x.device)) if state is None else state

    def initial_state(self, batch: int, device: torch.device | str) -> State:
        kv = (self.n_exits, batch, self.WINDOW - 1, self.HEADS, self.width // self.HEADS)
        return tuple(torch.zeros(shape, device=device) for shape in (kv, kv, kv[:3]))

    def macs(self) -> int:
        block = (3 + 1 + 2 + 2) * self.width**2 + 2 * self.WINDOW * self.width
        return self.inputs * self.width + block + self.width

    def update_macs(self) -> int:
        return self.inputs * self.width + 2 * self.width**2


class MambaBank(Bank):
    """A selective state-space block whose output projection is the exit decision.

    The inputs are projected down to w; in_proj makes the gate z and what the state sees: x, B, C and dt. The gated,
    RMS-normalised output y (inner width 2 w), the input x through D, and the embedding itself (the block's residual)
    are all read by one logit. The norm's weight would be absorbed by that projection, so there is none.
    """

    recurrent = True
    KERNEL = 4
    STATE = 16
    CHANNELS = 16  # per head

    def __init__(self, n_exits: int, inputs: int, width: int) -> None:
        super().__init__(n_exits, inputs, width)
        self.inner, self.heads = 2 * width, 2 * width // self.CHANNELS
        self.convolved = self.inner + 2 * self.STATE
        self.embed, self.embed_bias = self.matrix(inputs, width), self.constant(1, width)
        self.in_proj = self.matrix(width, self.convolved + self.heads + self.inner)  # x, B, C | dt | z
        self.conv = self.matrix(self.KERNEL, self.convolved)
        self.conv_bias = self.constant(1, 1, self.convolved)
        # As in Mamba-2: time steps between 1/1000 and 1/10 of a unit, decay rates between 1 and 16 per unit.
        step = torch.exp(torch.empty(n_exits, 1, 1, self.heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.log_decay = nn.Parameter(torch.empty(n_exits, 1, 1, self.heads).uniform_(1.0, 16.0).log())
        self.skip = self.constant(1, 1, self.heads, 1, value=1.0)  # D
        self.out, self.out_bias = self.constant(self.inner, 1), self.constant(1, 1)
        self.residual = self.constant(width, 1)

    def forward(self, exits: slice, x: Tensor, state: State | None, padding: Tensor | None) -> tuple[Tensor, State]:
        state = self._past(exits, x, state)
        embedded = project(x, self.embed[exits], self.embed_bias[exits])
        rows = project(embedded, self.in_proj[exits])
        z = rows[..., self.convolved + self.heads :]
        x, b, c, dt, window = self._convolve(exits, rows, state, padding)
        y, cell = scan(x, dt, -self.log_decay[exits].exp(), b, c, state[1])
        y = (y + x * self.skip[exits]).flatten(-2) * F.silu(z)
        logit = project(unit_rms(y), self.out[exits], self.out_bias[exits])
        return (logit + project(embedded, self.residual[exits])).squeeze(-1), (window, cell)

    def _convolve(
        self, exits: slice, rows: Tensor, state: State, padding: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x (S, B, T, H, P), B and C (S, B, T, N), dt (S, B, T, H) and the next window; zero dt and rows at pads."""
        dt = F.softplus(rows[..., self.convolved : self.convolved + self.heads] + self.dt_bias[exits])
        fresh = rows[..., : self.convolved]
        if padding is not None:
            real = padding.to(rows.dtype)[None, :, :, None]
            dt, fresh = dt * real, fresh * real
        mixed, window = causal_convolution(fresh, self.conv[exits], self.conv_bias[exits], state[0])
        x, b, c = mixed.split((self.inner, self.STATE, self.STATE), dim=-1)
        return x.unflatten(-1, (self.heads, self.CHANNELS)), b, c, dt, window

    def advance(self, exits: slice, x: Tensor, state: State, padding: Tensor | None) -> State:
        if x.shape[2] > 1:
            return self(exits, x, state, padding)[1]
        embedded = project(x, self.embed[exits], self.embed_bias[exits])
        rows = project(embedded, self.in_proj[exits][..., : self.convolved + self.heads])  # the state never sees z
        x, b, _, dt, window = self._convolve(exits, rows, state, padding)
        return window, advance_cell(x, dt, -self.log_decay[exits].exp(), b, state[1])

    def _past(self, exits: slice, x: Tensor, state: State | None) -> State:
        return tuple(part[exits] for part in self.initial_state(x.shape[1], x.device)) if state is None else state

    def initial_state(self, batch: int, device: torch.device | str) -> State:
        window = torch.zeros(self.n_exits, batch, self.KERNEL - 1, self.convolved, device=device)
        return window, torch.zeros(self.n_exits, batch, self.heads, self.CHANNELS, self.STATE, device=device)

    def macs(self) -> int:
        return self.update_macs() + self.width * self.inner + self.inner * self.STATE + 2 * self.inner + self.width

    def update_macs(self) -> int:
        weights = self.inputs * self.width + self.width * (self.convolved + self.heads) + self.KERNEL * self.convolved
        return weights + 2 * self.inner * self.STATE


BANKS: Registry[type[Bank]] = Registry(
    "head", {"linear": LinearBank, "mlp": MlpBank, "transformer": TransformerBank, "mamba": MambaBank}
)


class ExitHeads(nn.Module, ConfidenceEstimator):
    """The heads of one set of exits, as a ConfidenceEstimator. Confidence is sigmoid(logit + prior).

    ``prior`` (E,) holds each exit's log-odds of agreement, measured in training: the loss is class-balanced, and the
    prior turns its verdict back into P(agree), so that one threshold means the same at every exit.
    """

    def __init__(self, config: ExitConfig, width: int) -> None:
        """Untrained heads for a backbone of ``width``. Raises UsageError if the configuration names no head."""
        super().__init__()
        self.kind = "none" if config.head is None else config.head
        self.uses_hidden, self.uses_statistics, self.uses_tokens = (kind in config.inputs for kind in INPUTS)
        self.needs_logits = self.uses_statistics or self.uses_tokens
        inputs = width * (self.uses_hidden + 2 * self.uses_tokens) + len(STATISTICS) * self.uses_statistics
        self.bank = BANKS.lookup(self.kind)(len(config.layers), inputs, config.width or auto_width(width))
        self.recurrent = self.bank.recurrent
        self.register_buffer("prior", torch.zeros(len(config.layers)))
        self.register_buffer("shift", torch.zeros(len(config.layers), 1, 1, inputs))
        self.register_buffer("scale", torch.ones(len(config.layers), 1, 1, inputs))
        self.prior: Tensor
        self.shift: Tensor
        self.scale: Tensor

    def raw_inputs(self, h: Tensor, features: ExitFeatures) -> Tensor:
        """What the heads see, side by side (B, T, D): h (B, T, d), the statistics, the LM head's rows of the leading
        token and its runner-up; h and rows are scaled to unit root mean square."""
        parts = [unit_rms(h)] if self.uses_hidden else []
        if self.uses_statistics:
            parts.append(features.values)
        if self.uses_tokens:
            assert features.rows is not None, "a readout whose configuration has other inputs made these signals"
            parts.append(unit_rms(features.rows.unflatten(-1, (2, -1))).flatten(-2))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def fit_inputs(self, exit: int, mean: Tensor, deviation: Tensor) -> None:
        """Standardise this exit's inputs by the mean and deviation (D,) of a sample of ``raw_inputs``.

        Channels of h differ by orders of magnitude in large models, and some statistics hardly vary.
        """
        scale = torch.where(deviation > 1e-4, 1.0 / deviation.clamp(min=1e-4), 1.0)
        self.scale[exit, 0, 0] = scale
        self.shift[exit, 0, 0] = -mean * scale

    def features(self, exits: slice, h: Tensor, features: ExitFeatures) -> Tensor:
        """Standardised inputs (S, B, T, D) of a run of exits."""
        return torch.addcmul(self.shift[exits], self.raw_inputs(h, features), self.scale[exits])

    def logits(
        self, exit: int, h: Tensor, features: ExitFeatures, state: State | None = None, padding: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """The class-balanced logit (B, T) and this exit's state after the T tokens; state None starts anew."""
        past = None if state is None else tuple(part.unsqueeze(0) for part in state)
        here = slice(exit, exit + 1)
        logit, after = self.bank(here, self.features(here, h, features), past, padding)
        return logit.squeeze(0), tuple(part.squeeze(0) for part in after) if self.recurrent else None

    def confidence(
        self, exit: int, h: Tensor, features: ExitFeatures, state: State | None, padding: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        logit, after = self.logits(exit, h, features, state, padding)
        return torch.sigmoid(logit + self.prior[exit]), after

    def advance(
        self, first: int, h: Tensor, features: ExitFeatures, states: list[State] | None, padding: Tensor | None = None
    ) -> list[State] | None:
        if not self.recurrent or first >= self.bank.n_exits:
            return states
        assert states is not None, "a recurrent head needs the states that initial_state() made"
        later = tuple(torch.stack(parts) for parts in zip(*states[first:], strict=True))
        run = slice(first, None)
        after = self.bank.advance(run, self.features(run, h, features), later, padding)
        return states[:first] + list(zip(*(part.unbind(0) for part in after), strict=True))

    def initial_state(self, batch: int, device: torch.device | str = "cpu") -> list[State] | None:
        if not self.recurrent:
            return None
        return list(zip(*(part.unbind(0) for part in self.bank.initial_state(batch, device)), strict=True))

    def macs(self, exit: int) -> int:
        return self.bank.macs()

    def update_macs(self, exit: int) -> int:
        return self.bank.update_macs()
