"""The chains of real decoding, and the threshold and window that pay most by them.

Chains are recorded under ``verify`` with the threshold 0, so that every chain has its full length. They begin where
windows begin: where the text is hard to draft windows are short and begin often, which positions spread evenly over a
text would not show.

Shapes: N chains, J steps, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynamax_llm.backbones import Backbone
from dynamax_llm.decoding.chain_costs import CHAIN_WINDOW
from dynamax_llm.decoding.draft_choice import ChainCosts, DraftChoice, Setting
from dynamax_llm.decoding.generate import EarlyExit
from dynamax_llm.decoding.rows import RowSettings
from dynamax_llm.decoding.session import Session
from dynamax_llm.errors import ArtifactCorruptError
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.features import ExitFeatures
from dynamax_llm.exits.state import State
from dynamax_llm.progress import Advance, unwatched

#: Chains that are recorded, new tokens of a prompt at most, and prompts decoded at once.
CHAINS, NEW_TOKENS, ROWS = 500, 128, 8


@dataclass(frozen=True)
class ChainTrace:
    """Chains of decoded text: ``confidence`` (N, J) of every proposal, how many were ``accepted`` (N,), and how many
    were ``made`` (N,): fewer than J where a text ended."""

    confidence: Tensor
    accepted: Tensor
    made: Tensor

    def __len__(self) -> int:
        return len(self.accepted)

    @classmethod
    def of(cls, confidences: Sequence[Sequence[float]], accepted: Sequence[int]) -> ChainTrace:
        """From the confidences of every chain's proposals, at least one chain."""
        made = torch.tensor([len(row) for row in confidences])
        padded = [torch.tensor(row, dtype=torch.float64) for row in confidences]
        return cls(nn.utils.rnn.pad_sequence(padded, batch_first=True), torch.tensor(list(accepted)), made)

    @property
    def match(self) -> list[float]:
        """Per step, the share of proposals accepted where all before were."""
        steps = torch.arange(self.confidence.shape[1])
        hits = (self.accepted.unsqueeze(1) > steps).sum(0).double()
        tries = ((self.accepted.unsqueeze(1) >= steps) & (self.made.unsqueeze(1) > steps)).sum(0).double()
        return (hits / tries.clamp(min=1)).tolist()

    def lengths(self, threshold: float, most: int) -> Tensor:
        """Proposals (N,) of a chain that goes on while the product of confidences is at least ``threshold``."""
        goes_on = (self.confidence.cumprod(1) >= threshold)[:, : most - 1].long().cumprod(1)
        return torch.minimum(1 + goes_on.sum(1), self.made)

    def outcome(self, threshold: float, most: int) -> tuple[float, Tensor]:
        """Mean tokens per verification, and the shares (most,) of chains with 1, 2, … ``most`` proposals."""
        lengths = self.lengths(threshold, most)
        tokens = 1.0 + float(torch.minimum(self.accepted, lengths).double().mean())
        return tokens, torch.bincount(lengths - 1, minlength=most).double() / len(lengths)

    def to_json(self) -> dict[str, Any]:
        """Plain types: confidences in thousandths."""
        rows = [
            (row[:made] * 1000).round().int().tolist()
            for row, made in zip(self.confidence, self.made.tolist(), strict=True)
        ]
        return {"confidence": rows, "accepted": self.accepted.tolist()}

    @classmethod
    def from_json(cls, record: Any) -> ChainTrace:
        """The inverse of ``to_json``. Raises ArtifactCorruptError."""
        try:
            rows, accepted = record["confidence"], record["accepted"]
            whole = all(
                len(row) > 0 and 0 <= count <= len(row) and all(0 <= value <= 1000 for value in row)
                for row, count in zip(rows, accepted, strict=True)
            )
            if whole and rows:
                return cls.of([[value / 1000 for value in row] for row in rows], accepted)
        except (KeyError, TypeError, ValueError):
            pass
        raise ArtifactCorruptError(
            "the chains recorded with these exits (provenance chains.trace) cannot be used. Record them again: dynamax "
            "calibrate MODEL --exits DIR --data PROMPTS."
        )


