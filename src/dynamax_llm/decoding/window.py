"""One window of a session under ``verify``: exits draft, one pass checks, rows accept, the rest is rolled back.

    draft        every row leaves at an exit and proposes a token, which the next step reads
    check        a token that does not leave, a full window, or the end of every row's draft makes all layers catch up;
                 the pass gives the full model's logits after every token of the window
    accept       ``Sampler.accept``: proposals up to the first that the full model does not give; that one is replaced
    keep         the engine rolls the rest back

Hugging Face's processors and criteria see what they would see in plain ``generate``: each row's own accepted text, one
token at a time, in order. The length of a draft depends on the past alone; where the session has a ``DraftControl``,
that says how long it may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynamax_llm.decoding.rows import Event, Row
from dynamax_llm.decoding.verification import Draft, Round
from dynamax_llm.engines.plan import RowThresholds

if TYPE_CHECKING:
    from dynamax_llm.decoding.session import Session


class Window:
    """Drafts and checks for the rows of one session."""

    def __init__(self, session: Session) -> None:
        self.session, self.engine, self.decoder = session, session.engine, session.decoder
        self.sampler, self.plan, self.control = session.sampler, session.plan, session.control
        #: Proposals at most.
        self.most = self.plan.window if self.control is None or self.control.most is None else self.control.most

    def run(self) -> list[Event]:
        """One window: the tokens that rows accepted."""
        slots, _ = self.session.live_slots()
        return self._accept(slots, self._draft(slots))

    def _draft(self, slots: Sequence[int]) -> Draft:
        """Propose tokens until something makes every layer read the window."""
        rows, draft = self.session.all_rows(), Draft(self.session.slots)
        resting = [slot not in slots for slot in range(self.session.slots)]
        ids: Tensor | None = self.session.newest(rows)
        banned = self.sampler.bans(rows)
        if banned is not None:
            self.engine.ban(banned)
        while True:
            drafting = [slot for slot in slots if not resting[slot]]
            idle = self.session.flags(resting)
            limits = self.session.limits(drafting if len(draft) < self.most else (), ahead=len(draft))
            deep = self.decoder.step(ids, limits, idle)
            if deep:
                draft.exits.append([self.plan.full] * self.session.slots)
                live = self.session.slots if idle is None else self.session.slots - sum(resting)
                self.decoder.note(self.engine.exits(), idle, readouts=live * (self.decoder.drafted - 1))
                return draft
            ids = self._propose(rows, draft, idle, limits, banned)
            for slot in drafting:
                draft.proposed[slot] += 1
                row, token = rows[slot], draft.choices[-1][slot]
                long = len(row.tokens) + len(draft.choices) >= row.max_new_tokens
                resting[slot] = long or token in self.sampler.eos(row)
            if all(resting):
                live = self.session.slots if idle is None else self.session.slots - int(idle.sum())
                self.decoder.check()
                self.decoder.note_readouts(live * self.decoder.drafted)
                return draft

    def _propose(
        self,
        rows: Sequence[Row],
        draft: Draft,
        idle: Tensor | None,
        limits: list[RowThresholds],
        banned: tuple[int, ...] | None,
    ) -> Tensor | None:
        """One proposal per row; returns what the next step reads, None for what the engine holds."""
        if banned is not None and self.sampler.bans(rows, ahead=len(draft)) == banned:
            if self._ahead_in_draft(rows, draft, idle, limits, banned):
                self.decoder.begin_ahead(limits, idle)
            tokens, exits = self.engine.chosen()
            draft.choices.append(tokens)
            draft.exits.append(exits)
            draft.weights.append(None)
            self.decoder.note(exits, idle)
            return None
        texts = [torch.cat((row.ids, self._drafted(draft, slot)), dim=1) for slot, row in enumerate(rows)]
        exit_index = self.engine.exits()
        scores = self.sampler.scores(rows, texts, self.engine.logits())
        proposal, weights = self.sampler.choose(rows, scores)
        draft.choices.append(proposal.tolist())
        draft.exits.append(exit_index.tolist())
        draft.weights.append(weights)
        self.decoder.note(exit_index, idle)
        return proposal

    def _ahead_in_draft(
        self,
        rows: Sequence[Row],
        draft: Draft,
        idle: Tensor | None,
        limits: list[RowThresholds],
        banned: tuple[int, ...],
    ) -> bool:
        """Whether the engine may start the next draft step: it does not fill the window, and no row rests before it."""
        filled = self.decoder.drafted + 1 >= self.plan.window or len(draft) + 1 >= self.most
        if idle is not None or not self.sampler.fixed_rows or filled:
            return False
        longest = max(len(row.tokens) for row in rows) + len(draft.choices) + 2
        return (
            all(self.sampler.eos(row) <= set(banned) and longest <= row.max_new_tokens for row in rows)
            and self.session.limits(range(self.session.slots), ahead=len(draft) + 1) == limits
        )

    def _drafted(self, draft: Draft, slot: int) -> Tensor:
        return torch.tensor([[step[slot] for step in draft.choices]], dtype=torch.int64, device=self.session.device)

    def _accept(self, slots: Sequence[int], draft: Draft) -> list[Event]:
        """Accept, replace or drop the proposals; every row keeps what it accepted, and the window is closed."""
        rows, width = self.session.all_rows(), len(draft)
        width = self.decoder.drafted
        greedy = self.sampler.bans(rows) is not None and self.sampler.bans(rows, ahead=width) == self.sampler.bans(rows)
        full = self.engine.window_chosen() if greedy else None
        window = None if greedy else self.engine.window_logits()
        counts, accepted, replaced = [width] * self.session.slots, [0] * self.session.slots, [0] * self.session.slots
        lengths, open_rows, events = [len(row) for row in rows], set(slots), []
        for place in range(width):
            if not open_rows:
                break
            proposed = place < len(draft.choices)
            scores: Tensor | None = None
            logits: Tensor | None = None
            if full is not None:
                tokens = [choices[place] for choices in full]
                kept = [proposed and token == draft.choices[place][slot] for slot, token in enumerate(tokens)]
            else:
                assert window is not None
                logits = window[:, place]
                tokens, kept, scores = self._checked(rows, draft, place, logits, lengths)
            for slot in sorted(open_rows):
                leaves = proposed and kept[slot]
                self.session.commit(
                    slot, tokens[slot], draft.exits[place][slot] if leaves else self.plan.full, scores, logits
                )
                counts[slot] = place + 1
                accepted[slot] += leaves
                replaced[slot] += proposed and not kept[slot]
            self.session.end_rows(sorted(open_rows))
            for slot in sorted(open_rows):
                events.append(Event(slot, tokens[slot], rows[slot].exits[-1], rows[slot].ended))
                if not self.session.is_live(rows[slot]) or (proposed and not kept[slot]):
                    open_rows.discard(slot)
        self._count(slots, draft, accepted, replaced, lengths)
        self._close_window(counts, width)
        return events

    def _checked(
        self, rows: Sequence[Row], draft: Draft, place: int, logits: Tensor, lengths: Sequence[int]
    ) -> tuple[list[int], list[bool], Tensor]:
        """The full model's tokens at ``place`` of the window, whether each is the proposal, and the scores."""
        # Rows have grown by what was accepted of this window, so the processors' text is already in them.
        texts = [row.ids[:, : length + place] for row, length in zip(rows, lengths, strict=True)]
        scores = self.sampler.scores(rows, texts, logits)
        if place >= len(draft.choices):
            return self.sampler.choose(rows, scores)[0].tolist(), [True] * self.session.slots, scores
        proposal = torch.tensor(draft.choices[place], device=scores.device)
        tokens, kept = self.sampler.accept(rows, scores, proposal, draft.weights[place])
        return tokens.tolist(), kept.tolist(), scores

    def _close_window(self, counts: list[int], width: int) -> None:
        """Rows that have ended keep as much as the longest live row."""
        live = [self.session.is_live(row) for row in self.session.rows]
        most = max((count for count, goes_on in zip(counts, live, strict=True) if goes_on), default=width)
        self.session.chained = False
        self.session.open_window = not any(live)
        if any(live):
            self.decoder.keep([count if goes_on else most for count, goes_on in zip(counts, live, strict=True)])

    def _count(
        self, slots: Sequence[int], draft: Draft, accepted: list[int], replaced: list[int], lengths: list[int]
    ) -> None:
        """Note what became of the proposals; ``lengths``: of the rows' texts before the window."""
        stats, steps = self.session.verification, len(draft.choices)
        if steps:
            stats.windows += 1
            stats.rounds.append(Round(tuple(draft.proposed), tuple(accepted), steps))
        stats.drafted += sum(draft.proposed)
        stats.accepted += sum(accepted)
        stats.corrected += sum(replaced)
        stats.rolled_back += sum(draft.proposed) - sum(accepted) - sum(replaced)
        if self.control is not None:
            stats.rested += self.control.most == 0
            rows = self.session.all_rows()
            grown = sum(len(rows[slot]) - lengths[slot] for slot in slots) / len(slots)
            self.control.note(grown, draft.exits[:steps])
