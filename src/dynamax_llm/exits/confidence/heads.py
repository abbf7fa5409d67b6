"""Exit heads: learned classifiers of P(stopping here gives the full model's token), one independent head per exit.

Kinds are banks (``bank.py``), registered in ``HEADS``; they read the hidden state, statistics of the logits, and the
LM head's rows of the two leading tokens. Recurrent kinds read a token that left before their exit as it was when it
left: its hidden state and features there; training does the same (``traces/simulate.py``). Everything runs in float32.

Shapes: B batch, T tokens, d width, D inputs, E exits, S exits run side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynamax_llm.exits.confidence.bank import auto_width, unit_rms
from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.config import INPUTS, ExitConfig
from dynamax_llm.exits.features import STATISTICS, ExitFeatures
from dynamax_llm.exits.registries import HEADS
from dynamax_llm.exits.state import State


class ExitHeads(nn.Module, ConfidenceEstimator):
    """The heads of one set of exits, as a ConfidenceEstimator. Confidence is sigmoid(logit + prior).

    ``prior`` (E,) holds each exit's log-odds of agreement, measured in training: the loss is class-balanced, and the
    prior turns the logit back into P(agree), so that one threshold means the same at every exit.
    """

    def __init__(self, config: ExitConfig, width: int) -> None:
        """Untrained heads for a backbone of ``width``. Raises UsageError if the configuration names no head."""
        super().__init__()
        self.kind = "none" if config.head is None else config.head
        self.uses_hidden, self.uses_statistics, self.uses_tokens = (kind in config.inputs for kind in INPUTS)
        self.needs_logits = self.uses_statistics or self.uses_tokens
        inputs = width * (self.uses_hidden + 2 * self.uses_tokens) + len(STATISTICS) * self.uses_statistics
        self.bank = HEADS.lookup(self.kind)(len(config.layers), inputs, config.width or auto_width(width))
        self.recurrent = self.bank.recurrent
        self.register_buffer("prior", torch.zeros(len(config.layers)))
        self.register_buffer("shift", torch.zeros(len(config.layers), 1, 1, inputs))
        self.register_buffer("scale", torch.ones(len(config.layers), 1, 1, inputs))
        self.prior: Tensor
        self.shift: Tensor
        self.scale: Tensor

    def raw_inputs(self, h: Tensor, features: ExitFeatures) -> Tensor:
        """The heads' inputs side by side (B, T, D): h (B, T, d), the statistics, the LM head's rows of the leading
        token and its runner-up; h and rows are scaled to unit root mean square."""
        parts = [unit_rms(h)] if self.uses_hidden else []
        if self.uses_statistics:
            parts.append(features.values)
        if self.uses_tokens:
            assert features.rows is not None, (
                "the readout that made these features was configured without the input 'tokens'"
            )
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
