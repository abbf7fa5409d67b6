"""What became of the tokens that exits proposed under ``verify``."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Round:
    """One window: per slot, how many tokens exits proposed, and how many of them were accepted; ``steps`` draft steps,
    which all rows share."""

    proposed: tuple[int, ...]
    accepted: tuple[int, ...]
    steps: int


@dataclass
class Verification:
    """Counts over all rows until their ends."""

    drafted: int = 0  # proposals of exits that the text went on from, or ended with
    accepted: int = 0
    corrected: int = 0  # proposals replaced by the full model's token
    rolled_back: int = 0  # proposals after a replaced one, or after a row's end
    windows: int = 0  # catch-up passes that checked at least one proposal
    rested: int = 0  # steps at full depth because drafting rested
    rounds: list[Round] = field(default_factory=list, repr=False)  # every window with a proposal, in order

    def counts(self) -> dict[str, float]:
        """The counts and the acceptance rate, by name."""
        fields = ("drafted", "accepted", "corrected", "rolled_back", "windows", "rested")
        return {**{name: getattr(self, name) for name in fields}, "acceptance_rate": self.acceptance_rate}

    @property
    def acceptance_rate(self) -> float:
        """Share of the checked proposals that were accepted; 1 if none was checked."""
        checked = self.accepted + self.corrected
        return self.accepted / checked if checked else 1.0


@dataclass
class Draft:
    """The open window: per step, what the rows proposed after the token they read."""

    batch: int
    tokens: list[Tensor] = field(default_factory=list)  # (B,) each
    choices: list[list[int]] = field(default_factory=list)  # the same
    weights: list[Tensor | None] = field(default_factory=list)  # (B, V) each, where proposals were drawn
    exits: list[list[int]] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)  # per row, proposals until it rested

    def __post_init__(self) -> None:
        self.proposed = [0] * self.batch

    def __len__(self) -> int:
        return len(self.exits)
