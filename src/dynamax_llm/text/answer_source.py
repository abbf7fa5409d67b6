"""Answers as something to train on, alone or mixed with plain text.

    source = AnswerSource(load_answers("answers", model))
    source = MixedSource(source, find_source("corpus/"), share=0.25)   # every fourth batch is text

Both stand where a ``Source`` does in ``training``. What is held out of a mixture are answers: exits are judged by what
they are for.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dynamax_llm.errors import UsageError
from dynamax_llm.text.answer_files import Answers
from dynamax_llm.text.batches import Answered, Batch, Position, Split, Stream
from dynamax_llm.text.sources import Source


@dataclass(frozen=True)
class AnswerSource:
    """A model's answers as documents; their prompts decide which are held out."""

    answers: Answers

    @property
    def spec(self) -> str:
        """What messages and records call it."""
        return f"answers to {self.answers.manifest.prompts['name']}"

    def documents(self, seed: int | None = None) -> Iterator[Answered]:
        """All answers, as they were made or in the order of a seed."""
        order = list(range(len(self.answers)))
        if seed is not None:
            random.Random(seed).shuffle(order)
        for number in order:
            row = self.answers[number]
            yield Answered(row.ids, row.prompt)

    def identity(self) -> dict[str, Any]:
        """What decides which documents these are, as JSON types."""
        return {"data": self.spec, "answers": self.answers.sha256}


@dataclass(frozen=True)
class MixedSource:
    """Answers, and plain text in ``share`` of the batches. Raises UsageError unless 0 < share < 1."""

    answers: AnswerSource
    text: Source
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UsageError(f"mix_share = {self.share!r}: give a share between 0 and 1, both excluded.")

    @property
    def spec(self) -> str:
        """What messages and records call it."""
        return f"{self.answers.spec}, and {self.text.spec} in {self.share:.0%} of the batches"

    def identity(self) -> dict[str, Any]:
        """What decides which documents these are, as JSON types."""
        return {**self.answers.identity(), "mix_text": self.text.identity(), "mix_share": self.share}


#: What a run learns from.
AnySource = Source | AnswerSource | MixedSource


@dataclass(frozen=True)
class MixedSplit:
    """The training batches of a mixture: which come from the text is a function of their number alone."""

    answers: Split
    text: Split
    share: float

    @property
    def sequence(self) -> int:
        """Tokens of a chunk, at most."""
        return self.answers.sequence

    def batches(self, position: Position, epochs: int | None = None) -> Iterator[tuple[Batch, Position]]:
        """As ``Split.batches``; ``epochs`` counts those of the answers."""
        ours, theirs = replace(position, turn=0, other=None), position.other or Position()
        answers, text = self.answers.batches(ours, epochs), self.text.batches(theirs)
        for turn in itertools.count(position.turn):
            from_text = int((turn + 1) * self.share) > int(turn * self.share)
            batch, place = next(text if from_text else answers, (None, ours))
            if batch is None:
                return
            ours, theirs = (ours, place) if from_text else (place, theirs)
            yield batch, replace(ours, turn=turn + 1, other=theirs)


def stream_of(source: AnySource, tokenizer: Any, held_out: bool, *shape: Any) -> Stream:
    """The training or the held-out batches of a source; ``shape`` are the other arguments of a ``Split``."""
    if not isinstance(source, MixedSource):
        return Split(source, tokenizer, held_out, *shape)
    answers = Split(source.answers, tokenizer, held_out, *shape)
    return answers if held_out else MixedSplit(answers, Split(source.text, tokenizer, False, *shape), source.share)
