"""What a promise limits, as one loss in [0, 1] per sequence, measured under the state policy and readout in use.

    agreement     share of the tokens after the prompt that differ from the full model's given the same prefix; the
                  text is the data's own, decoded with forced tokens
    consistency   1 - ROUGE-L between the greedy text with exits and the full model's
    risk[metric]  how far the score of the text with exits, against reference answers, falls below the full model's:
                  max(0, full - early) per prompt. A gain on one prompt does not pay for a loss on another, so the mean
                  loss is at least the drop of the mean score, and a bound on the one bounds the other

Scores of answers are SQuAD's (Rajpurkar et al. 2016, arXiv 1606.05250): the best over the references, after lower
case, without punctuation, articles and surplus blanks. Answers end at the first line end.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.calibration.prompts import Item
from dynamax_llm.decoding.loop import EarlyExit
from dynamax_llm.errors import PolicyMismatchError
from dynamax_llm.metrics import exact_match, f1, rouge_l
from dynamax_llm.registry import Registry
from dynamax_llm.text.batches import pad
from dynamax_llm.traces.teacher_forced import step_by_step, teacher_forced

#: Policies whose decisions over a given text one parallel pass gives.
PARALLEL = ("propagate", "defer")


@dataclass(frozen=True)
class Measured:
    """Per sequence (n,) float64: its loss, and the mean share of the layers run over its new tokens."""

    losses: Tensor
    depth: Tensor


class Risk(abc.ABC):
    """Losses of ``items`` on one backbone; what the full model does is found once."""

    def __init__(
        self, backbone: Backbone, tokenizer: Any, items: Sequence[Item], batch: int = 16, new: int = 64
    ) -> None:
        """``batch`` sequences at once; ``new`` tokens are generated where text is."""
        self.backbone, self.tokenizer, self.batch, self.new = backbone, tokenizer, batch, new
        self.items = list(items)

    @abc.abstractmethod
    def measure(self, early: EarlyExit) -> Measured:
        """Losses with exits. Raises PolicyMismatchError under ``verify``, where there is nothing to lose."""

    def batches(self) -> Iterator[tuple[int, list[Item]]]:
        """Consecutive items with the index of the first."""
        for start in range(0, len(self.items), self.batch):
            yield start, self.items[start : start + self.batch]


class AgreementRisk(Risk):
    """Tokens that differ, teacher-forced; prompts of one batch share the longest one's length."""

    def measure(self, early: EarlyExit) -> Measured:
        check_policy(early.policy.name)
        parts = [self._batch(early, start, items) for start, items in self.batches()]
        return Measured(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def _batch(self, early: EarlyExit, start: int, items: list[Item]) -> tuple[Tensor, Tensor]:
        batch = pad([list(item.ids) for item in items])
        prompt = max(item.prompt for item in items)
        device = self.backbone.device
        ids, mask = batch.ids.to(device), batch.mask.to(device)[:, prompt:]
        truth = self._full(early, start, ids)
        backbone, plan, costs = early.attach(self.backbone.model)
        simulate_exits = teacher_forced if early.policy.name in PARALLEL else step_by_step
        found = simulate_exits(backbone, plan, ids, early.thresholds.values[: len(plan.layers)], prompt_length=prompt)
        taken = found.exit_index[:, prompt:]
        layers = costs.layers(torch.where(taken == len(plan.layers), len(costs.depths) - 1, taken))
        count = mask.sum(1).clamp(min=1).double()
        wrong = ((found.tokens[:, prompt:] != truth[:, prompt:]) & mask).sum(1)
        return (wrong / count).cpu(), ((layers * mask).sum(1) / count / backbone.n_layers).cpu()

    def _full(self, early: EarlyExit, start: int, ids: Tensor) -> Tensor:
        """The full model's token (B, T) after every position."""
        known: dict[int, Tensor] = self.__dict__.setdefault("_truth", {})
        if start not in known:
            never = EarlyExit(early.exits, threshold="never", measure=early.measure)
            backbone, plan, _ = never.attach(self.backbone.model)
            known[start] = teacher_forced(backbone, plan, ids, ()).tokens
        return known[start]


class TextRisk(Risk):
    """A loss of greedy texts: ``score`` of the text with exits, the full model's, and the item."""

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: Any,
        items: Sequence[Item],
        batch: int = 16,
        new: int = 64,
        *,
        loss: Callable[[str, str, Item], float],
    ) -> None:
        super().__init__(backbone, tokenizer, items, batch, new)
        self.loss = loss
        self._texts: list[str] | None = None

    def measure(self, early: EarlyExit) -> Measured:
        check_policy(early.policy.name)
        full = self.full(early)
        tokens, depth = self.generate(early)
        return Measured(self._losses(self.texts(tokens), full), depth)

    def full(self, early: EarlyExit) -> list[str]:
        """The full model's texts."""
        if self._texts is None:
            never = EarlyExit(early.exits, threshold="never", measure=early.measure)
            self._texts = self.texts(self.generate(never)[0])
        return self._texts

    def of_silence(self, early: EarlyExit) -> float:
        """The mean loss of saying nothing at all; of a risk, the full model's own mean score."""
        full = self.full(early)
        return float(self._losses([""] * len(full), full).mean())

    def _losses(self, texts: Sequence[str], full: Sequence[str]) -> Tensor:
        rows = zip(texts, full, self.items, strict=True)
        return torch.tensor([self.loss(*row) for row in rows], dtype=torch.float64)

    def texts(self, rows: Sequence[list[int]]) -> list[str]:
        """The texts of rows of new tokens."""
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    def generate(self, early: EarlyExit) -> tuple[list[list[int]], Tensor]:
        """Every item's new tokens, greedy, and the mean share of the layers run for them (n,)."""
        rows, depth = [], []
        for _, items in self.batches():
            ids, mask = left_padded([item.ids[: item.prompt] for item in items], self.backbone.device)
            out = self.backbone.model.generate(
                ids, attention_mask=mask, custom_generate=early, max_new_tokens=self.new, do_sample=False
            )
            layers = out.exit_layers.cpu()
            lengths = (layers > 0).sum(1)
            new = out.sequences[:, ids.shape[1] :].tolist()
            rows += [row[:length] for row, length in zip(new, lengths.tolist(), strict=True)]
            depth.append(layers.sum(1).double() / lengths / self.backbone.n_layers)
        return rows, torch.cat(depth)


