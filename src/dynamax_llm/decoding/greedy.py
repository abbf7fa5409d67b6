"""The decode loop where the likeliest token is all that is asked for: an engine may then feed itself.

Same tokens, same ends, same trace as the loop that calls Hugging Face's processors and criteria; the host only looks at
each token to see whether its row has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dynamax_llm.decoding.request import Request
from dynamax_llm.decoding.thresholds import Thresholds
from dynamax_llm.decoding.verify import Draft, VerifiedRun, Verifier


class Follow(Protocol):
    """A greedy step: reads ids (B,), or the tokens it chose last if None; (tokens, exit indices) of the rows.

    ``ahead``: the next step may be begun with the same settings before this one's tokens are known here.
    """

    def __call__(
        self,
        ids: Tensor | None,
        thresholds: Sequence[float | None],
        idle: Tensor | None,
        banned: Sequence[int] = (),
        ahead: bool = False,
    ) -> tuple[list[int], list[int]]: ...


class Drafter(Verifier, Protocol):
    """A Verifier that drafts without its tokens leaving the device."""

    def draft(
        self,
        ids: Tensor | None,
        thresholds: Sequence[float | None],
        idle: Tensor | None,
        banned: Sequence[int] = (),
        ahead: bool = False,
    ) -> tuple[list[int], list[int]] | None:
        """The rows' proposals and exits; None once every layer has seen the window. ``ahead``: see ``Follow``."""

    def check_choices(self) -> None:
        """Let every layer see the window, whose tokens have all left."""

    def window_choices(self) -> list[list[int]]:
        """The full model's token after every token of the window, per row."""


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
            thresholds, banned = self.thresholds.at(count, horizon), request.banned(self.prompt + count)
            later = self.thresholds.at(count + 1, horizon), request.banned(self.prompt + count + 1)
            # A row that ends on its own leaves nothing to begin; one of several would begin as if it had not ended.
            same = later == (thresholds, banned) and self.prompt + count + 1 < request.max_length
            ahead = same and (self.batch == 1 or request.eos <= set(banned))
            tokens, exits = self.follow(ids, thresholds, idle, banned, ahead)
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


class GreedyVerifiedRun(VerifiedRun):
    """A VerifiedRun whose proposals are compared with the full model's tokens as numbers, not by their scores.

    For plain requests in which what is banned does not change before the end.
    """

    decoder: Drafter

    def __init__(self, decoder: Drafter, *arguments: Any) -> None:
        super().__init__(decoder, *arguments)
        self.texts: list[list[int]] = [[] for _ in self.rows]  # accepted new tokens
        self.eos, self.most = self.request.eos, self.request.max_length - self.prompt

    def run(self) -> None:
        logits = self.decoder.prefill(self.request.ids).clone()
        self.banned = self.request.banned(self.prompt)
        logits[:, list(self.banned)] = -torch.inf
        self._accept(logits.argmax(-1).unsqueeze(1).tolist(), Draft([], [], [], [0] * self.batch), [], [])
        while not all(self.ended):
            draft, proposals, exits = self._propose_greedily()
            counts = self._accept(self.decoder.window_choices(), draft, proposals, exits)
            if not all(self.ended):
                self.decoder.keep(counts)

    def _propose_greedily(self) -> tuple[Draft, list[list[int]], list[list[int]]]:
        """Proposals and exits, per step, of the open window, until something makes the layers catch up."""
        draft = Draft([], [], [], [0] * self.batch)
        proposals: list[list[int]] = []
        exits: list[list[int]] = []
        resting, device = list(self.ended), self.request.ids.device
        ids: Tensor | None = torch.tensor([text[-1] for text in self.texts], device=device)
        begun = min(len(text) for text, ended in zip(self.texts, self.ended, strict=True) if not ended)
        while True:
            thresholds = self.thresholds.at(begun + len(proposals), self.most)
            idle = torch.tensor(resting, device=device) if any(resting) else None
            # A proposal that may end its row, or that is the last, has nothing after it to begin.
            longest = max(map(len, self.texts)) + len(proposals) + 2
            later = self.thresholds.at(begun + len(proposals) + 1, self.most)
            ahead = self.eos <= set(self.banned) and later == thresholds and longest <= self.most
            found = self.decoder.draft(ids, thresholds, idle, self.banned, ahead and idle is None)
            if found is None:
                return draft, proposals, exits
            ids = None
            proposals.append(found[0])
            exits.append(found[1])
            for row, token in enumerate(found[0]):
                draft.proposed[row] += not resting[row]
                length = len(self.texts[row]) + len(proposals)
                resting[row] = resting[row] or token in self.eos or length >= self.most
            if all(resting):
                self.decoder.check_choices()
                return draft, proposals, exits

    def _accept(
        self, full: list[list[int]], draft: Draft, proposals: list[list[int]], exits: list[list[int]]
    ) -> list[int]:
        """Accept, replace or drop proposals, given the full model's tokens per row: tokens that each row keeps."""
        width = len(full[0])
        self.stats.windows += bool(proposals)
        counts, accepted, replaced = [width] * self.batch, [0] * self.batch, [False] * self.batch
        for row in range(self.batch):
            for place in range(width):
                if self.ended[row]:
                    break
                token, proposed = full[row][place], place < len(proposals)
                kept = proposed and proposals[place][row] == token
                self.texts[row].append(token)
                self.exit_index[row].append(exits[place][row] if kept else self.decoder.n_exits)
                counts[row] = place + 1
                accepted[row] += kept
                replaced[row] = proposed and not kept
                self.ended[row] = token in self.eos or len(self.texts[row]) >= self.most
                if replaced[row]:
                    break
            new = torch.tensor([self.texts[row]], device=self.request.ids.device)
            self.rows[row] = torch.cat((self.request.ids[[row]], new), dim=1)
        self._count(draft, accepted, replaced)
        self._hand_out()
        most = max((count for count, ended in zip(counts, self.ended, strict=True) if not ended), default=width)
        return [most if ended else count for count, ended in zip(counts, self.ended, strict=True)]
