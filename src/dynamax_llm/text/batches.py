"""Documents into batches: shuffled, split, tokenised, cut and padded, at a position that can be saved and resumed.

A document is a text, or a prompt with its answer that are tokens already (``Answered``). Order is a function of the
source, the seed and the epoch alone. Documents pass through a bounded shuffle buffer; a document is held out by the
hash of its text or of its prompt, so the split does not depend on order. *Pools* of whole documents are tokenised and
cut into chunks of at most T tokens, answers to their first T; chunks of similar length share a batch, so little is
padding.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dynamax_llm.errors import DataError
from dynamax_llm.text.sources import Source, documents, find_source

#: Documents in the shuffle buffer.
SHUFFLE = 512
#: Tokens tokenised at once, in batches: more make batches of more even length, fewer resume faster.
POOL_BATCHES = 8
#: Chunks shorter than this have no next token to predict.
SHORTEST = 2


@dataclass(frozen=True)
class Batch:
    """``ids`` (B, T) int64, right-padded; ``mask`` (B, T) True at tokens.

    ``answers`` (B, T) is True at tokens whose next token belongs to an answer; None for plain text.
    """

    ids: Tensor
    mask: Tensor
    answers: Tensor | None = None

    def rows(self, which: slice) -> Batch:
        """Some rows of the batch."""
        return Batch(self.ids[which], self.mask[which], None if self.answers is None else self.answers[which])

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class Position:
    """Where a stream stands: ``batch`` batches into the pool that begins with document ``document`` of an epoch.

    In a mixture this is the place in the answers, ``other`` the place in the text, and ``turn`` the batches of both.
    """

    epoch: int = 0
    document: int = 0
    batch: int = 0
    turn: int = 0
    other: Position | None = None

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Position:
        """The position that ``dataclasses.asdict`` turned into ``fields``."""
        other = fields.get("other")
        return cls(**{**fields, "other": None if other is None else cls.of(other)})


@dataclass(frozen=True)
class Answered:
    """A document that is tokens already: a prompt of ``prompt`` tokens, and its answer."""

    ids: list[int]
    prompt: int

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, most: int) -> Answered:
        """Its first ``most`` tokens."""
        return Answered(self.ids[:most], self.prompt)


class Documents(Protocol):
    """Where documents come from: a ``Source`` of text, or an ``AnswerSource``."""

    @property
    def spec(self) -> str: ...
    def documents(self, seed: int | None = None) -> Iterator[Any]: ...


def is_held_out(document: str | Answered, share: float) -> bool:
    """Whether this document belongs to the held-out split, as about ``share`` of them do: a function of its text, or
    of its prompt's tokens."""
    if isinstance(document, Answered):
        content = np.asarray(document.ids[: document.prompt], dtype="<i4").tobytes()
    else:
        content = document.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") < share * 2**64


class Stream(Protocol):
    """Batches at positions: a ``Split``, or a mixture of two."""

    @property
    def sequence(self) -> int: ...
    def batches(self, position: Position, epochs: int | None = None) -> Iterator[tuple[Batch, Position]]: ...


