"""Sequences out of documents: one per document, because tokens and passages of one document are not independent.

Which documents are taken, and in what order, is a function of the source and the seed. Texts that occur twice count
once, so that no sequence serves both the path and the test.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dynamax_llm.errors import DataError
from dynamax_llm.text.prompts import Prompt, read_prompts
from dynamax_llm.text.sources import Source, json_records

#: Token ids of a prompt as a chat.
Encode = Callable[[Prompt], list[int]]

#: Documents that are read before some are drawn; of a larger source, the first this many of its shuffled stream.
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


def draw_chats(source: Source, encode: Encode, count: int, prompt: int, seed: int = 0) -> Drawn:
    """At most ``count`` prompts, encoded as chats, of at most ``prompt`` tokens; see ``text.prompts`` for the records.

    Raises DataError if the source holds no prompts, or none that is short enough.
    """
    asked = {json.dumps([(m.role, m.content) for m in one.messages]): one for one in read_prompts(source.spec)}

    def cut(text: str) -> Item | None:
        ids = tuple(encode(asked[text]))
        return Item(ids, len(ids)) if 0 < len(ids) <= prompt else None

    drawn = _collect(((text, text) for text in asked), cut, count, seed)
    if not drawn.items:
        raise DataError(f"data {source.spec!r} has no prompt of at most {prompt} tokens. Raise `prompt_tokens`.")
    return drawn


def draw_questions(
    source: Source, tokenizer: Any, count: int, prompt: int, seed: int = 0, encode: Encode | None = None
) -> Drawn:
    """At most ``count`` questions with reference answers, of at most ``prompt`` tokens: a record's ``prompt`` as it is,
    or its ``question`` as ``Question: …`` and ``Answer:``; with ``encode``, either of them as it is, encoded as a chat.

    Raises DataError for a source that is no .jsonl with one of these fields and answers.
    """
    answers: dict[str, tuple[str, ...]] = {}

    def questions() -> Iterator[tuple[str, str]]:
        for text, references in _questions(source, "Question: {}\nAnswer:" if encode is None else "{}"):
            answers.setdefault(text, references)
            yield text, json.dumps([text, references], ensure_ascii=False)

    def cut(text: str) -> Item | None:
        ids = tuple(tokenizer(text, verbose=False)["input_ids"] if encode is None else encode(Prompt.of(text)))
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


def _questions(source: Source, form: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Prompts, or questions in a form, and their reference answers, in file order."""
    wanted = (
        'A risk is measured against references: give .jsonl files with the fields "question" and "answers", or '
        '"prompt" for the whole prompt instead of "question".'
    )
    if not source.files or any(path.name.endswith(".txt") for path in source.files):
        raise DataError(f"data {source.spec!r} holds no questions with answers. {wanted}")
    for path in source.files:
        for place, record in json_records(path):
            fields = record if isinstance(record, Mapping) else {}
            prompt, question, references = fields.get("prompt"), fields.get("question"), _references(fields)
            if not references or not (isinstance(prompt, str) or isinstance(question, str)):
                raise DataError(f"{place}: no question with answers. {wanted}")
            yield prompt if isinstance(prompt, str) else form.format(question), references


def _references(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Every reference answer of a record: strings, lists, or the mappings of SQuAD and TriviaQA."""
    answers = next((record[name] for name in ("answers", "answer", "best_answer") if record.get(name)), ())
    if isinstance(answers, Mapping):
        fields = ("value", "aliases", "text", "input_text")
        answers = [item for field in fields for item in _listed(answers.get(field))]
    return tuple(dict.fromkeys(item for item in _listed(answers) if isinstance(item, str) and item.strip()))


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else value if isinstance(value, list) else []
