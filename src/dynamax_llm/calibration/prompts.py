"""Sequences out of documents: one per document, because tokens and passages of one document are not independent.

Which documents are taken, and in what order, is a function of the source and the seed. Texts that occur twice count
once, so that no sequence serves both the path and the proof.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dynamax_llm.errors import DataError
from dynamax_llm.text.sources import Source, json_records

#: Documents that are read before some are drawn; of a larger source, the first so many of its shuffled stream.
READ = 20_000
#: Characters kept of a document per token asked for: far more than any token has on average.
CHARACTERS = 16
#: Tokens that must follow the prompt, where the text's own continuation is what is read.
LEAST_NEW = 8


@dataclass(frozen=True)
class Item:
    """A sequence: token ids of which the first ``prompt`` are the prompt, and reference answers if there are any."""

    ids: tuple[int, ...]
    prompt: int
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """Sequences in random order, ``sha256`` of their texts, and documents ``left_out``: too short, or questions too
    long."""

    items: tuple[Item, ...]
    sha256: str
    left_out: int

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, prompts included."""
        return sum(len(item.ids) for item in self.items)


def draw(source: Source, tokenizer: Any, count: int, prompt: int, new: int, seed: int = 0) -> Drawn:
    """At most ``count`` sequences: the first ``prompt`` + ``new`` tokens of documents that have LEAST_NEW new ones.

    Raises DataError if the source cannot be read or no document is long enough.
    """
    least, most = prompt + min(new, LEAST_NEW), prompt + new

    def cut(text: str) -> Item | None:
        ids = tuple(tokenizer(text, verbose=False)["input_ids"][:most])
        return Item(ids, prompt) if len(ids) >= least else None

    documents = (text[: CHARACTERS * most] for text in source.documents(seed=seed))
    drawn = _collect(((text, text) for text in documents), cut, count, seed)
    if not drawn.items:
        raise DataError(
            f"data {source.spec!r} has no document of at least {least} tokens. Give longer texts, or a shorter prompt: "
            "`prompt_tokens`."
        )
    return drawn


def draw_questions(source: Source, tokenizer: Any, count: int, prompt: int, seed: int = 0) -> Drawn:
    """At most ``count`` questions with reference answers, of at most ``prompt`` tokens: a record's ``prompt`` as it is,
    or its ``question`` as ``Question: …`` and ``Answer:``. Raises DataError for a source that is no .jsonl with one of
    these fields and answers."""
    answers: dict[str, tuple[str, ...]] = {}

    def questions() -> Iterator[tuple[str, str]]:
        for text, references in _questions(source):
            answers.setdefault(text, references)
            yield text, json.dumps([text, references], ensure_ascii=False)

    def cut(text: str) -> Item | None:
        ids = tuple(tokenizer(text, verbose=False)["input_ids"])
        return Item(ids, len(ids), answers[text]) if len(ids) <= prompt else None

    drawn = _collect(questions(), cut, count, seed)
    if not drawn.items:
        raise DataError(f"data {source.spec!r} has no question of at most {prompt} tokens. Raise `prompt_tokens`.")
    return drawn


def _collect(texts: Iterator[tuple[str, str]], cut: Any, count: int, seed: int) -> Drawn:
    """``texts`` are pairs of a text and what is hashed for it."""
    pool = dict(itertools.islice(texts, READ))
    order = list(pool)
    random.Random(seed).shuffle(order)
    items: list[Item] = []
    used, missed = hashlib.sha256(), 0
    for text in order:
        if len(items) == count:
            break
        item = cut(text)
        if item is None:
            missed += 1
            continue
        items.append(item)
        used.update(pool[text].encode("utf-8", "surrogatepass") + b"\0")
    return Drawn(tuple(items), used.hexdigest(), missed)


def _questions(source: Source) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Prompts and their reference answers, in file order."""
    wanted = (
        'A risk is measured against references: give .jsonl files with the fields "question" and "answers", or '
        '"prompt" for the whole prompt instead of "question".'
    )
    if not source.files or any(path.name.endswith(".txt") for path in source.files):
        raise DataError(f"data {source.spec!r} holds no questions with answers. {wanted}")
    for path in source.files:
        for place, record in json_records(path):
            found = record if isinstance(record, Mapping) else {}
            whole, question = found.get("prompt"), found.get("question")
            references = _references(found) if isinstance(whole, str) or isinstance(question, str) else ()
            if not references:
                raise DataError(f"{place}: no question with answers. {wanted}")
            yield whole if isinstance(whole, str) else f"Question: {question}\nAnswer:", references


def _references(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Every reference answer of a record: strings, lists, or the mappings of SQuAD and TriviaQA."""
    found = next((record[name] for name in ("answers", "answer", "best_answer") if record.get(name)), ())
    if isinstance(found, Mapping):
        found = [item for name in ("value", "aliases", "text", "input_text") for item in _listed(found.get(name))]
    return tuple(dict.fromkeys(item for item in _listed(found) if isinstance(item, str) and item.strip()))


def _listed(found: Any) -> list[Any]:
    return [found] if isinstance(found, str) else list(found or ())
