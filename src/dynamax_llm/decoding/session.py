"""A decoding session: rows that are admitted, advance together, and are released.

    session = EarlyExit(exits).open(model, slots=8)
    slot = session.admit(prompt_ids, RowSettings(max_new_tokens=64))
    while session.live: events = session.step()
    session.release(slot)

One step is one token per live row; under ``verify`` it is one window: exits draft, one pass over the window checks,
the first difference is replaced (``Sampler.accept``) and what followed it is rolled back. ``EarlyExit`` in Hugging
Face's ``generate`` is the same session: all rows begin at once, and steps follow until every row has ended.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamax_llm.decoding.decoder import Decoder
from dynamax_llm.decoding.draft_control import DraftControl
from dynamax_llm.decoding.rows import Event, Row, RowSettings
from dynamax_llm.decoding.sampler import RowSampler, Sampler
from dynamax_llm.decoding.thresholds import Thresholds
from dynamax_llm.decoding.verification import Verification
from dynamax_llm.decoding.window import Window
from dynamax_llm.engines.base import EngineSession
from dynamax_llm.engines.plan import RowThresholds
from dynamax_llm.errors import UsageError
from dynamax_llm.shapes import Ids


class Session:
    """Rows decoded together. Raises UsageError for rows that do not exist or are not free."""

    def __init__(
        self,
        engine: EngineSession,
        thresholds: Thresholds,
        sampler: Sampler | None = None,
        control: DraftControl | None = None,
    ) -> None:
        self.engine, self.decoder, self.thresholds = engine, Decoder(engine), thresholds
        self.control = control  # of drafting, under ``verify``; None: every window drafts
        self.sampler = RowSampler() if sampler is None else sampler
        self.plan, self.slots = engine.plan, engine.slots
        self.rows: list[Row | None] = [None] * self.slots
        self.verification = Verification()
        self._events: list[Event] = []  # made by ``admit``, handed out by the next ``step``
        self.chained = False  # whether the engine holds every live row's newest token
        self.open_window = False
        self._none = (None,) * self.plan.full

    # rows

    @property
    def live(self) -> bool:
        """Whether some row has not ended, or an event waits to be handed out."""
        return bool(self._events) or any(self.is_live(row) for row in self.rows)

    def is_live(self, row: Row | None) -> bool:
        """Whether the row gets more tokens."""
        if row is None:
            return False
        if self.sampler.pads or not row.ended:
            return not row.ended
        # Where ended rows are not padded they go on until the last one has ended.
        ends = [item.ended_at for item in self.rows if item is not None]
        last = max((end for end in ends if end is not None), default=0) if None not in ends else row.max_new_tokens
        return len(row.tokens) < min(last, row.max_new_tokens)

    def fill(self, ids: Ids, padding: Tensor | None, logits: Tensor, max_new_tokens: int) -> list[Event]:
        """All rows begin with prompts (B, T) that the engine has read, with ``logits`` (B, V)."""
        self.rows = [Row(part, self.thresholds, max_new_tokens) for part in ids.split(1)]
        return self._first(range(self.slots), logits)

    @torch.no_grad()
    def admit(self, ids: Ids, settings: RowSettings) -> int:
        """A row begins with the prompt (1, T); returns its slot. Raises UsageError if no slot is free."""
        free = next((slot for slot, row in enumerate(self.rows) if row is None), None)
        if free is None:
            raise UsageError(f"all {self.slots} slots are taken: release one, or open a session with more slots.")
        if ids.dim() != 2 or len(ids) != 1 or not ids.shape[1]:
            raise UsageError(f"a prompt of shape {tuple(ids.shape)}: give token ids (1, T), at least one.")
        if settings.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens {settings.max_new_tokens}: give at least 1.")
        self._settle()
        logits = self.engine.admit(free, ids)
        row = Row(ids, settings.thresholds or self.thresholds, settings.max_new_tokens, settings)
        self.rows[free] = row
        self.chained = False
        spread = logits.new_zeros(self.slots, logits.shape[1])
        spread[free] = logits[0]
        self._events += self._first([free], spread)
        return free

    @torch.no_grad()
    def release(self, slot: int) -> Row:
        """The slot is free from now on; returns the row it held. Raises UsageError if it holds none."""
        row = self.rows[slot] if 0 <= slot < self.slots else None
        if row is None:
            raise UsageError(f"slot {slot} holds no row. Slots in use: {self._in_use()}.")
        self._settle()
        self.engine.release(slot)
        self.rows[slot] = None
        self._events = [event for event in self._events if event.slot != slot]
        self.chained = False
        return row

    def close(self) -> None:
        """Give back what the engine may use again."""
        self.engine.close()

    def _in_use(self) -> str:
        return ", ".join(str(slot) for slot, row in enumerate(self.rows) if row is not None) or "none"

    def _settle(self) -> None:
        """Every layer reads everything that waits, so that rows may enter and leave."""
        if self.open_window:
            self.decoder.keep([self.decoder.drafted] * self.slots)
            self.open_window = False
        self.engine.catch_up()

    # one step

    @torch.no_grad()
    def step(self) -> list[Event]:
        """One token of every live row, or one window under ``verify``."""
        events, self._events = self._events, []
        if not events and self.live:
            events = Window(self).run() if self.plan.policy.exact_output else self._token()
        return events

    def _first(self, slots: Sequence[int], logits: Tensor) -> list[Event]:
        """The first tokens of rows ``slots``, from their prompts' logits (B, V)."""
        rows = self.all_rows()
        fresh = [row if slot in slots else _RESTING for slot, row in enumerate(rows)]
        banned = self.sampler.bans(fresh)
        if banned is not None:
            scores = logits.clone()
            scores[:, list(banned)] = -torch.inf
            tokens = scores.argmax(-1)
        else:
            scores = self.sampler.scores(fresh, [row.ids for row in fresh], logits)
            tokens, _ = self.sampler.choose(fresh, scores)
        choices, events = tokens.tolist(), []
        for slot in slots:
            self.commit(slot, choices[slot], self.plan.full, scores, logits)
        self.end_rows(slots)
        for slot in slots:
            events.append(Event(slot, choices[slot], self.plan.full, rows[slot].ended))
        return events

    def _token(self) -> list[Event]:
        """One token of every live row: what its exit, or the last layer, gives."""
        slots, idle = self.live_slots()
        rows = self.all_rows()
        limits = self.limits(slots)
        banned = self.sampler.bans(rows)
        if banned is not None:
            self.engine.ban(banned)  # before the step: an engine may choose as soon as it has the logits
        self.decoder.step(None if self.chained else self.newest(rows), limits, idle)
        if banned is not None:
            tokens, exits = self._greedy_token(slots, rows, limits, idle, banned)
            scores = logits = None
        else:
            logits, exit_index = self.engine.logits(), self.engine.exits()
            scores = self.sampler.scores(rows, [row.ids for row in rows], logits)
            tokens, exits = self.sampler.choose(rows, scores)[0].tolist(), exit_index.tolist()
            self.decoder.note(exit_index, idle)
            self.chained = False
        # Rows that have ended get no tokens, but scores: Hugging Face keeps those of the whole batch.
        for slot in range(self.slots) if scores is not None and self.sampler.pads else slots:
            self.commit(slot, tokens[slot], exits[slot], scores, logits, only_scores=slot not in slots)
        self.end_rows(slots)
        return [Event(slot, tokens[slot], exits[slot], rows[slot].ended) for slot in slots]

    def _greedy_token(
        self,
        slots: Sequence[int],
        rows: Sequence[Row],
        limits: list[RowThresholds],
        idle: Tensor | None,
        banned: tuple[int, ...],
    ) -> tuple[list[int], list[int]]:
        """The engine chooses; where nothing can change in between, it starts the next token at once."""
        if self._same_next(slots, rows, limits, banned):
            self.decoder.begin_ahead(limits, idle)
        tokens, exits = self.engine.chosen()
        self.decoder.note(exits, idle)
        self.chained = True
        return tokens, exits

    def _same_next(
        self, slots: Sequence[int], rows: Sequence[Row], limits: list[RowThresholds], banned: tuple[int, ...]
    ) -> bool:
        """Whether the next step has the same thresholds, bans and rows, whatever tokens this one gives."""
        if (
            not self.sampler.fixed_rows
            or self.sampler.bans(rows, ahead=1) != banned
            or self.limits(slots, ahead=1) != limits
        ):
            return False
        for slot in slots:
            row = rows[slot]
            if len(row.tokens) + 1 >= row.max_new_tokens or (
                len(slots) > 1 and not self.sampler.eos(row) <= set(banned)
            ):
                return False
        return True

    # parts

    @property
    def device(self) -> torch.device:
        return next(row.prompt.device for row in self.rows if row is not None)

    def all_rows(self) -> list[Row]:
        """Every slot's row; one that has ended where a slot is free."""
        return [_RESTING if row is None else row for row in self.rows]

    def live_slots(self) -> tuple[list[int], Tensor | None]:
        """Slots that go on, and flags (B,) of the others; None if all do."""
        live = [self.is_live(row) for row in self.rows]
        return [slot for slot, goes_on in enumerate(live) if goes_on], self.flags([not goes_on for goes_on in live])

    def flags(self, resting: Sequence[bool]) -> Tensor | None:
        return torch.tensor(resting, device=self.device) if any(resting) else None

    def newest(self, rows: Sequence[Row]) -> Tensor:
        """The tokens (B,) that the next step reads."""
        return torch.tensor([row.tokens[-1] if row.tokens else 0 for row in rows], device=self.device)

    def limits(self, slots: Sequence[int], ahead: int = 0) -> list[RowThresholds]:
        """Every slot's thresholds for the token ``ahead`` tokens later; rows that rest may leave nowhere."""
        limits: list[RowThresholds] = [self._none] * self.slots
        for slot in slots:
            row = self.rows[slot]
            assert row is not None
            limits[slot] = row.limits(ahead)
        return limits

    def commit(
        self,
        slot: int,
        token: int,
        exit_index: int,
        scores: Tensor | None,
        logits: Tensor | None,
        *,
        only_scores: bool = False,
    ) -> None:
        """One more token of one row."""
        row = self.rows[slot]
        assert row is not None
        if not only_scores:
            row.tokens.append(token)
            row.exits.append(exit_index)
        if self.sampler.wants_scores and scores is not None:
            row.scores.append(scores[slot])
        if self.sampler.wants_logits and logits is not None:
            row.logits.append(logits[slot].to(device=self.device, dtype=torch.float32))

    def end_rows(self, slots: Sequence[int]) -> None:
        """Let rows ``slots`` end where their newest token ends them."""
        ends = self.sampler.has_ended(self.all_rows())
        for slot in slots:
            row = self.rows[slot]
            assert row is not None
            if ends[slot] and row.ended_at is None:
                row.ended_at = len(row.tokens)


def _resting() -> Row:
    row = Row(torch.zeros(1, 1, dtype=torch.int64), Thresholds(()), 1)
    row.tokens, row.exits, row.ended_at = [0], [0], 1
    return row


#: Stands for a free slot.
_RESTING = _resting()
