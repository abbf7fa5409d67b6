"""Prompts for a model to answer: read from files, and put through the tokenizer's chat template.

{"prompt": "Who wrote Emma?", "kind": "trivia"}                one record a line of a .jsonl or .jsonl.xz file
{"question": "Who wrote Emma?", "answer": "…"}                 fields that are not named here are left alone
{"messages": [{"role": "user", "content": "Who wrote Emma?"}]} a conversation; what ends it is left to the model
Who wrote Emma?                                                one line of a .txt file
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamax_llm.errors import DataError, UsageError, first_line
from dynamax_llm.text.sources import find_source, json_records, lines

#: Fields that hold a prompt, in order of preference; ``messages`` is a conversation, the others are text.
FIELDS = ("messages", "prompt", "question")
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


@dataclass(frozen=True)
class Message:
    """One message of a conversation; templates know the roles system, user and assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: messages, the last of which is not the model's own, and the kind of prompt if known."""

    messages: tuple[Message, ...]
    kind: str | None = None

    @classmethod
    def of(cls, text: str, kind: str | None = None) -> Prompt:
        """A conversation of one message."""
        return cls((Message(USER, text),), kind)

    @property
    def text(self) -> str:
        """The messages' texts, with a blank line between two: what a model without a chat template continues."""
        return "\n\n".join(message.content for message in self.messages)


def read_prompts(spec: str | Path, most: int | None = None) -> list[Prompt]:
    """The first ``most`` prompts (None: all) of a file, or of all files of a folder in the order of their names.

    Raises DataError, naming file, line and fields, for files without prompts and records without a usable field.
    """
    source = find_source(spec)
    if not source.files:
        raise DataError(f"no file or folder {str(spec)!r}. Prompts are read from .jsonl, .jsonl.xz and .txt files.")
    prompts: list[Prompt] = []
    for path in source.files:
        for prompt in _text_prompts(path) if path.suffix == ".txt" else _json_prompts(path):
            if most is not None and len(prompts) == most:
                return prompts
            prompts.append(prompt)
    if not prompts:
        raise DataError(
            f"data {str(spec)!r} holds no prompt. Give one JSON object a line with {_fields()}, or a .txt file with "
            "one prompt a line."
        )
    return prompts


def chat_ids(tokenizer: Any, prompt: Prompt | str, system: str | None = None, chat: bool = True) -> list[int]:
    """Token ids of a prompt, up to where the answer begins.

    ``system`` is the system message of a conversation that brings none. Without a chat template, or with ``chat`` off,
    the prompt's text is encoded as it is. Raises DataError where the template fails, UsageError for a system message
    that has no place.
    """
    prompt = Prompt.of(prompt) if isinstance(prompt, str) else prompt
    if not (chat and has_template(tokenizer)):
        if system is not None:
            why = "this tokenizer has no chat template" if chat else "`chat` is off"
            raise UsageError(
                f"the system message {system[:40]!r} has no place: {why}. Leave `system` out, or write it into the "
                "prompts."
            )
        return list(tokenizer(prompt.text, verbose=False)["input_ids"])
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    if system is not None and messages[0]["role"] != SYSTEM:
        messages.insert(0, {"role": SYSTEM, "content": system})
    return list(rendered(tokenizer, messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]], **how: Any) -> Any:
    """The tokenizer's ``apply_chat_template``. Raises DataError where the template fails."""
    try:
        return tokenizer.apply_chat_template(list(messages), **how)
    except Exception as error:  # templates raise jinja2's errors, and whatever their expressions do
        raise _refused(messages, error) from error


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def _refused(messages: Sequence[Mapping[str, str]], error: Exception) -> DataError:
    roles = ", ".join(message["role"] for message in messages)
    what = f"the chat template of this tokenizer fails on messages of the roles {roles} ({first_line(error)}). "
    if messages[0]["role"] == SYSTEM:
        what += "It may take no system message: leave it out (`system`), or write it into the prompts. "
    return DataError(what + "The prompts' texts can be used without the template: `chat`.")


def _text_prompts(path: Path) -> Iterator[Prompt]:
    return (Prompt.of(line.strip()) for line in lines(path) if line.strip())


def _json_prompts(path: Path) -> Iterator[Prompt]:
    return (_prompt(record, place) for place, record in json_records(path))


def _prompt(record: Any, place: str) -> Prompt:
    """The prompt of one record. Raises DataError."""
    if not isinstance(record, Mapping):
        raise DataError(f"{place}: the record is a {type(record).__name__}, not a JSON object with {_fields()}.")
    kind = record.get("kind") if isinstance(record.get("kind"), str) else None
    if isinstance(record.get("messages"), list):
        return Prompt(_messages(record["messages"], place), kind)
    for field in FIELDS[1:]:
        text = record.get(field)
        if isinstance(text, str) and text.strip():
            return Prompt((Message(USER, _whole(text, place)),), kind)
    raise DataError(f"{place}: no prompt in {_fields()}. It has {', '.join(map(str, record)) or 'no fields'}.")


def _messages(records: Sequence[Any], place: str) -> tuple[Message, ...]:
    """The messages of a conversation without the assistant's at its end. Raises DataError."""
    found = []
    for number, record in enumerate(records, start=1):
        fields = record if isinstance(record, Mapping) else {}
        role, content = fields.get("role"), fields.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{place}: message {number} has no text in the fields role and content.")
        found.append(Message(role, _whole(content, place)))
    while found and found[-1].role == ASSISTANT:
        found.pop()
    if not any(message.role == USER and message.content.strip() for message in found):
        raise DataError(f'{place}: the messages ask nothing. Give one of the role "user" that is to be answered.')
    return tuple(found)


def _whole(text: str, place: str) -> str:
    """The text, if it can be encoded. Raises DataError for half a character, as JSON can spell it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: the text holds half a character ({text[error.start]!a}, a lone surrogate). Repair or remove "
            "the record."
        ) from error
    return text


def _fields() -> str:
    return f"a field {', '.join(FIELDS[:-1])} or {FIELDS[-1]}"
