"""A setting's tokens after every prefix of a given answer: agreement, the full model's view, reliability.

The answer's tokens are forced, one step at a time, after a prompt that other settings have run already; the twin in
one parallel pass is ``decoding.teacher_forced``, which would run the prompt again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynamax_llm.decoding.decoder import Decoder
from dynamax_llm.engines.eager import EagerEngine
from dynamax_llm.evaluation.harness.prompts import PromptSharing
from dynamax_llm.evaluation.harness.settings import Variant
from dynamax_llm.exits.confidence.base import ConfidenceEstimator
from dynamax_llm.exits.features import ExitFeatures
from dynamax_llm.exits.readouts.base import Readout
from dynamax_llm.exits.state import State


@dataclass(frozen=True)
class Prompted:
    """A batch of left-padded prompts (B, T), their mask, and the answer (new tokens) that each row is forced along."""

    ids: Tensor
    mask: Tensor
    answers: Sequence[Sequence[int]]

    @property
    def steps(self) -> int:
        return max(map(len, self.answers))

    def fed(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens (B,) at a step, 0 after an answer's end, and which rows (B,) are past it."""
        column = [answer[step] if step < len(answer) else 0 for answer in self.answers]
        over = [step + 1 >= len(answer) for answer in self.answers]  # nothing is compared after the last token
        return torch.tensor(column, device=self.ids.device), torch.tensor(over, device=self.ids.device)


@torch.no_grad()
def forced(variant: Variant, early: PromptSharing, batch: Prompted) -> list[list[int]]:
    """Per row, the setting's own token at every place of the answer, given the answer before it."""
    backbone, plan, _ = early.attach(variant.model)
    session = EagerEngine().open(backbone, plan, len(batch.ids))
    decoder, limits = Decoder(session), [early.thresholds.values] * len(batch.ids)
    tokens = [early.prompts.prefill(session, batch.ids, batch.mask).argmax(-1)]
    for step in range(batch.steps - 1):
        fed, over = batch.fed(step)
        if bool(over.all()):
            break
        decoder.step(fed, limits, over)
        tokens.append(session.logits().argmax(-1))
    table = torch.stack(tokens, dim=1).tolist()
    return [row[: len(answer)] for row, answer in zip(table, batch.answers, strict=True)]


def agreement(own: Sequence[int], answer: Sequence[int]) -> float:
    """Share of the answer's tokens that the setting gives too; 1 for an empty answer."""
    return sum(a == b for a, b in zip(own, answer, strict=True)) / len(answer) if len(answer) else 1.0


@torch.no_grad()
def confidences(variant: Variant, early: PromptSharing, batch: Prompted) -> list[list[list[tuple[float, bool]]]]:
    """Per row and exit, for every answer token but the first: the head's confidence, and whether the exit is right.

    No token leaves, so every exit sees every token with exact states. Not for the readout ``tail``, whose
    token is known only once the tail has run.
    """
    backbone, plan, _ = early.attach(variant.model)
    recorder = _Recorder(plan.estimator, plan.readout)
    session = EagerEngine().open(backbone, replace(plan, estimator=recorder), len(batch.ids))
    early.prompts.prefill(session, batch.ids, batch.mask)
    decoder, never = Decoder(session), [(None,) * plan.full] * len(batch.ids)
    rows: list[list[list[tuple[float, bool]]]] = [[[] for _ in plan.layers] for _ in batch.answers]
    for step in range(batch.steps - 1):
        fed, over = batch.fed(step)
        recorder.recorded = []
        decoder.step(fed, never)
        for exit, (confidence, token) in enumerate(recorder.recorded):
            for row, answer in enumerate(batch.answers):
                if not bool(over[row]):
                    right = int(token[row]) == answer[step + 1]
                    rows[row][exit].append((round(float(confidence[row]), 6), right))
    return rows


class _Recorder(ConfidenceEstimator):
    """An estimator that records its confidence (B,) and the exit's token (B,)."""

    def __init__(self, estimator: ConfidenceEstimator, readout: Readout) -> None:
        self.estimator, self.readout = estimator, readout
        self.needs_logits, self.recurrent = estimator.needs_logits, estimator.recurrent
        self.recorded: list[tuple[Tensor, Tensor]] = []

    def confidence(
        self, exit: int, h: Tensor, features: ExitFeatures, state: State | None, padding: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        confidence, after = self.estimator.confidence(exit, h, features, state, padding)
        moved, _ = self.readout.transform(exit, h[:, -1:])
        self.recorded.append((confidence[:, -1], self.readout.logits(exit, moved)[:, 0].argmax(-1)))
        return confidence, after

    def advance(
        self, first: int, h: Tensor, features: ExitFeatures, states: list[State] | None, padding: Tensor | None = None
    ) -> list[State] | None:
        return self.estimator.advance(first, h, features, states, padding)

    def initial_state(self, batch: int, device: torch.device | str = "cpu") -> list[State] | None:
        return self.estimator.initial_state(batch, device)

    def macs(self, exit: int) -> int:
        return self.estimator.macs(exit)
