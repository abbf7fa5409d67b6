"""What a promise limits, as one loss in [0, 1] per sequence, measured under the state policy and readout in use.

    agreement     share of the tokens after the prompt that differ from the full model's given the same prefix; the
                  text is the data's own, or in a chat the full model's answer, decoded with forced tokens
    consistency   1 - ROUGE-L between the greedy text with exits and the full model's
    risk[metric]  how far the score of the text with exits, against reference answers, falls below the full model's:
                  max(0, full - early) per prompt. A gain on one prompt does not make up for a loss on another, so the
                  mean loss is at least the drop of the mean score, and a bound on the one bounds the other

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
from dynamax_llm.decoding.generate import EarlyExit
from dynamax_llm.errors import PolicyMismatchError
from dynamax_llm.metrics import exact_match, f1, rouge_l
from dynamax_llm.registry import Registry
from dynamax_llm.text.batches import pad
from dynamax_llm.traces.teacher_forced import PARALLEL, force_text, teacher_forced

#: A loss in [0, 1] of the text with exits, given the full model's text and the item.
TextLoss = Callable[[str, str, Item], float]


@dataclass(frozen=True)
class Measured:
    """Per sequence (n,) float64: its loss, and the mean share of the layers run over its new tokens."""

    losses: Tensor
    depth: Tensor


class Risk(abc.ABC):
    """Losses of ``items`` on one backbone; the full model's output is computed once."""

    def __init__(
        self, backbone: Backbone, tokenizer: Any, items: Sequence[Item], batch: int = 16, new: int = 64
    ) -> None:
        """``batch`` sequences at once; ``new`` tokens are generated where text is."""
        self.backbone, self.tokenizer, self.batch, self.new = backbone, tokenizer, batch, new
        self.items = list(items)

    @abc.abstractmethod
    def measure(self, early: EarlyExit) -> Measured:
        """Losses with exits. Raises PolicyMismatchError under ``verify``, where every loss is 0."""

    def batches(self) -> Iterator[list[Item]]:
        """Consecutive items."""
        for start in range(0, len(self.items), self.batch):
            yield self.items[start : start + self.batch]


class AgreementRisk(Risk):
    """Tokens that differ, teacher-forced."""

    _full_tokens: list[Tensor] | None = None  # of every batch (B, T): the full model's token after every position

    def measure(self, early: EarlyExit) -> Measured:
        check_policy(early.policy.name)
        groups = list(self.groups(early.policy.name in PARALLEL))
        batches = [(pad([list(item.ids) for item in items]), [item.prompt for item in items]) for items in groups]
        device = self.backbone.device
        if self._full_tokens is None:
            full = EarlyExit(early.exits, threshold="never", measure=early.measure)
            backbone, plan, _ = full.attach(self.backbone.model)
            self._full_tokens = [teacher_forced(backbone, plan, b.ids.to(device), ()).tokens for b, _ in batches]
        backbone, plan, costs = early.attach(self.backbone.model)
        thresholds = early.thresholds.values[: len(plan.layers)]
        losses, depth = [], []
        for (batch, prompts), full_tokens in zip(batches, self._full_tokens, strict=True):
            first = torch.tensor(prompts, device=device)[:, None]
            mask = batch.mask.to(device) & (torch.arange(batch.ids.shape[1], device=device) >= first)
            length = prompts[0] if len(set(prompts)) == 1 else first.squeeze(1)
            forced = force_text(backbone, plan, batch.ids.to(device), thresholds, prompt_length=length)
            exit_index = forced.exit_index
            layers = costs.layers(torch.where(exit_index == len(plan.layers), len(costs.depths) - 1, exit_index))
            count = mask.sum(1).clamp(min=1).double()
            wrong = ((forced.tokens != full_tokens) & mask).sum(1)
            losses.append((wrong / count).cpu())
            depth.append(((layers * mask).sum(1) / count / backbone.n_layers).cpu())
        return Measured(torch.cat(losses), torch.cat(depth))

    def groups(self, parallel: bool) -> Iterator[list[Item]]:
        """Consecutive items; prompts of different length share a batch only where one pass decodes the text."""
        for items in self.batches():
            if parallel or len({item.prompt for item in items}) == 1:
                yield items
            else:
                yield from ([item] for item in items)


class TextRisk(Risk):
    """A ``loss`` of greedy texts."""

    _full_texts: list[str] | None = None

    def __init__(self, *arguments: Any, loss: TextLoss, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.loss = loss

    def measure(self, early: EarlyExit) -> Measured:
        check_policy(early.policy.name)
        full = self.full(early)
        tokens, depth = self.generate(early)
        return Measured(self._losses(self.texts(tokens), full), depth)

    def full(self, early: EarlyExit) -> list[str]:
        """The full model's texts."""
        if self._full_texts is None:
            full = EarlyExit(early.exits, threshold="never", measure=early.measure)
            self._full_texts = self.texts(self.generate(full)[0])
        return self._full_texts

    def empty_answer_loss(self, early: EarlyExit) -> float:
        """The mean loss of empty texts; of a risk, the full model's own mean score."""
        full = self.full(early)
        return float(self._losses([""] * len(full), full).mean())

    def answered(self, full: EarlyExit) -> list[Item]:
        """The items with the greedy answers of ``full`` behind their prompts, without the answers' last token: what is
        read after a token is the next one."""
        rows, _ = self.generate(full)
        pairs = zip(self.items, rows, strict=True)
        return [Item((*item.ids[: item.prompt], *row[:-1]), item.prompt, item.answers) for item, row in pairs]

    def _losses(self, texts: Sequence[str], full: Sequence[str]) -> Tensor:
        rows = zip(texts, full, self.items, strict=True)
        return torch.tensor([self.loss(*row) for row in rows], dtype=torch.float64)

    def texts(self, rows: Sequence[list[int]]) -> list[str]:
        """The texts of rows of new tokens."""
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    def generate(self, early: EarlyExit) -> tuple[list[list[int]], Tensor]:
        """Every item's new tokens, greedy, and the mean share of the layers run for them (n,)."""
        rows, depth = [], []
        for items in self.batches():
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
    batch = pad([list(reversed(row)) for row in rows])
    return batch.ids.flip(1).to(device), batch.mask.flip(1).long().to(device)


def inconsistency(text: str, full: str, item: Item) -> float:
    """1 - ROUGE-L of a text to the full model's."""
    return 1.0 - rouge_l(text, full)


def shortfall(metric: str) -> TextLoss:
    """How far a text's score falls below the full model's, 0 if it does not. Raises UsageError."""
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
