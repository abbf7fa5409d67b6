"""Prompts as the batches that are timed: chosen from all kinds alike, encoded, padded on the left.

Shapes: B prompts of a batch, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor

from dynamax_llm.backbones import Backbone
from dynamax_llm.errors import DataError, UsageError
from dynamax_llm.evaluation.bench.exits.document import OTHER
from dynamax_llm.text.prompts import Prompt, chat_ids, has_template


@dataclass(frozen=True)
class Item:
    """An encoded prompt: its place in the file, from 1, its token ids, and its kind if any prompt has one."""

    place: int
    ids: tuple[int, ...]
    kind: str | None


@dataclass
class Work:
    """One batch of prompts of the same kind: ids and mask (B, T). ``text`` (B, T + new) is plain generate's."""

    items: tuple[Item, ...]
    ids: Tensor
    mask: Tensor
    text: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    @property
    def kind(self) -> str | None:
        return self.items[0].kind

    @property
    def new(self) -> int:
        """New tokens per prompt, known once plain generate has written."""
        return self.text.shape[1] - self.ids.shape[1]


def encode(
    tokenizer: Any, prompts: Sequence[Prompt], most: int, *, chat: bool = False, system: str | None = None
) -> list[Item]:
    """``most`` prompts, as many of every kind as there are, in the file's order.

    Raises DataError for none or one without tokens, UsageError for a chat template that does not exist.
    """
    if not prompts:
        raise DataError("no prompt to time: give at least one.")
    if chat and not has_template(tokenizer):
        raise UsageError("this tokenizer has no chat template: leave `chat` out, and prompts are taken as they are.")
    kinds: dict[str | None, list[int]] = {}
    for place, prompt in enumerate(prompts):
        kinds.setdefault(prompt.kind, []).append(place)
    in_turn = (place for place in chain.from_iterable(zip_longest(*kinds.values())) if place is not None)
    items = []
    for place in sorted(place for place, _ in zip(in_turn, range(most), strict=False)):
        ids = chat_ids(tokenizer, prompts[place], system, chat)
        if not ids:
            raise DataError(f"prompt {place + 1} has no tokens: leave it out, or give it text.")
        kind = prompts[place].kind or OTHER if any(kinds) else None
        items.append(Item(place + 1, tuple(ids), kind))
    return items


def check_room(items: Sequence[Item], backbone: Backbone, new: int) -> None:
    """Raise UsageError for a prompt that the context has no room for."""
    limit = backbone.max_positions()
    for item in items:
        if limit is not None and len(item.ids) + new > limit:
            raise UsageError(
                f"prompt {item.place} has {len(item.ids)} tokens, and {new} new ones may follow: this backbone has "
                f"{limit} positions. Shorten the prompt, or lower `new`."
            )


def batched(items: Sequence[Item], batch: int, pad: int, device: torch.device) -> list[Work]:
    """Batches of at most ``batch`` prompts of one kind each, in the order in which kinds appear."""
    kinds: dict[str | None, list[Item]] = {}
    for item in items:
        kinds.setdefault(item.kind, []).append(item)
    parts = [alike[at : at + batch] for alike in kinds.values() for at in range(0, len(alike), batch)]
    return [_padded(part, pad, device) for part in parts]


def _padded(items: Sequence[Item], pad: int, device: torch.device) -> Work:
    longest = max(len(item.ids) for item in items)
    ids = [[pad] * (longest - len(item.ids)) + list(item.ids) for item in items]
    mask = [[0] * (longest - len(item.ids)) + [1] * len(item.ids) for item in items]
    return Work(tuple(items), torch.tensor(ids, device=device), torch.tensor(mask, device=device))
