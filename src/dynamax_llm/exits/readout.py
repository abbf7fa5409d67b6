"""How an exit turns its hidden state into logits: ``head``, ``tail`` or ``lens``.

- ``head``: the backbone's final norm and LM head on h_e.
- ``tail``: the engine runs the last k layers on h_e first, then final norm and LM head. The decision is taken before
  that, so its statistics come from the plain head on h_e (the "logit lens").
- ``lens``: a learned low-rank translator h_e + B_e A_e h_e, then final norm and LM head (a low-rank relative of the
  tuned lens, arXiv 2303.08112).

Shapes: B batch, T tokens, d width, V vocabulary, E exits, r lens rank.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from dynamax_llm.backbones.base import Backbone
from dynamax_llm.exits.config import ExitConfig
from dynamax_llm.exits.features import ExitFeatures, concatenate, exit_features
from dynamax_llm.shapes import Hidden, Ids, Logits

#: Logits made at once when a whole sequence is read out; bounds memory at 64 MiB a float32 copy.
LOGITS_AT_ONCE = 1 << 24
#: A GPU makes so many times more, because there every slice costs launches (measured: recipes/scale).
GPU_FACTOR = 4


class Lens(nn.Module):
    """One low-rank residual translator per exit: h + B (A h), zero at the start because B is."""

    def __init__(self, n_exits: int, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.ParameterList(nn.Parameter(torch.randn(rank, width) * width**-0.5) for _ in range(n_exits))
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(width, rank)) for _ in range(n_exits))

    def forward(self, exit: int, h: Hidden) -> Hidden:
        """h (B, T, d) translated, in its own dtype; the product runs in float32. B A h scales with h by itself."""
        moved = nn.functional.linear(nn.functional.linear(h.float(), self.down[exit]), self.up[exit])
        return (h.float() + moved).to(h.dtype)

    def macs(self, exit: int) -> int:
        """Multiply-accumulates per token."""
        return self.down[exit].numel() + self.up[exit].numel()


class Readout:
    """Logits at the exits of one backbone."""

    def __init__(self, backbone: Backbone, config: ExitConfig, lens: Lens | None = None) -> None:
        """``lens`` is required by, and only used with, ``config.readout == "lens"``."""
        assert (lens is not None) == (config.readout == "lens"), config.readout
        self.backbone, self.config, self.lens = backbone, config, lens

    @property
    def tail_layers(self) -> int:
        """Layers the engine runs between leaving an exit and ``logits``: 0 unless the readout is ``tail``."""
        return self.config.tail_layers if self.config.readout == "tail" else 0

    def logits(self, exit: int, h: Hidden) -> Logits:
        """Float32 logits (B, T, V) that speak for exit ``exit``; with ``tail``, h has been through the tail."""
        return self.backbone.readout(h if self.lens is None else self.lens(exit, h))

    def decision_logits(self, exit: int, h: Hidden) -> Logits:
        """Float32 logits (B, T, V) the decision at exit ``exit`` is taken from; with ``tail``, before the tail."""
        return self.logits(exit, h)

    @property
    def decision_is_output(self) -> bool:
        """True if the logits the decision was taken from are those of the token: no second readout is needed."""
        return self.config.readout != "tail"

    def read(
        self, exit: int, h: Hidden, h_before: Hidden, previous: ExitFeatures | None
    ) -> tuple[ExitFeatures, Logits | None]:
        """What exit ``exit`` sees of h (B, 1, d), and its logits (B, 1, V) if it read all and they may be output.

        With ``config.candidates`` the first exit reads the whole vocabulary and the later ones only its shortlist, so
        that a check there costs next to nothing (the idea of SpecEE, arXiv 2504.08850).
        """
        if previous is not None and previous.candidates is not None:
            moved = h if self.lens is None else self.lens(exit, h)
            few = self.backbone.readout_of(moved, previous.candidates)
            return self._named(exit_features(h, h_before, few, previous)), None
        logits = self.decision_logits(exit, h)
        seen = self._features(h, h_before, logits, previous)
        return self._named(seen), logits if self.decision_is_output else None

    def features(
        self, exit: int, h: Hidden, h_before: Hidden, previous: ExitFeatures | None
    ) -> tuple[ExitFeatures, Ids]:
        """What ``read`` sees, over a whole sequence h (B, T, d), and the argmax (B, T) of all the logits.

        In slices of T, so that memory stays bounded; every slice reads the whole vocabulary, for the argmax.
        """
        step = max(1, tokens_at_once(self.backbone) // h.shape[0])
        parts, tokens = [], []
        for start in range(0, h.shape[1], step):
            run = slice(start, start + step)
            before = None if previous is None else slice_features(previous, run)
            logits = self.decision_logits(exit, h[:, run])
            tokens.append(logits.argmax(-1))
            if before is not None and before.candidates is not None:
                logits = logits.gather(-1, before.candidates)
            parts.append(self._named(self._features(h[:, run], h_before[:, run], logits, before)))
        return parts[0] if len(parts) == 1 else concatenate(parts), torch.cat(tokens, dim=1)

    def _features(self, h: Hidden, h_before: Hidden, logits: Logits, previous: ExitFeatures | None) -> ExitFeatures:
        """ExitFeatures of logits over the whole vocabulary, or over the candidates of the exits before."""
        return exit_features(h, h_before, logits, previous, self.config.candidates, self.config.shortlist == "pairs")

    def _named(self, seen: ExitFeatures) -> ExitFeatures:
        """With the LM head's rows of the leading token and its runner-up, if the heads read them."""
        if "tokens" not in self.config.inputs or seen.token is None or seen.rival is None:
            return seen
        rows = self.backbone.output_rows(torch.stack((seen.token, seen.rival), dim=-1))  # (B, T, 2, d)
        return dataclasses.replace(seen, rows=rows.flatten(-2))

    def macs(self, exit: int) -> int:
        """Multiply-accumulates of one readout of one token: LM head, and the lens if there is one."""
        return self.backbone.costs().readout + (0 if self.lens is None else self.lens.macs(exit))

    def reads_all(self, exit: int) -> bool:
        """Whether a look at exit ``exit`` reads the whole vocabulary."""
        return exit == 0 or not self.config.candidates

    def read_macs(self, exit: int) -> int:
        """Multiply-accumulates of one look at one token."""
        if self.reads_all(exit):
            return self.macs(exit)
        few = min(self.config.candidates, self.backbone.vocab_size) * self.backbone.width
        return few + (0 if self.lens is None else self.lens.macs(exit))


def tokens_at_once(backbone: Backbone) -> int:
    """How many tokens' logits may exist at once."""
    logits = LOGITS_AT_ONCE * (GPU_FACTOR if backbone.device.type == "cuda" else 1)
    return max(1, logits // backbone.vocab_size)


def slice_features(features: ExitFeatures, run: slice) -> ExitFeatures:
    """The tokens ``run`` of ``features``."""
    token, candidates = (None if part is None else part[:, run] for part in (features.token, features.candidates))
    return ExitFeatures(features.values[:, run], token, candidates)
