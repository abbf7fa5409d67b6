"""Reading text from anywhere, refusing what is no text, and batches whose order can be resumed."""

from __future__ import annotations

import json
import lzma
import sys
import types
from itertools import islice
from pathlib import Path

import pytest
import torch

from dynamax_llm.errors import DataError
from dynamax_llm.text import batches as data
from dynamax_llm.text.batches import Position, Split, documents, find_source, first_batches, is_held_out, pad
from dynamax_llm.text.sources import TXT_DOCUMENT, render
from tests.training.conftest import sentences, write_jsonl


def split(source, tokenizer, held_out: bool = False, share: float = 0.2, **changes) -> Split:
    return Split(find_source(source), tokenizer, held_out, share, **{"sequence": 64, "batch_tokens": 256, **changes})


def test_jsonl_xz_and_plain_give_the_same_documents(tmp_path: Path) -> None:
    texts = ["one", "zwei ü", "三"]
    plain = write_jsonl(tmp_path / "a.jsonl", texts)
    packed = tmp_path / "b.jsonl.xz"
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    assert list(documents(plain)) == texts == list(documents(packed))


def test_folders_are_read_in_order_and_recursively(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "b.jsonl", ["second"])
    write_jsonl(tmp_path / "a.jsonl", ["first"])
    (tmp_path / "sub" / "c.txt").write_text("third\n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("ignored")
    assert [document.strip() for document in documents(tmp_path)] == ["first", "second", "third"]


def test_txt_paragraphs_are_joined_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    paragraphs = [f"{index} " + "x" * 1500 for index in range(20)]
    path.write_text("\ufeff" + "\n\n".join(paragraphs), encoding="utf-8")
    found = list(documents(path))
    assert len(found) == 4
    assert all(len(document) <= TXT_DOCUMENT for document in found)
    assert "".join(found).split() == " ".join(paragraphs).split()


def test_an_endless_line_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("y" * (2 * TXT_DOCUMENT + 5))
    assert [len(document) for document in documents(path)] == [TXT_DOCUMENT, TXT_DOCUMENT, 5]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"title": "t", "text": "body"}, "body"),
        ({"context": "c", "qas": [{"question": "q", "answers": ["a", "b"]}]}, "c\n\nQ: q\nA: a"),
        ({"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}}, "c\n\nQ: q\nA: a"),
        ({"story": "s", "questions": {"input_text": ["q"]}, "answers": {"input_text": ["a"]}}, "s\n\nQ: q\nA: a"),
        ({"question": "q", "answer": {"value": "a", "aliases": ["b"]}}, "Question: q\nAnswer: a"),
        ({"question": "q", "answer": "a"}, "Question: q\nAnswer: a"),
        ({"question": "q", "best_answer": "a", "correct_answers": ["b"]}, "Question: q\nAnswer: a"),
        ({"question": "q"}, "q"),
    ],
)
def test_the_text_field_is_found(record: dict, text: str) -> None:
    assert render(record, None, "here") == text


def test_the_text_field_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "no", "title": "yes"}) + "\n\n")
    assert list(documents(path, text_field="title")) == ["yes"]
    with pytest.raises(
        DataError, match=r"a\.jsonl, line 1: no text in a field 'body'\. It has text, title\..*`text_field`"
    ):
        list(documents(path, text_field="body"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"x\.jsonl, line 2, column \d+: no valid JSON"),
        (b"[1, 2]\n", r"line 1: the record is a list, not a JSON object"),
        (b'{"length": 3}\n', r"line 1: no text in any of text, content.*It has length\..*`text_field`"),
        (b'{"text": 7}\n', r"line 1: no text in any of"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"x\.jsonl: byte 0xff at offset 24 is not UTF-8.*iconv"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(documents(path))


def test_bad_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file or folder '/nowhere/x\.jsonl'.*\.jsonl, \.jsonl\.xz, \.txt"):
        documents("/nowhere/x.jsonl")
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"a\.csv' is of no known kind.*\.jsonl, \.jsonl\.xz, \.txt"):
        documents(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"has no usable file.*\.jsonl"):
        documents(tmp_path)
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(b'{"text": "a"}\n')[:-9])
    with pytest.raises(DataError, match=r"b\.jsonl\.xz is no intact \.xz file.*Copy it again"):
        list(documents(tmp_path / "b.jsonl.xz"))
    with pytest.raises(DataError, match=r"no file or folder 'a b c'"):
        documents("a b c")


