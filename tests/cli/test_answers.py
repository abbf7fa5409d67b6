"""``dynamax train --answers own``: from prompts to exits, with the answers beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynamax_llm import cli
from dynamax_llm.backbones.loading import load
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.text.answer_files import load_answers
from tests.folders import chat_folder, corpus, model_folder

TRAIN = ("--tokens", "1k", "--seq-length", 64, "--tokens-per-step", 256, "--heldout", "0.2", "--exit-layers", "2,3")
ANSWERS = ("--answers", "own", "--answer-tokens", 12, "--answer-rows", 16, "--prompt-tokens", 48, "--head", "linear")


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Count to {number}."}) + "\n" for number in range(40)))
    return path


def run(*words: object) -> int:
    return cli.run([str(word) for word in words])


def test_exits_are_trained_on_answers(asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, folder = tmp_path / "out", chat_folder()
    command = ("train", folder, "--data", asked, "--out", out, *ANSWERS, "--system", "Be brief.", *TRAIN)
    assert run(*command) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    assert "40 answers of " in printed.err and f"in {out}/answers" in printed.err and "Saved in" in printed.out
    model, tokenizer = load(folder)
    answers = load_answers(out / "answers", model)
    row = next(row for row in answers if row.index == 7)
    text = tokenizer.decode(row.ids[: row.prompt])
    assert text == "system: Be brief.\nuser: Count to 7.\nassistant: "
    exits = Exits.from_pretrained(out)
    assert exits.provenance["data"] == "answers to prompts.jsonl" and exits.provenance["tokens"] >= 1000
    before = (out / "exits.safetensors").read_bytes()
    assert run(*command) == 0  # finished: the same command changes nothing
    assert (out / "exits.safetensors").read_bytes() == before
    capsys.readouterr()
    assert run(*command, "--answer-temperature", "0.5") == 2
    assert "settings temperature is 0.5 here, and was 0.8" in capsys.readouterr().err


def test_text_is_mixed_in_and_answers_are_used_again(
    asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ("--answers-dir", tmp_path / "kept", "--max-prompts", 30, "--no-chat")
    common = ("train", chat_folder(), "--data", asked, *ANSWERS, *place, *TRAIN)
    assert run(*common, "--out", tmp_path / "a") == 0, capsys.readouterr().err
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    assert not (tmp_path / "a" / "answers").exists() and len(load_answers(tmp_path / "kept")) == 30
    assert run(*common, "--out", tmp_path / "b", "--mix-text", corpus(), "--mix-share", "0.5") == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()} == made
    expected = f"answers to prompts.jsonl, and {corpus()} in 50% of the batches"
    assert Exits.from_pretrained(tmp_path / "b").provenance["data"] == expected


def test_without_a_template_that_is_said(asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("train", model_folder(), "--data", asked, "--out", tmp_path / "o", *ANSWERS, *TRAIN)
    assert run(*command) == 0
    assert "note: this tokenizer has no chat template" in capsys.readouterr().err
    assert run(*command, "--system", "x") == 2
    assert "'x' has no place: this tokenizer has no chat template. Leave --system out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--answers", "theirs"), "--answers 'theirs': give one of own."),
        (("--answers-dir", "x"), "--answers-dir 'x': it goes with answers. Give --answers own, or leave it out."),
        (("--mix-text", "x"), "--mix-text 'x': it goes with answers"),
        (("--system", "x"), "options of answers are given, and no answers asked for: add --answers own."),
        (("--answers", "own", "--mix-share", "0.5"), "--mix-share 0.5: there is no text to mix. Give --mix-text."),
        (("--answers", "own", "--mix-share", "1"), "--mix-share 1.0: give between 0 and 1, both excluded."),
        (("--answers", "own", "--answer-sampled", "2"), "--answer-sampled 2.0: give between 0 and 1."),
        (("--answers", "own", "--mix-text", "/no/file"), "no file or folder '/no/file'"),
        (("--answers", "own"), "corpus.jsonl, line 1: no prompt in a field messages, prompt or question. It has text"),
        (("--answers", "own", "--answer-tokens", "100"), "prompts of 256 tokens and answers of 100 exceed the context"),
    ],
)
def test_options_that_do_not_go_together(
    words: tuple[str, ...], says: str, asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = corpus() if words == ("--answers", "own") else asked
    assert run("train", chat_folder(), "--data", data, "--out", tmp_path / "new" / "out", *words) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
