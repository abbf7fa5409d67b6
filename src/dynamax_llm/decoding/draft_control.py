"""Drafting that is switched off where it does not pay, and tried again later, for one session under ``verify``.

After every window the controller adds the tokens it gave (the mean over rows, which share windows) and what it cost, in
full-depth steps; both sums forget. Where their ratio falls below ``LOW`` short chains are tried, and drafting goes on
where they reach ``HIGH``; otherwise it rests for some tokens, twice as many each time, before the next trial. Where it
has lost since the last trial it rests at once. Decisions follow from windows that are over alone, so that the text
stays the full model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dynamax_llm.decoding.draft_choice import ChainCosts

#: Tokens per step below which drafting rests, and from which it goes on after a trial.
LOW, HIGH = 0.97, 1.05
#: What remains of earlier windows' sums after another one.
MEMORY = 0.85
#: Steps and tokens a session begins with, so that one bad window is not the whole evidence.
FIRST_COST, FIRST_TOKENS = 3.0, 3.6
#: Tokens of a rest, at least and at most.
SHORTEST_REST, LONGEST_REST = 16, 256
#: A trial: proposals a window at most, windows at most, and the loss in steps that ends it.
TRIAL_PROPOSALS, TRIAL_WINDOWS, TRIAL_LOSS = 2, 4, 1.0


class WindowCosts(Protocol):
    """The cost of a window in full-depth steps."""

    def cost(self, exits: Sequence[Sequence[int]]) -> float:
        """``exits``: where the rows left, for every step that proposed tokens."""


@dataclass(frozen=True)
class MeasuredCosts:
    """A draft's, as measured."""

    chains: ChainCosts

    def cost(self, exits: Sequence[Sequence[int]]) -> float:
        return self.chains.window(len(exits))


@dataclass(frozen=True)
class CountedCosts:
    """Counted where nothing was measured: of a proposal the share of the full model's weights that are read for it (the
    deepest row's, by exit index, full depth last), of the verification one reading of all, whatever its length."""

    shares: tuple[float, ...]

    def cost(self, exits: Sequence[Sequence[int]]) -> float:
        full = len(self.shares) - 1
        proposals = sum(max((self.shares[at] for at in step if 0 <= at < full), default=0.0) for step in exits)
        return proposals + self.shares[full]


class DraftControl:
    """Whether the next window drafts, and how many tokens at most."""

    def __init__(self, costs: WindowCosts) -> None:
        self.costs = costs
        self.tokens, self.cost = FIRST_TOKENS, FIRST_COST  # of the last windows
        self.gain = 0.0  # tokens minus steps since drafting last went on
        self.tried = False  # whether there has been a trial
        self.trial = 0  # windows left of a trial; 0 while drafting is on, or rests
        self.rest = 0  # tokens left of a rest
        self.next_rest = SHORTEST_REST

    @property
    def most(self) -> int | None:
        """Proposals of the next window at most; None: as many as the plan allows."""
        if self.rest > 0:
            return 0
        return TRIAL_PROPOSALS if self.trial else None

    @property
    def ratio(self) -> float:
        """Tokens per full-depth step over the last windows."""
        return self.tokens / self.cost if self.cost else 1.0

    def note(self, tokens: float, exits: Sequence[Sequence[int]]) -> None:
        """A window is over: ``tokens`` per row on average, by proposals that left at ``exits``."""
        if self.rest > 0:
            self.rest -= 1
            if self.rest == 0:
                self._begin_trial()
            return
        cost = self.costs.cost(exits)
        self.tokens, self.cost = MEMORY * self.tokens + tokens, MEMORY * self.cost + cost
        self.gain += tokens - cost
        if self.trial:
            self._judge_trial()
        elif self.ratio < LOW:
            if self.gain > 0:
                self.next_rest = SHORTEST_REST
            if self.gain > 0 or not self.tried:
                self._begin_trial()
            else:
                self._begin_rest()

    def _judge_trial(self) -> None:
        self.trial -= 1
        if self.cost - self.tokens > TRIAL_LOSS or (self.trial == 0 and self.ratio < HIGH):
            self._begin_rest()
        elif self.trial == 0:
            self.gain = 0.0

    def _begin_trial(self) -> None:
        self.trial, self.tried, self.tokens, self.cost = TRIAL_WINDOWS, True, 0.0, 0.0

    def _begin_rest(self) -> None:
        self.trial, self.rest = 0, self.next_rest
        self.next_rest = min(2 * self.next_rest, LONGEST_REST)