def test_hub_datasets_are_streamed(monkeypatch) -> None:
    asked = []

    def load(name, configuration, split, streaming):
        asked.append((name, configuration, split, streaming))
        return iter([{"text": "one"}, {"text": " "}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    assert list(documents("owner/name:config:validation")) == ["one", "two"]
    assert list(documents("owner/name")) == ["one", "two"]
    assert asked == [("owner/name", "config", "validation", True), ("owner/name", None, "train", True)]


def test_an_unreachable_hub_is_one_clear_error(monkeypatch) -> None:
    def load(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    with pytest.raises(
        DataError, match=r"'owner/name', and no dataset.*\(Name or service not known\).*without a network"
    ):
        list(documents("owner/name"))


def test_files_take_turns_when_shuffled(tmp_path: Path) -> None:
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name}{index}" for index in range(50)])
    source = find_source(tmp_path)
    mixed = list(source.documents(seed=1))
    assert sorted(mixed) == sorted(source.documents())
    assert {text[0] for text in mixed[:20]} == {"a", "b"}
    assert mixed == list(source.documents(seed=1)) != list(source.documents(seed=2))


def test_the_split_is_a_function_of_the_text(corpus: Path, tokenizer) -> None:
    texts = list(documents(corpus))
    held = set(split(corpus, tokenizer, held_out=True).documents(0))
    kept = set(split(corpus, tokenizer).documents(0))
    assert held == {text for text in texts if is_held_out(text, 0.2)}
    assert held.isdisjoint(kept)
    assert held | kept == set(texts)
    assert 0.1 < len(held) / len(texts) < 0.3


def test_batches_hold_every_token_once_an_epoch(corpus: Path, tokenizer) -> None:
    train = split(corpus, tokenizer)
    expected: list[int] = []
    for text in train.documents(0):
        expected += tokenizer(text)["input_ids"]
    batches = [batch for batch, _ in train.batches(Position(), epochs=1)]
    found = torch.cat([batch.ids[batch.mask] for batch in batches])
    lost = len(expected) - len(found)
    assert 0 <= lost <= len(list(train.documents(0)))  # one-token ends of documents
    assert (
        torch.bincount(found, minlength=61).sub(torch.bincount(torch.tensor(expected), minlength=61)).abs().sum()
        == lost
    )
    assert all(batch.ids.numel() <= 256 and batch.ids.shape[1] <= 64 for batch in batches)
    assert sum(batch.tokens for batch in batches) / sum(batch.ids.numel() for batch in batches) > 0.9
    assert all(int(batch.ids[~batch.mask].sum()) == 0 for batch in batches)


def test_epochs_differ_and_repeat_the_same_text(tokenizer, tmp_path: Path) -> None:
    train = split(write_jsonl(tmp_path / "a.jsonl", sentences(30)), tokenizer)
    first, second = (sorted(train.documents(epoch)) for epoch in (0, 1))
    assert first == second
    assert list(train.documents(0)) != list(train.documents(1))
    stream = train.batches(Position())
    assert {position.epoch for _, position in islice(stream, 80)} >= {0, 1}


@pytest.mark.parametrize("after", [1, 7, 23, 60])
def test_a_resumed_stream_goes_on_in_the_same_order(corpus: Path, tokenizer, monkeypatch, after: int) -> None:
    monkeypatch.setattr(data, "SHUFFLE", 16)
    monkeypatch.setattr(data, "POOL_BATCHES", 3)
    train = split(corpus, tokenizer)
    unbroken = list(islice(train.batches(Position()), after + 200))
    assert unbroken[-1][1].epoch >= 1
    resumed = list(islice(split(corpus, tokenizer).batches(unbroken[after - 1][1]), 200))
    for (batch, position), (expected, at) in zip(resumed, unbroken[after:], strict=True):
        assert position == at
        assert torch.equal(batch.ids, expected.ids)
        assert torch.equal(batch.mask, expected.mask)


def test_the_seed_decides_the_order(corpus: Path, tokenizer) -> None:
    orders = [list(split(corpus, tokenizer, seed=seed).documents(0)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_reading_is_streaming(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(data, "SHUFFLE", 8)
    read = []

    class Endless:
        spec = "endless"

        def documents(self, seed: int):
            while True:
                read.append(1)
                yield f"{len(read)} " + "word " * 20

    train = Split(Endless(), tokenizer, False, 0.2, 64, 256)
    batches = list(islice(train.batches(Position()), 20))
    assert len(batches) == 20
    assert len(read) < 200


def test_held_out_batches_are_bounded_and_fixed(corpus: Path, tokenizer) -> None:
    held = split(corpus, tokenizer, held_out=True)
    few, all_of_them = first_batches(held, 300), first_batches(held, 10**9)
    assert 300 <= sum(batch.tokens for batch in few) < 600
    assert len(all_of_them) > len(few)
    assert torch.equal(few[0].ids, all_of_them[0].ids)


def test_empty_splits_are_refused(tmp_path: Path, tokenizer) -> None:
    path = write_jsonl(tmp_path / "one.jsonl", ["just one document"])
    share = 0.01 if not is_held_out("just one document", 0.01) else 0.0001
    with pytest.raises(DataError, match=r"has no held-out document \(.*Give more text, or a larger held-out share"):
        first_batches(split(path, tokenizer, held_out=True, share=share), 10)
    with pytest.raises(DataError, match="has no training document"):
        next(split(path, tokenizer, share=1.0).batches(Position()))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no training document"):
        next(split(tmp_path / "empty.jsonl", tokenizer).batches(Position()))


def test_padding_is_on_the_right() -> None:
    batch = pad([[5], [6, 7, 8]])
    assert batch.ids.tolist() == [[5, 0, 0], [6, 7, 8]]
    assert batch.mask.tolist() == [[True, False, False], [True, True, True]]
    assert batch.tokens == 4
