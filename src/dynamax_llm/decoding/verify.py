"""Lossless generation: exits draft, one pass over the window checks, the first difference is put right.

    draft        every row leaves at an exit and proposes a token, which the next step reads
    check        a token that does not leave, a full window, or the end of every row's draft makes all layers catch up;
                 the pass gives the full model's logits after every token of the window
    accept       greedy: proposals equal to the full model's choice, up to the first that is not; that one is replaced.
                 Sampling: speculative sampling (arXiv 2302.01318): a proposal x drawn from the exit's distribution q is
                 kept with probability min(1, p(x) / q(x)); otherwise the token is drawn from max(p - q, 0), normalised.
                 Either way the text is distributed as the full model's own
    keep         the decoder takes the rest back

Hugging Face's processors and criteria see what they would see in plain ``generate``: each row's own accepted text, one
token at a time, in order. Rows accept different numbers of tokens, so they are called row by row where lengths differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dynamax_llm.decoding.decoder import ExitPlan
from dynamax_llm.decoding.deferred import Checked
from dynamax_llm.decoding.request import Request
from dynamax_llm.decoding.spent import Spent
from dynamax_llm.decoding.thresholds import Thresholds
from dynamax_llm.shapes import Ids, Logits, NextLogits, RowFlags


class Verifier(Protocol):
    """A decoder that can take tokens back, of any engine: ``step`` until it returns a window, then ``keep``."""

    plan: ExitPlan
    n_exits: int

    def prefill(self, ids: Ids) -> NextLogits: ...

    def step(self, ids: Ids, thresholds: Sequence[float | None], idle: RowFlags | None = None) -> Checked: ...

    def check(self) -> Logits: ...

    def keep(self, counts: Tensor) -> None: ...

    def spent(self) -> Spent: ...


@dataclass
class Verification:
    """What became of the proposals, over all rows until their ends."""

    drafted: int = 0  # proposals of exits that the text went on from, or ended with
    accepted: int = 0
    corrected: int = 0  # proposals replaced by the full model's token
    rolled_back: int = 0  # proposals after a replaced one, or after a row's end
    windows: int = 0  # catch-up passes that checked at least one proposal

    @property
    def acceptance_rate(self) -> float:
        """Share of the checked proposals that were accepted; 1 if none was checked."""
        checked = self.accepted + self.corrected
        return self.accepted / checked if checked else 1.0


@dataclass
class Draft:
    """The open window: what the rows proposed after each token they read."""

    tokens: list[Tensor]  # (B,) each
    weights: list[Tensor]  # (B, V) each: the distributions they were drawn from; empty when greedy
    exits: list[Tensor]  # (B,) each: the exits they came from
    proposed: list[int]  # per row, proposals until it rested


class VerifiedRun:
    """One generation under ``verify``; call ``run``, then read the results."""

    def __init__(
        self,
        decoder: Verifier,
        request: Request,
        thresholds: Thresholds,
        on_column: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        """``on_column`` is called with tokens (B,) and exit indices (B,) once every row has its next token."""
        self.decoder, self.request, self.thresholds, self.on_column = decoder, request, thresholds, on_column
        self.batch, self.prompt = request.ids.shape
        self.rows = list(request.ids.unsqueeze(1).unbind(0))  # (1, n) each: accepted text
        self.exit_index: list[list[int]] = [[] for _ in self.rows]
        self.scores: list[list[Tensor]] = [[] for _ in self.rows]
        self.logits: list[list[Tensor]] = [[] for _ in self.rows]
        self.ended = [False] * self.batch
        self.stats = Verification()
        self.columns = 0  # handed to ``on_column``

    def run(self) -> None:
        logits = self.decoder.prefill(self.request.ids)
        none = Draft([], [], [], [0] * self.batch)
        self._estimator(logits.unsqueeze(1), none)
        while not all(self.ended):
            draft, window = self._draft()
            counts = self._estimator(window, draft)
            if not all(self.ended):
                self.decoder.keep(torch.tensor(counts, device=window.device))

    def _draft(self) -> tuple[Draft, Tensor]:
        """Propose until something makes the layers catch up: the draft, and full logits (B, W, V)."""
        draft = Draft([], [], [], [0] * self.batch)
        resting = list(self.ended)
        fed = torch.cat([row[:, -1:] for row in self.rows])
        horizon = self.request.max_length - self.prompt
        while True:
            step_number = min(len(row) for row, ended in zip(self.exit_index, self.ended, strict=True) if not ended)
            thresholds = self.thresholds.at(step_number + len(draft.tokens), horizon)
            idle = torch.tensor(resting, device=fed.device)
            step = self.decoder.step(fed, thresholds, idle)
            draft.exits.append(step.exit_index)
            if step.window is not None:
                return draft, step.window
            tokens, weights = self._propose(draft, step.logits)
            draft.tokens.append(tokens)
            if weights is not None:
                draft.weights.append(weights)
            for row, token in enumerate(tokens.tolist()):
                draft.proposed[row] += not resting[row]
                length = self.rows[row].shape[1] + len(draft.tokens)
                resting[row] = resting[row] or token in self.request.eos or length >= self.request.max_length
            if all(resting):
                return draft, self.decoder.check()
            fed = tokens.unsqueeze(1)

    def _propose(self, draft: Draft, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        scores = self._process(logits, draft.tokens, [row.shape[1] for row in self.rows])
        if not self.request.sample:
            return scores.argmax(-1), None
        weights = torch.softmax(scores, dim=-1)
        return torch.multinomial(weights, num_samples=1).squeeze(1), weights

    def _process(self, logits: Tensor, drafted: list[Tensor], lengths: list[int]) -> Tensor:
        """Processed scores (B, V), read after each row's first ``lengths`` accepted tokens and the ``drafted`` ones."""
        processors = self.request.processors
        logits = logits.to(device=self.request.ids.device, dtype=torch.float32)
        if not len(processors):
            return logits
        texts = [row[:, :length] for row, length in zip(self.rows, lengths, strict=True)]
        if drafted:
            tail = torch.stack(drafted, dim=1)
            texts = [torch.cat((text, tail[[row]]), dim=1) for row, text in enumerate(texts)]
        return self._by_length(texts, lambda ids: processors(ids, logits.clone()))

    def _by_length(self, texts: list[Tensor], call: Callable[[Tensor], Tensor]) -> Tensor:
        """``call`` with the whole batch, once for every length some row has; each row's result from its own length.

        Processors may know the batch size, so no row is left out: longer texts are cut, shorter ones filled.
        """
        own = [text.shape[1] for text in texts]
        if len(set(own)) == 1:
            return call(torch.cat(texts))
        lengths, result = torch.tensor(own, device=texts[0].device), None
        for length in sorted(set(own)):
            fill = self.request.pad.view(1, 1).expand(1, length)
            batch = [torch.cat((text[:, :length], fill[:, text.shape[1] :]), dim=1) for text in texts]
            found = call(torch.cat(batch))
            rows = (lengths == length).view(-1, *[1] * (found.ndim - 1))
            result = found if result is None else torch.where(rows, found, result)
        assert result is not None
        return result

    def _estimator(self, window: Tensor, draft: Draft) -> list[int]:
        """Accept, replace or drop proposals, given the full model's logits (B, W, V): tokens that each row keeps."""
        width, exits = window.shape[1], [part.tolist() for part in draft.exits]
        self.stats.windows += bool(draft.tokens)
        counts, open_rows = [width] * self.batch, [not ended for ended in self.ended]
        accepted = [0] * self.batch
        replaced = [False] * self.batch
        lengths = [row.shape[1] for row in self.rows]
        for place in range(width):
            if not any(open_rows):
                break
            # The rows have grown by what was accepted of this window: the processors' text is already in them.
            scores = self._process(window[:, place], [], [length + place for length in lengths])
            tokens, kept = self._choose(scores, draft, place)
            for row in range(self.batch):
                if not open_rows[row]:
                    continue
                proposal = place < len(draft.tokens)
                leaves = proposal and kept[row]
                at = exits[place][row] if leaves else self.decoder.n_exits
                self._commit(row, tokens[row], at, scores, window[:, place])
                counts[row] = place + 1
                accepted[row] += leaves
                replaced[row] = proposal and not kept[row]
            ends = self._by_length(self.rows, lambda ids: self.request.criteria(ids, None)).tolist()
            for row in range(self.batch):
                if open_rows[row]:
                    self.ended[row] = ends[row]
                    open_rows[row] = not ends[row] and (kept[row] or place >= len(draft.tokens))
        self._count(draft, accepted, replaced)
        self._hand_out()
        most = max((count for count, ended in zip(counts, self.ended, strict=True) if not ended), default=width)
        return [most if ended else count for count, ended in zip(counts, self.ended, strict=True)]

    def _choose(self, scores: Tensor, draft: Draft, place: int) -> tuple[list[Tensor], list[bool]]:
        """The rows' tokens, and whether each is the proposal, if there was one."""
        if not self.request.sample:
            best = scores.argmax(-1)
            if place >= len(draft.tokens):
                return list(best), [True] * self.batch
            return list(best), (best == draft.tokens[place]).tolist()
        p = torch.softmax(scores, dim=-1)
        if place >= len(draft.tokens):
            return list(torch.multinomial(p, num_samples=1).squeeze(1)), [True] * self.batch
        q, proposal = draft.weights[place], draft.tokens[place].unsqueeze(1)
        ratio = (p.gather(1, proposal) / q.gather(1, proposal).clamp(min=torch.finfo(q.dtype).tiny)).squeeze(1)
        kept = torch.rand(self.batch, device=p.device) < ratio
        rest = (p - q).clamp(min=0.0)
        # Where p and q are equal to rounding nothing is left to draw from, and the proposal is hardly ever refused.
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
        drawn = torch.multinomial(rest, num_samples=1).squeeze(1)
        return list(torch.where(kept, proposal.squeeze(1), drawn)), kept.tolist()

    def _commit(self, row: int, token: Tensor, exit_index: int, scores: Tensor, logits: Tensor) -> None:
        """One more accepted token of one row."""
        self.rows[row] = torch.cat((self.rows[row], token.view(1, 1)), dim=1)
        self.exit_index[row].append(exit_index)
        if self.request.wants_scores:
            self.scores[row].append(scores[row])
        if self.request.wants_logits:
            self.logits[row].append(logits[row])

    def _count(self, draft: Draft, accepted: list[int], replaced: list[bool]) -> None:
        self.stats.drafted += sum(draft.proposed)
        self.stats.accepted += sum(accepted)
        self.stats.corrected += sum(replaced)
        self.stats.rolled_back += sum(draft.proposed) - sum(accepted) - sum(replaced)

    def _hand_out(self) -> None:
        """Give ``on_column`` every column that is complete."""
        if self.on_column is None:
            return
        longest = max(map(len, self.exit_index))
        while self.columns < longest:
            column = self.columns
            if any(len(row) <= column and not ended for row, ended in zip(self.exit_index, self.ended, strict=True)):
                return
            self.on_column(self.column_of_tokens(column), self.column_of_exits(column))
            self.columns += 1

    def column_of_tokens(self, column: int) -> Tensor:
        """Tokens (B,) at new position ``column``; the pad token after a row's end."""
        parts = [row[0, self.prompt + column : self.prompt + column + 1] for row in self.rows]
        return torch.cat([part if len(part) else self.request.pad.view(1) for part in parts])

    def column_of_exits(self, column: int) -> Tensor:
        """Exit indices (B,) at new position ``column``; -1 after a row's end."""
        found = [row[column] if column < len(row) else -1 for row in self.exit_index]
        return torch.tensor(found, device=self.request.ids.device)