class _Recorder(ConfidenceEstimator):
    """An estimator that keeps what it said of every newest token."""

    def __init__(self, own: ConfidenceEstimator) -> None:
        self.own, self.said = own, list[Tensor]()
        self.needs_logits, self.needs_features, self.on_device = own.needs_logits, own.needs_features, False

    def confidence(
        self, exit: int, h: Tensor, features: ExitFeatures, state: State | None, padding: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        confidence, after = self.own.confidence(exit, h, features, state, padding)
        self.said.append(confidence[:, -1].float().cpu())
        return confidence, after

    def macs(self, exit: int) -> int:
        return self.own.macs(exit)


def record_chains(
    backbone: Backbone,
    exits: Exits,
    prompts: Sequence[Sequence[int]],
    *,
    chains: int = CHAINS,
    window: int = CHAIN_WINDOW,
    new_tokens: int = NEW_TOKENS,
    rows: int = ROWS,
    advance: Advance = unwatched,
) -> ChainTrace | None:
    """Decode prompts of token ids greedily, ``rows`` at once, until ``chains`` are recorded or prompts end.

    Chains are shared evenly between groups of prompts. ``advance`` counts chains. None where there is no chain: texts
    that end with their first token, or prompts that leave no room.
    """
    exits.check_backbone(backbone)
    confidences: list[list[float]] = []
    accepted: list[int] = []
    longest = backbone.max_positions()
    usable = [ids for ids in prompts if ids and (longest is None or len(ids) + 2 <= longest)]
    for start in range(0, len(usable), rows):
        group = usable[start : start + rows]
        most = chains if start + rows >= len(usable) else chains * (start + len(group)) // len(usable)
        recorder = _Recorder(exits.estimator())
        early = EarlyExit(exits, threshold=0.0, policy="verify", window=window, confidence=recorder, adaptive=False)
        session = early.open(backbone.model, len(group))
        try:
            for ids in group:
                new = new_tokens if longest is None else min(new_tokens, longest - len(ids))
                settings = RowSettings(new, eos=_eos(backbone))
                session.admit(torch.tensor([list(ids)], device=backbone.device), settings)
            _record(session, recorder, confidences, accepted, most)
        finally:
            session.close()
        advance(len(accepted), chains)
    return ChainTrace.of(confidences[:chains], accepted[:chains]) if accepted else None


def _record(
    session: Session, recorder: _Recorder, confidences: list[list[float]], accepted: list[int], most: int
) -> None:
    """Decode until all rows have ended or there are ``most`` chains."""
    while session.live and len(accepted) < most:
        recorder.said.clear()
        seen = len(session.verification.rounds)
        session.step()
        for window in session.verification.rounds[seen:]:
            said = torch.stack(recorder.said).tolist()  # (J, B)
            for slot, proposed in enumerate(window.proposed):
                if proposed:
                    confidences.append([step[slot] for step in said[:proposed]])
                    accepted.append(window.accepted[slot])


def _eos(backbone: Backbone) -> frozenset[int]:
    """Ids that end a text, by the model's generation settings."""
    ids = getattr(backbone.model.generation_config, "eos_token_id", None)
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


#: Thresholds from which the best is chosen.
GRID = tuple(index / 40 for index in range(41))


@dataclass(frozen=True)
class ChainChoice:
    """The threshold and window that give most tokens for their cost, and what they give by the trace."""

    threshold: float
    window: int  # proposals at most, and the token before them
    tokens: float  # a verification
    proposals: float  # a verification
    speed_up: float  # over full steps; below 1 the draft does not pay

    def kept(self, where: Setting, costs: ChainCosts) -> DraftChoice:
        """As it is kept with the exits."""
        return DraftChoice(**vars(self), costs=costs, **where._asdict())


def best_threshold(trace: ChainTrace, costs: ChainCosts, most: int | None = None) -> ChainChoice:
    """The expected-gain rule: of thresholds in GRID and of 1 to ``most`` proposals, those with most tokens per cost;
    of equals the longer chains."""
    steps = min(trace.confidence.shape[1], len(costs.passes) - 1)
    steps = steps if most is None else min(most, steps)
    windows = torch.tensor([costs.window(count) for count in range(1, steps + 1)], dtype=torch.float64)
    counts, found = torch.arange(1, steps + 1), []
    for limit in range(steps, 0, -1):
        for threshold in GRID:
            tokens, shares = trace.outcome(threshold, limit)
            speed_up = tokens / float((shares * windows[:limit]).sum())
            found.append(ChainChoice(threshold, limit + 1, tokens, float((shares * counts[:limit]).sum()), speed_up))
    return max(found, key=lambda choice: choice.speed_up)
