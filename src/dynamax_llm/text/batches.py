"""Documents into batches: shuffled, split, tokenised, cut and padded, at a position that can be saved and resumed.

Order is a function of the source, the seed and the epoch alone. Documents pass through a bounded shuffle buffer; a
document is held out by the hash of its text, so the split does not depend on order. *Pools* of whole documents are
tokenised and cut into chunks of at most T tokens; chunks of similar length share a batch, so little is padding.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

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
    """``ids`` (B, T) int64, right-padded; ``mask`` (B, T) True at tokens."""

    ids: Tensor
    mask: Tensor

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class Position:
    """Where a stream stands: ``batch`` batches into the pool that begins with document ``document`` of an epoch."""

    epoch: int = 0
    document: int = 0
    batch: int = 0


def is_held_out(text: str, share: float) -> bool:
    """Whether this document belongs to the held-out split: a function of its text, about ``share`` of them."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


@dataclass(frozen=True)
class Split:
    """The training or the held-out documents of a source, as batches of at most ``batch_tokens`` cells."""

    source: Source
    tokenizer: Any
    held_out: bool
    share: float  # of the documents, held out
    sequence: int  # tokens a chunk
    batch_tokens: int
    seed: int = 0
    alone: bool = False  # one document a batch, its first ``sequence`` tokens

    def documents(self, epoch: int) -> Iterator[str]:
        """This split's documents in the order of ``epoch``."""
        order = random.Random(f"{self.seed}-{epoch}")
        buffer: list[str] = []
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

    def _pool(self, stream: Iterator[str]) -> tuple[int, list[Batch]] | None:
        """The next documents' number and their batches; None when the stream has ended."""
        count, cells, chunks = 0, 0, []
        for document in stream:
            count += 1
            ids = self.tokenizer(document, verbose=False)["input_ids"]
            cut = [ids[start : start + self.sequence] for start in range(0, len(ids), self.sequence)]
            chunks += [chunk for chunk in cut[: 1 if self.alone else None] if len(chunk) >= SHORTEST]
            cells += len(ids)
            if cells >= POOL_BATCHES * self.batch_tokens:
                break
        return (count, self._pack(chunks)) if count else None

    def _pack(self, chunks: list[list[int]]) -> list[Batch]:
        """Batches of chunks of similar length, none with more cells than ``batch_tokens``."""
        groups: list[list[list[int]]] = []
        for chunk in sorted(chunks, key=len):  # rising, so a batch's last chunk is its longest
            if not groups or self.alone or (len(groups[-1]) + 1) * len(chunk) > self.batch_tokens:
                groups.append([])
            groups[-1].append(chunk)
        return [pad(group) for group in groups]

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


def first_batches(split: Split, tokens: int) -> list[Batch]:
    """Batches of one epoch until they hold at least ``tokens`` tokens, or all there are. Raises DataError if none."""
    kept, total = [], 0
    for batch, _ in split.batches(Position(), epochs=1):
        kept.append(batch)
        total += batch.tokens
        if total >= tokens:
            break
    return kept


__all__ = ["Batch", "Position", "Source", "Split", "documents", "find_source", "first_batches", "is_held_out", "pad"]
