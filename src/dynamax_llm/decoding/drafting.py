"""How ``EarlyExit`` sets up exits that draft: the choice that is kept with them, and the controller of a session."""

from __future__ import annotations

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.draft_choice import DraftChoice, drafts, kept_choices, nearest, setting
from dynamax_llm.decoding.draft_control import CountedCosts, DraftControl, MeasuredCosts, WindowCosts
from dynamax_llm.decoding.thresholds import NEVER, Threshold
from dynamax_llm.decoding.trace import TokenCosts
from dynamax_llm.decoding.verification import Verification
from dynamax_llm.exits.artifact import Exits

#: Threshold and window of a draft with which no choice is kept.
DRAFT_THRESHOLD, DRAFT_WINDOW = 0.5, 5


class Drafting:
    """The choices kept with exits, and which of threshold and window they decide. Exits that are no draft have none."""

    def __init__(self, exits: Exits, threshold: bool, window: bool) -> None:
        self.drafts = drafts(exits)
        self.threshold, self.window = self.drafts and threshold, self.drafts and window
        self.choices = kept_choices(exits) if self.drafts else []

    def choice(self, backbone: Backbone | None, batch_size: int, engine: str | None) -> DraftChoice | None:
        """The kept choice for this case, or the nearest; without a backbone the first."""
        if backbone is None or not self.choices:
            return self.choices[0] if self.choices else None
        named = engine or next((item.engine for item in self.choices), "eager")
        return nearest(self.choices, setting(backbone.device, backbone.dtype, named, batch_size))

    def chosen_threshold(self, choice: DraftChoice | None) -> Threshold:
        """``choice``'s threshold, "never" where no chain pays."""
        if choice is None:
            return DRAFT_THRESHOLD
        return choice.threshold if choice.pays else NEVER

    def chosen_window(self, choice: DraftChoice | None) -> int:
        return DRAFT_WINDOW if choice is None else choice.window

    def sentence(self, choice: DraftChoice | None, verification: Verification) -> str | None:
        """What decided about drafting, for the output; None for exits that are no draft."""
        if not self.drafts:
            return None
        parts = []
        if self.threshold:
            parts.append("no choice is kept with these exits: dynamax calibrate measures" if choice is None else "")
            parts.append("" if choice is None else choice.sentence() + ("" if choice.pays else ": full depth"))
        if verification.rested:
            parts.append(f"drafting rested for {verification.rested} steps")
        return "; ".join(part for part in parts if part) or None


def control(choice: DraftChoice | None, costs: TokenCosts) -> DraftControl:
    """A session's controller: by measured costs where there are any, else by counted ones."""
    known: WindowCosts
    if choice is not None:
        known = MeasuredCosts(choice.costs)
    else:
        known = CountedCosts(tuple(cost / costs.full for cost in costs.by_exit))
    return DraftControl(known)
