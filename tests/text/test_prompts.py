"""Prompts from files, and the chat template."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from dynamax_llm.errors import DataError, UsageError
from dynamax_llm.text.prompts import Message, Prompt, chat_ids, read_prompts
from tests.text.tokenizers import CHAT, NO_SYSTEM, byte_tokenizer

RECORDS = [
    {"prompt": "Who?", "kind": "trivia"},
    {"question": "What?", "answer": "That."},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "prompt": "not this"},
    {"prompt": "", "question": "Where?", "kind": 3},
]
PROMPTS = [Prompt.of("Who?", "trivia"), Prompt.of("What?"), Prompt.of("Hi"), Prompt.of("Where?")]


def write(path: Path, records: list) -> Path:
    content = "".join(json.dumps(record) + "\n\n" for record in records).encode()
    path.write_bytes(lzma.compress(content) if path.suffix == ".xz" else content)
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.xz"])
def test_records_with_any_of_the_fields(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, RECORDS)
    assert read_prompts(path) == PROMPTS
    assert read_prompts(str(path), most=2) == PROMPTS[:2]


def test_lines_of_a_text_file_and_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(" one \n\ntwo\n")
    assert read_prompts(tmp_path / "b.txt") == [Prompt.of("one"), Prompt.of("two")]
    write(tmp_path / "a.jsonl", RECORDS[:1])
    assert read_prompts(tmp_path) == [PROMPTS[0], Prompt.of("one"), Prompt.of("two")]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r"p\.jsonl, line 1: no prompt in a field messages, prompt or question. It has text\."),
        ({}, "It has no fields"),
        (["a"], "line 1: the record is a list, not a JSON object with a field messages, prompt or question"),
        ({"prompt": "  "}, "no prompt in"),
        ({"messages": [{"role": "user"}]}, "message 1 has no text in the fields role and content"),
        ({"messages": ["hi"]}, "message 1 has no text"),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]}, "ask nothing"),
        ({"messages": []}, 'ask nothing. Give one of the role "user"'),
        ({"prompt": "cut \ud83d"}, r"line 1: the text holds half a character \('\\ud83d'"),
    ],
)
def test_records_without_a_prompt_are_named(tmp_path: Path, record: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_prompts(write(tmp_path / "p.jsonl", [record]))


def test_places_without_prompts_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"empty\.txt' holds no prompt\. Give one JSON object a line with a field mess"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(DataError, match=r"no file or folder 'owner/name'\. Prompts are read from \.jsonl"):
        read_prompts("owner/name")


def test_the_template_frames_messages_and_asks_for_an_answer() -> None:
    tokenizer = byte_tokenizer()
    text = "<system>be brief<end><user>Hi<end><assistant>"
    assert chat_ids(tokenizer, "Hi", "be brief") == tokenizer(text)["input_ids"]
    assert chat_ids(tokenizer, Prompt.of("Hi")) == tokenizer("<user>Hi<end><assistant>")["input_ids"]
    own = Prompt((Message("system", "own"), Message("user", "Hi")))
    assert chat_ids(tokenizer, own, "be brief") == tokenizer("<system>own<end><user>Hi<end><assistant>")["input_ids"]


def test_without_a_template_the_text_is_encoded_as_it_is() -> None:
    two = Prompt((Message("user", "Hi"), Message("user", "you")))
    plain = byte_tokenizer(None)
    assert chat_ids(plain, two, chat=True) == plain("Hi")["input_ids"] + plain("\n\nyou")["input_ids"]
    assert chat_ids(byte_tokenizer(), "Hi", chat=False) == plain("Hi")["input_ids"]
    with pytest.raises(UsageError, match="'be brief' has no place: this tokenizer has no chat template"):
        chat_ids(plain, "Hi", "be brief")
    with pytest.raises(UsageError, match="has no place: `chat` is off"):
        chat_ids(byte_tokenizer(), "Hi", "be brief", chat=False)


def test_a_template_that_fails_is_named_with_the_way_out() -> None:
    tokenizer = byte_tokenizer(NO_SYSTEM + CHAT)
    assert chat_ids(tokenizer, "Hi") == byte_tokenizer()("<user>Hi<end><assistant>")["input_ids"]
    with pytest.raises(DataError, match=r"roles system, user \(System role not supported\).*`system`.*`chat`"):
        chat_ids(tokenizer, "Hi", "be brief")
    with pytest.raises(DataError, match=r"fails on messages of the roles user \(.*without the template: `chat`"):
        chat_ids(byte_tokenizer("{{ nothing.there.at_all }}"), "Hi")
