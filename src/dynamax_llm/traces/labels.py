"""What heads learn at an exit: whether, or how nearly, stopping there gives the full model's token.

- "action": 1 iff what this exit does gives the full model's argmax; for ``head`` and ``lens`` its own argmax, for
  ``tail`` that of the last k layers run over h_e of the whole sequence.
- "probability": the full model's probability of the exit's token.
- "overlap": the share that the two distributions have in common, 1 - total variation: the probability that the exit's
  token, sampled, would be accepted as the full model's (speculative sampling, arXiv 2302.01318).
- "topk": 1 iff the full model's argmax is among the label_k likeliest of final norm and LM head on h_e; the paper's.

The first says what greedy decoding does, and is what agreement counts whatever heads learn from. The soft two tell
near misses from nonsense.

Shapes: B rows, T tokens, n real (unpadded) tokens, d width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone, Context
from dynamax_llm.exits.readouts.base import Readout, tokens_at_once
from dynamax_llm.traces.packing import Packing


class Labels:
    """The labels of one batch, of the kind that ``readout.config`` names."""

    def __init__(self, backbone: Backbone, readout: Readout, final: Tensor, real: Packing) -> None:
        """``final`` (B, T, d) is what the full model's last layer gave, with every state intact."""
        self.backbone, self.readout, self.real = backbone, readout, real
        self.final = real.pack(final)  # (n, d)
        self.target = argmax(backbone, self.final)  # (n,)

    def of(self, exit: int, h: Tensor, ctx: Context, spoken: Tensor) -> tuple[Tensor, Tensor]:
        """Whether exit ``exit`` agrees, (B, T) bool, and what heads learn, (B, T) float32, for h (B, T, d) there.

        ``spoken`` (n,) is the argmax of its readout; with the ``tail`` readout the last layers speak instead.
        """
        config, backbone, real = self.readout.config, self.backbone, self.real
        if config.tail_layers:
            through = h
            for index in range(backbone.n_layers - config.tail_layers, backbone.n_layers):
                through = backbone.layer(index, through, None, ctx)
            speaks = real.pack(through)
            spoken = argmax(backbone, speaks)
        else:
            speaks = real.pack(h)
        hard = spoken == self.target
        if config.labels.kind == "topk":
            hard = among_top(backbone, real.pack(h), self.target, config.labels.k)
        aim = hard.float()
        if config.labels.kind == "probability":
            aim = probability(backbone, self.final, spoken)
        elif config.labels.kind == "overlap":
            aim = overlap(backbone, self.final, self.readout, exit, speaks)
        return real.unpack(hard), real.unpack(aim)


def slices(backbone: Backbone, count: int) -> list[slice]:
    """Runs of ``count`` tokens whose logits may exist at once."""
    step = tokens_at_once(backbone)
    return [slice(start, start + step) for start in range(0, count, step)]


def argmax(backbone: Backbone, h: Tensor) -> Tensor:
    """The token (n,) that final norm and LM head give for h (n, d)."""
    return torch.cat([backbone.readout(h[None, run])[0].argmax(-1) for run in slices(backbone, len(h))])


def among_top(backbone: Backbone, h: Tensor, target: Tensor, k: int) -> Tensor:
    """Whether ``target`` (n,) is among the k likeliest tokens that final norm and LM head give for h (n, d)."""
    found = []
    for run in slices(backbone, len(h)):
        logits = backbone.readout(h[None, run])[0]  # (slice, V)
        found.append((logits > logits.gather(-1, target[run, None])).sum(-1) < k)
    return torch.cat(found)


def probability(backbone: Backbone, final: Tensor, spoken: Tensor) -> Tensor:
    """The full model's probability (n,) of tokens ``spoken`` (n,), from its last h (n, d)."""
    found = []
    for run in slices(backbone, len(final)):
        chances = backbone.readout(final[None, run])[0].softmax(-1)  # (slice, V)
        found.append(chances.gather(-1, spoken[run, None])[:, 0])
    return torch.cat(found)


def overlap(backbone: Backbone, final: Tensor, readout: Readout, exit: int, h: Tensor) -> Tensor:
    """What the full model's distribution and that of exit ``exit`` share (n,), from the last h and its h, (n, d)."""
    found = []
    for run in slices(backbone, 2 * len(h)):  # two distributions at once
        run = slice(run.start // 2, run.stop // 2)
        full = backbone.readout(final[None, run])[0]
        here = readout.logits(exit, readout.transform(exit, h[None, run])[0])[0]
        found.append(torch.minimum(full.softmax(-1), here.softmax(-1)).sum(-1))
    return torch.cat(found)
