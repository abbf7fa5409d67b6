"""The decode loop where the likeliest token is all that is asked for: an engine may then feed itself.

Same tokens, same ends, same trace as the loop that calls Hugging Face's processors and criteria; the host only looks at
each token to see whether its row has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dynamax_llm.decoding.request import Request
from dynamax_llm.decoding.thresholds import Thresholds


class Follow(Protocol):
    """A greedy step: reads ids (B,), or the tokens it chose last if None; (tokens, exit indices) of the rows."""

    def __call__(
        self, ids: Tensor | None, thresholds: Sequence[float | None], idle: Tensor | None, banned: Sequence[int] = ()
    ) -> tuple[list[int], list[int]]: ...


class GreedyRun:
    """One generation; call ``run``, then read ``ids`` (B, prompt + new) and ``exit_index`` (B, new)."""

    def __init__(self, request: Request, follow: Follow, thresholds: Thresholds, active: int, full: int) -> None:
        """``active`` exits are asked; ``full`` is the exit index of full depth in the trace."""
        self.request, self.follow, self.thresholds = request, follow, thresholds
        self.active, self.full = active, full
        self.batch, self.prompt = request.ids.shape
        self.tokens: list[list[int]] = []  # per step, of the rows
        self.exits: list[list[int]] = []
        self.ended = [False] * self.batch

    def run(self, logits: Tensor, on_token: Callable[[Tensor, Tensor], None] | None) -> None:
        """From the prompt's logits (B, V) to the end of every row."""
        request, device = self.request, logits.device
        horizon = request.max_length - self.prompt
        first = logits.clone()
        first[:, list(request.banned(self.prompt))] = -torch.inf
        chosen = first.argmax(-1)
        self._append(chosen.tolist(), [self.full] * self.batch)
        ids: Tensor | None = chosen
        while True:
            if on_token is not None:
                on_token(*(torch.tensor(part[-1], device=device) for part in (self.tokens, self.exits)))
            if all(self.ended):
                return
            count = len(self.tokens)
            idle = torch.tensor(self.ended, device=device) if any(self.ended) else None
            tokens, exits = self.follow(
                ids, self.thresholds.at(count, horizon), idle, request.banned(self.prompt + count)
            )
            ids = None
            self._append(tokens, [self.full if at == self.active else at for at in exits])

    def _append(self, tokens: list[int], exits: list[int]) -> None:
        pad = int(self.request.pad)
        self.tokens.append([pad if ended else token for token, ended in zip(tokens, self.ended, strict=True)])
        self.exits.append([-1 if ended else at for at, ended in zip(exits, self.ended, strict=True)])
        long = self.prompt + len(self.tokens) >= self.request.max_length
        eos = self.request.eos
        self.ended = [
            ended or long or token in eos for token, ended in zip(tokens, self.ended, strict=True)
        ]

    @property
    def ids(self) -> Tensor:
        new = torch.tensor(self.tokens, device=self.request.ids.device).t()
        return torch.cat((self.request.ids, new), dim=1)

    @property
    def exit_index(self) -> Tensor:
        return torch.tensor(self.exits, device=self.request.ids.device).t()
