"""The model's own answers: what they are, that a kill changes nothing, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dynamax_llm.errors import (
    ArtifactCorruptError,
    ArtifactMismatchError,
    ArtifactVersionError,
    DataError,
    UsageError,
)
from dynamax_llm.testing import tiny_model
from dynamax_llm.text import answers as module
from dynamax_llm.text.answer_files import MANIFEST, load_answers
from dynamax_llm.text.answers import Answers, make_answers
from dynamax_llm.text.prompts import Prompt, chat_ids
from dynamax_llm.text.settings import AnswerSettings
from tests.text.conftest import few, prompts
from tests.text.tokenizers import byte_tokenizer


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BATCHES", 2)
    monkeypatch.setattr(module, "GROUP", 10)


def make(model: Any, folder: Path, count: int = 24, tokenizer: Any = None, **changes: Any) -> Answers:
    tokenizer = tokenizer or byte_tokenizer()
    return make_answers(model, tokenizer, prompts(count), few(**changes), folder, name="p.jsonl", quiet=True)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_greedy_answers_are_those_of_generate_alone(model, tokenizer, tmp_path: Path) -> None:
    answers = make(model, tmp_path / "a", sampled=0.0)
    assert sorted(row.index for row in answers) == list(range(24))
    lengths = set()
    for row in answers:
        ids = chat_ids(tokenizer, prompts(24)[row.index])
        assert row.ids[: row.prompt] == ids
        alone = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, pad_token_id=0)[0].tolist()
        assert row.ids == alone
        lengths.add(len(row.ids) - row.prompt)
    assert len(lengths) > 3 and max(lengths) == 12


def test_answers_end_with_the_token_that_ends_them(model, tmp_path: Path) -> None:
    answers = make(model, tmp_path / "a")
    ends = set(model.generation_config.eos_token_id)
    ended = 0
    for row in answers:
        new = row.ids[row.prompt :]
        assert not ends & set(new[:-1]) and (len(new) == 12 or new[-1] in ends)
        ended += new[-1] in ends
    assert 0 < ended == sum(part.ended for part in answers.manifest.parts)
    tokens = sum(len(row.ids) - row.prompt for row in answers)
    assert answers.summary().startswith(f"24 answers of {tokens} tokens ({len(answers.ids)} with their prompts), ")


def test_a_share_is_sampled_and_the_seed_decides_how(model, tmp_path: Path) -> None:
    def rows(name: str, **changes: Any) -> dict[int, list[int]]:
        return {row.index: row.ids for row in make(model, tmp_path / name, **changes)}

    greedy, half, other = rows("g", sampled=0.0), rows("h", sampled=0.5), rows("o", sampled=0.5, seed=1)
    chosen = {index for index in greedy if module._fraction("sampled", _prompt(index)) < 0.5}
    assert 8 <= len(chosen) <= 16
    for sampled in (half, other):
        changed = {index for index in greedy if greedy[index] != sampled[index]}
        assert changed <= chosen and len(changed) >= len(chosen) - 3  # a sample may be the likeliest answer
    assert sum(half[index] != other[index] for index in chosen) >= len(chosen) - 3
    every = rows("s", sampled=1.0)
    assert sum(greedy[index] != every[index] for index in greedy) >= 20


def _prompt(index: int) -> list[int]:
    return chat_ids(byte_tokenizer(), prompts(24)[index])


def test_random_numbers_elsewhere_are_untouched(model, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    make(model, tmp_path / "a", sampled=1.0)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("calls", [0, 1, 4, 5])
def test_a_kill_at_any_moment_changes_nothing(
    model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    whole = make(model, tmp_path / "whole")
    assert len(whole.manifest.parts) >= 4
    write, left = module.write_atomically, [calls]

    def killed(path: Path, content: bytes) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(path, content)

    import dynamax_llm.text.answer_files as parts

    with monkeypatch.context() as patch:
        for place in (module, parts):  # parts and manifests take turns, so both kinds of kill are met
            patch.setattr(place, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            make(model, tmp_path / "cut")
    assert len(list((tmp_path / "cut").iterdir())) == min(calls, calls // 2 + 1 + calls % 2)
    if calls > 1:
        with pytest.raises(DataError, match=rf"holds {calls // 2} of {len(whole.manifest.parts)} parts.*command that"):
            load_answers(tmp_path / "cut")
    resumed = make(model, tmp_path / "cut")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert resumed.sha256 == whole.sha256


def test_finished_answers_are_only_read(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(model, tmp_path / "a")
    monkeypatch.setattr(model, "generate", None)
    again = make(model, tmp_path / "a")
    assert torch.equal(first.ids, again.ids) and first.sha256 == again.sha256
    loaded = load_answers(tmp_path / "a", model)
    assert list(loaded) == list(first) and len(loaded) == 24


def test_other_processes_wait_for_the_one_that_writes(model, tokenizer, tmp_path: Path, monkeypatch) -> None:
    waited = []

    def work(seconds: float) -> None:
        waited.append(seconds)
        make(model, tmp_path / "a", count=len(waited) * 12)  # at first, other answers than those waited for

    monkeypatch.setattr(module.time, "sleep", work)
    asked, how = prompts(24), {"name": "p.jsonl", "quiet": True, "writes": False}
    with pytest.raises(DataError, match="other answers: prompts count is 24 here, and was 12"):
        make_answers(model, tokenizer, asked, few(), tmp_path / "a", **how)
    shutil.rmtree(tmp_path / "a")
    found = make_answers(model, tokenizer, asked, few(), tmp_path / "a", **how)
    assert waited == [module.PAUSE] * 2 and len(found) == 24


def test_long_prompts_are_left_out_and_repeated_ones_answered_once(model, tokenizer, tmp_path: Path) -> None:
    asked = [*prompts(6), Prompt.of("x" * 40), prompts(1)[0]]
    made = make_answers(model, tokenizer, asked, few(prompt_tokens=30), tmp_path / "a", quiet=True)
    assert sorted(row.index for row in made) == list(range(6))
    assert made.manifest.prompts["left_out"] == 1
    assert made.summary().endswith("; 1 prompts left out as too long")
    first = make_answers(model, tokenizer, asked, few(max_prompts=2), tmp_path / "b", quiet=True)
    assert sorted(row.index for row in first) == [0, 1]
    with pytest.raises(DataError, match=r"none of the 8 prompts has between 1 and 3 tokens. Raise `prompt_tokens`"):
        make_answers(model, tokenizer, asked, few(prompt_tokens=3), tmp_path / "c", quiet=True)


def test_other_answers_are_refused(model, tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    make(model, folder)
    before = files(folder)
    with pytest.raises(ArtifactMismatchError, match="answers of another model: the architecture is the same, the wei"):
        make(tiny_model("llama", layers=2, vocab=100, seed=1), folder)
    with pytest.raises(ArtifactMismatchError, match="answers of another model: the number of layers is 3, not 2"):
        load_answers(folder, tiny_model("llama", layers=3, vocab=100))
    with pytest.raises(DataError, match=r"other answers: settings temperature is 0\.5 here, and was 0\.8\. Repeat"):
        make(model, folder, temperature=0.5)
    with pytest.raises(DataError, match="other answers: prompts count is 23 here, and was 24"):
        make(model, folder, count=23)
    with pytest.raises(DataError, match="other answers: prompts sha256 is"):
        make(model, folder, tokenizer=byte_tokenizer(None))
    model.generation_config.repetition_penalty = 1.5
    with pytest.raises(DataError, match=r"other answers: generation repetition_penalty is 1\.5 here, and was"):
        make(model, folder)
    assert files(folder) == before


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_damage_is_named(model, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    make(model, folder)
    part = folder / "answers-00001.safetensors"
    content = part.read_bytes()
    tensors = safetensors.torch.load(content)
    tensors["ids"][0] += 1
    for damaged in (content[:-4], b"", safetensors.torch.save(tensors)):
        part.write_bytes(damaged)
        with pytest.raises(
            ArtifactCorruptError, match=rf"00001\.safetensors has changed since.*\({len(damaged)} bytes"
        ):
            load_answers(folder)
        with pytest.raises(ArtifactCorruptError, match=r"has changed.*Delete .* to make the answers anew"):
            make(model, folder)
    part.unlink()
    with pytest.raises(ArtifactCorruptError, match=r"00001\.safetensors cannot be read \(No such file"):
        load_answers(folder)
    for changes, message in (
        ({"parts": [{}]}, r"no manifest of answers \(parts\.0\.file: "),
        ({"format": "x"}, "parts"),
    ):
        _edit(folder, **changes)
        with pytest.raises(ArtifactCorruptError, match=message):
            load_answers(folder)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(ArtifactCorruptError, match=r"answers\.json is no manifest of answers\. Delete"):
        load_answers(folder)
    (folder / MANIFEST).write_text(json.dumps({"format": "dynamax-answers", "version": 2}))
    with pytest.raises(ArtifactVersionError, match="written by a newer DYNAMAX"):
        load_answers(folder)
    with pytest.raises(DataError, match=r"holds no answers: answers\.json is not there"):
        load_answers(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"sampled": 1.1}, {"temperature": 0}, {"rows": 0}, {"max_new_tokens": 0}, {"max_prompts": 0}]
)
def test_settings_out_of_bounds_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"answer setting {next(iter(changes))} = .*give "):
        AnswerSettings(**changes)


def test_a_context_too_short_is_refused(model, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"prompts of 256 tokens and answers of 400 exceed the context of this model, 512"
    ):
        make(model, tmp_path / "a", max_new_tokens=400)
    assert not (tmp_path / "a").exists()


def test_memory_that_does_not_suffice_is_named(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(model, "generate", exhausted)
    with pytest.raises(UsageError, match=r"3 rows of up to \d+ tokens do not fit into the memory of cpu: lower `rows`"):
        make(model, tmp_path / "a")


def test_recurrent_models_answer_too(tokenizer, tmp_path: Path) -> None:
    mamba = tiny_model("mamba2", layers=2, vocab=100)
    answers = make_answers(mamba, tokenizer, prompts(6), few(sampled=0.0), tmp_path / "a", quiet=True)
    for row in answers:
        ids = torch.tensor([row.ids[: row.prompt]])
        alone = mamba.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)[0].tolist()
        assert row.ids == alone[: len(row.ids)]