def check_policy(name: str) -> None:
    """Raise PolicyMismatchError for ``verify``."""
    if name == "verify":
        raise PolicyMismatchError(
            "state policy 'verify': its text is the full model's own at every threshold, so there is nothing to "
            "calibrate and no promise to make. Generate with `policy` verify, or calibrate another policy."
        )


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T) of prompts, padded on the left with 0."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)


def inconsistency(text: str, full: str, item: Item) -> float:
    """1 - ROUGE-L of a text to the full model's."""
    return 1.0 - rouge_l(text, full)


def shortfall(metric: str) -> Callable[[str, str, Item], float]:
    """By how much a text's score falls below the full model's, 0 if it does not. Raises UsageError."""
    score = METRICS.lookup(metric)

    def loss(text: str, full: str, item: Item) -> float:
        return max(0.0, best(score, full, item.answers) - best(score, text, item.answers))

    return loss


def best(score: Callable[[str, str], float], text: str, references: Sequence[str]) -> float:
    """The best score over the references, of the text up to its first line end."""
    answer = text.strip().split("\n")[0]
    return max(score(answer, reference) for reference in references)


#: Metrics of ``risk[…]``.
METRICS: Registry[Callable[[str, str], float]] = Registry("metric of risk", {"f1": f1, "exact_match": exact_match})
