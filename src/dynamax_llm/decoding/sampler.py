"""How the next token is chosen from logits, and when a row ends.

``RequestSampler`` serves one call of Hugging Face's ``generate``: its processors and criteria receive the whole batch,
as in the stock loop. ``RowSampler`` serves a session with slots: every row has its own. Both say whether the likeliest
token is all that is needed (``bans`` is not None), so that the engine can choose it without logits leaving the device.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dynamax_llm.decoding.request import Request, banned_by, is_greedy
from dynamax_llm.decoding.rows import Row


class Sampler(abc.ABC):
    """Chooses tokens for rows, and ends rows."""

    #: Whether an ended row waits for the others, filled with pads; otherwise it goes on until all have ended.
    pads = True
    #: Whether no row is admitted or released between steps.
    fixed_rows = False
    wants_scores = False
    wants_logits = False

    @abc.abstractmethod
    def eos(self, row: Row) -> frozenset[int]:
        """Ids that end the row."""

    @abc.abstractmethod
    def bans(self, rows: Sequence[Row], ahead: int = 0) -> tuple[int, ...] | None:
        """Tokens that the greedy choice after ``ahead`` more tokens must leave out, the same in all live rows; None
        where the choice needs scores."""

    @abc.abstractmethod
    def scores(self, rows: Sequence[Row], texts: Sequence[Tensor], logits: Tensor) -> Tensor:
        """Processed scores (B, V) from logits (B, V), read after ``texts``, each (1, T)."""

    def accept(
        self, rows: Sequence[Row], scores: Tensor, proposal: Tensor, drawn_from: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B,) given the full model's scores (B, V), and whether each is the proposal (B,).

        Greedy: the proposal is kept where it is the likeliest token. Drawn: speculative sampling (arXiv 2302.01318), a
        proposal x from the distribution q is kept with probability min(1, p(x) / q(x)); otherwise the token is drawn
        from max(p - q, 0), normalised. Either way tokens are distributed as the full model's own.
        """
        p = None if drawn_from is None else self._distribution(rows, scores)
        if drawn_from is None or p is None:
            best = scores.argmax(-1)
            return best, best == proposal
        at = proposal.unsqueeze(1)
        tiny = torch.finfo(drawn_from.dtype).tiny
        ratio = (p.gather(1, at) / drawn_from.gather(1, at).clamp(min=tiny)).squeeze(1)
        kept = self._uniform(rows, p) < ratio
        rest = (p - drawn_from).clamp(min=0.0)
        # Where p and q are equal to rounding nothing is left to draw from, and the proposal is hardly ever refused.
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
        return torch.where(kept, proposal, self._draw(rows, rest)), kept

    def choose(self, rows: Sequence[Row], scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (B,) and, where they are drawn, the distributions (B, V) they were drawn from."""
        weights = self._distribution(rows, scores)
        return (scores.argmax(-1), None) if weights is None else (self._draw(rows, weights), weights)

    @abc.abstractmethod
    def _distribution(self, rows: Sequence[Row], scores: Tensor) -> Tensor | None:
        """What tokens are drawn from (B, V); None if every row takes the likeliest."""

    @abc.abstractmethod
    def _uniform(self, rows: Sequence[Row], like: Tensor) -> Tensor:
        """One uniform number (B,) per row."""

    @abc.abstractmethod
    def _draw(self, rows: Sequence[Row], weights: Tensor) -> Tensor:
        """Tokens (B,) drawn from ``weights`` (B, V)."""

    @abc.abstractmethod
    def has_ended(self, rows: Sequence[Row]) -> list[bool]:
        """Whether each row ends with its newest token."""


class RequestSampler(Sampler):
    """The sampler of one ``generate`` call."""

    fixed_rows = True

    def __init__(self, request: Request) -> None:
        self.request = request
        self.greedy = request.is_plain
        self.pads = request.has_eos
        self.wants_scores, self.wants_logits = request.wants_scores, request.wants_logits

    def eos(self, row: Row) -> frozenset[int]:
        return self.request.eos

    def bans(self, rows: Sequence[Row], ahead: int = 0) -> tuple[int, ...] | None:
        if not self.greedy:
            return None
        lengths = {len(row) + ahead for row in rows if not row.ended}
        bans = {self.request.banned(length) for length in lengths}
        return bans.pop() if len(bans) == 1 else None

    def scores(self, rows: Sequence[Row], texts: Sequence[Tensor], logits: Tensor) -> Tensor:
        processors = self.request.processors
        logits = logits.to(device=self.request.ids.device, dtype=torch.float32)
        if not len(processors):
            return logits
        return self._by_length(rows, texts, lambda ids: processors(ids, logits.clone()))

    def _distribution(self, rows: Sequence[Row], scores: Tensor) -> Tensor | None:
        return torch.softmax(scores, dim=-1) if self.request.sample else None

    def _uniform(self, rows: Sequence[Row], like: Tensor) -> Tensor:
        return torch.rand(len(like), device=like.device)

    def _draw(self, rows: Sequence[Row], weights: Tensor) -> Tensor:
        return torch.multinomial(weights, num_samples=1).squeeze(1)

    def has_ended(self, rows: Sequence[Row]) -> list[bool]:
        request = self.request
        if request.plain_criteria:
            return [len(row) >= request.max_length or row.tokens[-1] in request.eos for row in rows]
        scores = _steps(rows) if self.wants_scores else None
        return self._by_length(rows, [row.ids for row in rows], lambda ids: request.criteria(ids, scores)).tolist()

    def _by_length(self, rows: Sequence[Row], texts: Sequence[Tensor], call: Callable[[Tensor], Tensor]) -> Tensor:
        """``call`` with the whole batch, once for every length a live row has; each row's result from its own length.

        Processors may know the batch size, so no row is left out: longer texts are cut, shorter ones filled with pads.
        """
        lengths = torch.tensor([text.shape[1] for text in texts], device=texts[0].device)
        live = [text.shape[1] for row, text in zip(rows, texts, strict=True) if not row.ended]
        result: Tensor | None = None
        for length in sorted(set(live)) or [int(lengths.max())]:
            fill = self.request.pad.view(1, 1).expand(1, length)
            batch = torch.cat([torch.cat((text[:, :length], fill[:, text.shape[1] :]), dim=1) for text in texts])
            found = call(batch)
            own = (lengths == length).view(-1, *[1] * (found.ndim - 1))
            result = found if result is None else torch.where(own, found, result)
        assert result is not None
        return result


class RowSampler(Sampler):
    """The sampler of a session whose rows each have their own settings."""

    def eos(self, row: Row) -> frozenset[int]:
        return frozenset() if row.settings is None else row.settings.eos

    def bans(self, rows: Sequence[Row], ahead: int = 0) -> tuple[int, ...] | None:
        bans: set[tuple[int, ...]] = set()
        for row in rows:
            if row.ended:
                continue
            assert row.settings is not None
            if row.settings.sample or not is_greedy(row.settings.processors):
                return None
            bans.add(banned_by(row.settings.processors, len(row) + ahead))
        return bans.pop() if len(bans) == 1 else None

    def scores(self, rows: Sequence[Row], texts: Sequence[Tensor], logits: Tensor) -> Tensor:
        scores = logits.float().clone()
        for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
            if not row.ended and row.settings is not None and len(row.settings.processors):
                scores[index] = row.settings.processors(text, scores[[index]])[0]
        return scores

    def _distribution(self, rows: Sequence[Row], scores: Tensor) -> Tensor | None:
        drawn = [row.settings is not None and row.settings.sample and not row.ended for row in rows]
        if not any(drawn):
            return None
        weights = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).float()
        for index, draws in enumerate(drawn):
            if draws:
                weights[index] = torch.softmax(scores[index], dim=-1)
        return weights

    def _uniform(self, rows: Sequence[Row], like: Tensor) -> Tensor:
        return torch.cat([torch.rand(1, generator=row.generator, device=like.device) for row in rows])

    def _draw(self, rows: Sequence[Row], weights: Tensor) -> Tensor:
        drawn = [torch.multinomial(part, 1, generator=row.generator) for row, part in zip(rows, weights, strict=True)]
        return torch.cat(drawn)

    def has_ended(self, rows: Sequence[Row]) -> list[bool]:
        return [row.ended or self._ends(row) for row in rows]

    @staticmethod
    def _ends(row: Row) -> bool:
        settings = row.settings
        if settings is None or len(row.tokens) >= row.max_new_tokens or row.tokens[-1] in settings.eos:
            return True
        return bool(len(settings.criteria)) and bool(settings.criteria(row.ids, None).all())


def _steps(rows: Sequence[Row]) -> tuple[Tensor, ...]:
    """Scores per step (B, V) of rows that have them; zeros after a row's end."""
    return by_step([row.scores for row in rows])


def by_step(parts: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Per step (B, V), from per row and step (V,); zeros after a row's end."""
    empty = torch.zeros_like(next(row[0] for row in parts if row))
    steps = range(max(map(len, parts)))
    return tuple(torch.stack([row[step] if step < len(row) else empty for row in parts]) for step in steps)
