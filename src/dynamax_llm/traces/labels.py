"""What heads learn at an exit: whether, or how nearly, stopping there gives the full model's token.

- "action": 1 iff the exit's readout gives the full model's argmax, the last k layers included where it is ``tail``.
- "probability": the full model's probability of the exit's token.
- "overlap": the share that the two distributions have in common, 1 - total variation: the probability that the exit's
  token, sampled, would be accepted as the full model's (speculative sampling, arXiv 2302.01318).
- "topk": 1 iff the full model's argmax is among the k likeliest of final norm and LM head on h_e; the paper's.

The first is what greedy decoding does and what agreement counts; the next two also grade near misses.

Shapes: n tokens, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.exits.readouts.base import Readout, tokens_at_once


@dataclass(frozen=True)
class Label:
    """A kind of those above; ``k`` is read by "topk" alone."""

    kind: str = "action"
    k: int = 15

    @property
    def is_agreement(self) -> bool:
        """Whether a head's confidence estimates agreement of the exit's own token."""
        return self.kind != "topk"


ACTION = Label()


class LabelMaker:
    """The labels of one batch's tokens, given the full model's last hidden state (n, d) there."""

    def __init__(self, backbone: Backbone, readout: Readout, final: Tensor, label: Label) -> None:
        self.backbone, self.readout, self.final, self.label = backbone, readout, final, label
        self.full_tokens = argmax(backbone, final)  # (n,)

    def of(self, exit: int, h: Tensor, tokens: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """Whether exit ``exit`` agrees (n,) bool, and what heads learn (n,) float32.

        ``h`` (n, d) is the exit's hidden state, ``read`` (n, d) what its LM head reads once the token has left, and
        ``tokens`` (n,) the argmax of the decision's readout; with a tail that of ``read`` replaces it.
        """
        if self.readout.tail_layers:
            tokens = argmax(self.backbone, read)
        agrees = tokens == self.full_tokens
        match self.label.kind:
            case "topk":
                agrees = self._among_top(h)
            case "probability":
                return agrees, self._probability(tokens)
            case "overlap":
                return agrees, self._overlap(exit, read)
        return agrees, agrees.float()

    def _among_top(self, h: Tensor) -> Tensor:
        def read(run: slice) -> Tensor:
            logits = self.backbone.readout(h[None, run])[0]  # (slice, V)
            return (logits > logits.gather(-1, self.full_tokens[run, None])).sum(-1) < self.label.k

        return sliced(self.backbone, len(h), read)

    def _probability(self, tokens: Tensor) -> Tensor:
        def read(run: slice) -> Tensor:
            return self.backbone.readout(self.final[None, run])[0].softmax(-1).gather(-1, tokens[run, None])[:, 0]

        return sliced(self.backbone, len(tokens), read)

    def _overlap(self, exit: int, read_h: Tensor) -> Tensor:
        def read(run: slice) -> Tensor:
            full = self.backbone.readout(self.final[None, run])[0]
            early = self.readout.logits(exit, read_h[None, run])[0]
            return torch.minimum(full.softmax(-1), early.softmax(-1)).sum(-1)

        return sliced(self.backbone, len(read_h), read, distributions=2)


def slices(backbone: Backbone, count: int, distributions: int = 1) -> list[slice]:
    """Runs of ``count`` tokens whose logits, ``distributions`` at a token, may exist at once."""
    step = max(1, tokens_at_once(backbone) // distributions)
    return [slice(start, start + step) for start in range(0, count, step)]


def sliced(backbone: Backbone, count: int, read: Callable[[slice], Tensor], distributions: int = 1) -> Tensor:
    """``read`` of every slice of ``count`` tokens, put together (count, ...)."""
    return torch.cat([read(run) for run in slices(backbone, count, distributions)])


def argmax(backbone: Backbone, h: Tensor) -> Tensor:
    """The token (n,) that final norm and LM head give for h (n, d)."""
    return sliced(backbone, len(h), lambda run: backbone.readout(h[None, run])[0].argmax(-1))