@dataclass(frozen=True)
class Split:
    """The training or the held-out documents of a source, as batches of at most ``batch_tokens`` cells."""

    source: Documents
    tokenizer: Any
    held_out: bool
    share: float  # of the documents, held out
    sequence: int  # tokens a chunk
    batch_tokens: int
    seed: int = 0
    alone: bool = False  # one document a batch, its first ``sequence`` tokens

    def documents(self, epoch: int) -> Iterator[Any]:
        """This split's documents in the order of ``epoch``."""
        order = random.Random(f"{self.seed}-{epoch}")
        buffer: list[Any] = []
        for document in self.source.documents(seed=order.getrandbits(32)):
            if is_held_out(document, self.share) != self.held_out:
                continue
            buffer.append(document)
            if len(buffer) > SHUFFLE:
                yield buffer.pop(order.randrange(len(buffer)))
        order.shuffle(buffer)
        yield from buffer

    def batches(self, position: Position, epochs: int | None = None) -> Iterator[tuple[Batch, Position]]:
        """Batches from ``position`` on, each with the position after it, for ``epochs`` epochs or without end.

        Raises DataError if the source has no document in this split.
        """
        while epochs is None or position.epoch < epochs:
            served = position != Position(position.epoch)
            stream = self.documents(position.epoch)
            for _ in range(position.document):
                next(stream, None)
            while pool := self._pool(stream):
                count, batches = pool
                for batch in self._shuffled(batches, position)[position.batch :]:
                    served = True
                    position = replace(position, batch=position.batch + 1)
                    yield batch, position
                position = Position(position.epoch, position.document + count)
            if not served:
                raise DataError(self._nothing())
            position = Position(position.epoch + 1)

    def _pool(self, stream: Iterator[Any]) -> tuple[int, list[Batch]] | None:
        """The next documents' number and their batches; None when the stream has ended."""
        count, cells, chunks = 0, 0, []
        for document in stream:
            count += 1
            cut = self._cut(document)
            chunks += [chunk for chunk in cut[: 1 if self.alone else None] if len(chunk) >= SHORTEST]
            cells += sum(map(len, cut))
            if cells >= POOL_BATCHES * self.batch_tokens:
                break
        return (count, self._pack(chunks)) if count else None

    def _cut(self, document: str | Answered) -> list[Any]:
        """A text's chunks of token ids; an answer's beginning, if any of the answer is in it."""
        if isinstance(document, Answered):
            return [document.cut(self.sequence)] if document.prompt < self.sequence else []
        ids = self.tokenizer(document, verbose=False)["input_ids"]
        return [ids[start : start + self.sequence] for start in range(0, len(ids), self.sequence)]

    def _pack(self, chunks: list[Any]) -> list[Batch]:
        """Batches of chunks of similar length, none with more cells than ``batch_tokens``."""
        groups: list[list[Any]] = []
        for chunk in sorted(chunks, key=len):  # rising, so a batch's last chunk is its longest
            if not groups or self.alone or (len(groups[-1]) + 1) * len(chunk) > self.batch_tokens:
                groups.append([])
            groups[-1].append(chunk)
        return [_batch(group) for group in groups]

    def _shuffled(self, batches: list[Batch], position: Position) -> list[Batch]:
        random.Random(f"{self.seed}-{position.epoch}-{position.document}").shuffle(batches)
        return batches

    def _nothing(self) -> str:
        kind, share = ("held-out", "larger") if self.held_out else ("training", "smaller")
        return (
            f"data {self.source.spec!r} has no {kind} document ({self.share:.0%} of its documents are held out). "
            f"Give more text, or a {share} held-out share."
        )


def pad(chunks: list[list[int]]) -> Batch:
    """Chunks of token ids as one right-padded batch. Everything is causal, so pads change no token before them."""
    longest = max(map(len, chunks))
    ids = torch.zeros(len(chunks), longest, dtype=torch.int64)
    for row, chunk in enumerate(chunks):
        ids[row, : len(chunk)] = torch.tensor(chunk)
    lengths = torch.tensor([len(chunk) for chunk in chunks])
    return Batch(ids, torch.arange(longest) < lengths[:, None])


def _batch(chunks: list[Any]) -> Batch:
    """Chunks of text, or of answers, as one batch."""
    if not isinstance(chunks[0], Answered):
        return pad(chunks)
    batch = pad([chunk.ids for chunk in chunks])
    place = torch.arange(batch.ids.shape[1])
    prompts, lengths = (
        torch.tensor(column)[:, None] for column in zip(*((c.prompt, len(c)) for c in chunks), strict=True)
    )
    return Batch(batch.ids, batch.mask, (place >= prompts - 1) & (place < lengths - 1))


def first_batches(split: Stream, tokens: int) -> list[Batch]:
    """Batches of one epoch until they hold at least ``tokens`` tokens, or all there are. Raises DataError if none."""
    kept, total = [], 0
    for batch, _ in split.batches(Position(), epochs=1):
        kept.append(batch)
        total += batch.tokens
        if total >= tokens:
            break
    return kept


__all__ = [
    "Answered",
    "Batch",
    "Position",
    "Source",
    "Split",
    "Stream",
    "documents",
    "find_source",
    "first_batches",
    "is_held_out",
    "pad",
]
