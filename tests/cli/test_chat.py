"""``--chat``: prompts through the chat template in generate, calibrate and eval."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dynamax_llm import cli
from dynamax_llm.backbones import adapt
from dynamax_llm.backbones.loading import load
from dynamax_llm.calibration.calibrate import calibrate
from dynamax_llm.calibration.prompts import Item, draw_chats, draw_questions
from dynamax_llm.calibration.risks import AgreementRisk, TextRisk, inconsistency
from dynamax_llm.calibration.settings import CalibrationSettings
from dynamax_llm.decoding import EarlyExit
from dynamax_llm.errors import DataError, UsageError
from dynamax_llm.evaluation.harness.tasks import Chat, load_tasks
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.text.prompts import Prompt, chat_ids
from dynamax_llm.text.sources import find_source
from dynamax_llm.traces.teacher_forced import teacher_forced
from tests.evaluation.conftest import ROWS
from tests.folders import chat_folder, exits_folder, model_folder


def run(*words: object) -> int:
    return cli.run([str(word) for word in words])


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"question": f"Count to {10 ** (number % 7)}{number}.", "answers": ["one"]} for number in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_generate_frames_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    folder = chat_folder()
    model, tokenizer = load(folder)
    options = ("--exits", exits_folder(), "--threshold", "never", "--max-new-tokens", 20, "--json")
    chats = ("--chat", "--system", "Be brief.", "--prompt", "Hi", "--prompt", "Hello there")
    assert run("generate", folder, *options, *chats) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    for prompt, result in zip(("Hi", "Hello there"), found["results"], strict=True):
        ids = tokenizer(f"system: Be brief.\nuser: {prompt}\nassistant: ", return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert result["prompt"] == prompt and result["text"] == tokenizer.decode(new, skip_special_tokens=True)
    assert run("generate", folder, *options, "--prompt", "Hi", "--system", "x") == 2
    assert "--system 'x': only a chat has a system message. Give --chat too." in capsys.readouterr().err
    assert run("generate", model_folder(), *options, "--prompt", "Hi", "--chat") == 0
    assert "note: this tokenizer has no chat template" in capsys.readouterr().err


def test_chats_and_questions_are_drawn_encoded(asked: Path) -> None:
    _, tokenizer = load(chat_folder())
    source = find_source(asked)

    def encode(prompt: Prompt) -> list[int]:
        return chat_ids(tokenizer, prompt, "S")

    drawn = draw_chats(source, encode, 20, 44)
    assert len(drawn.items) == 20 and drawn.left_out > 0
    for item in drawn.items:
        text = tokenizer.decode(item.ids)
        assert text.startswith("system: S\nuser: Count to 1") and text.endswith(".\nassistant: ")
        assert item.prompt == len(item.ids) <= 44
    questions = draw_questions(source, tokenizer, 60, 60, encode=encode)
    assert len(questions.items) == 60 and questions.items[0].answers == ("one",)
    assert {item.ids for item in drawn.items} < {item.ids for item in questions.items}
    plain = draw_questions(source, tokenizer, 60, 60)
    assert tokenizer.decode(plain.items[0].ids).startswith("Question: Count")
    with pytest.raises(DataError, match=r"has no prompt of at most 3 tokens\. Raise `prompt_tokens`"):
        draw_chats(source, encode, 20, 3)


@pytest.mark.parametrize("policy", ["propagate", "copy"])
def test_agreement_counts_what_follows_each_prompt(policy: str) -> None:
    model, tokenizer = load(chat_folder())
    backbone, exits = adapt(model), Exits.from_pretrained(exits_folder())
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in ("user: a", "user: abcdefghijk", "user: abc")]
    items = [Item(ids, len(ids)) for ids in prompts]
    text = TextRisk(backbone, tokenizer, items, batch=3, new=12, loss=inconsistency)
    answered = text.answered(EarlyExit(exits, threshold="never"))
    for item in answered:
        ids = torch.tensor([item.ids[: item.prompt]])
        whole = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()
        assert list(item.ids) == whole[:-1]
    early = EarlyExit(exits, threshold=0.0, policy=policy)
    together = AgreementRisk(backbone, tokenizer, answered, batch=3).measure(early)
    alone = AgreementRisk(backbone, tokenizer, answered, batch=1).measure(early)
    assert torch.equal(together.losses, alone.losses) and torch.equal(together.depth, alone.depth)
    assert together.losses.max() > 0
    if policy == "propagate":  # by hand
        _, plan, _ = early.attach(model)
        for item, loss in zip(answered, together.losses.tolist(), strict=True):
            ids = torch.tensor([item.ids])
            never, always = (None, None), (0.0, 0.0)
            full, forced = (
                teacher_forced(backbone, plan, ids, thresholds, prompt_length=item.prompt)
                for thresholds in (never, always)
            )
            wrong = (full.tokens != forced.tokens)[0, item.prompt :]
            assert loss == pytest.approx(float(wrong.double().mean()) if len(wrong) else 0.0)


@pytest.mark.parametrize("promise", ["agreement>=0.1", "consistency>=0.05"])
def test_calibrate_takes_chats(promise: str, asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--prompts", 60, "--prompt-tokens", 60, "--max-new-tokens", 8, "--chat", "--system", "S")
    command = ("calibrate", chat_folder(), "--exits", exits_folder(), "--data", asked, "--promise", promise)
    assert run(*command, "--out", tmp_path / "o", *options) == 0, capsys.readouterr().err
    (kept,) = Exits.from_pretrained(tmp_path / "o").promises
    assert kept.data["chat"] is True and kept.data["system"] == "S" and kept.n + kept.n_path == 60


def test_calibration_settings_go_together(asked: Path) -> None:
    with pytest.raises(UsageError, match="calibration setting system = 'S': only a chat has a system message"):
        CalibrationSettings(system="S")
    model, tokenizer = load(model_folder())
    exits = Exits.from_pretrained(exits_folder())
    settings = CalibrationSettings(prompts=60, prompt_tokens=60, new_tokens=8, chat=True, system="S")
    with pytest.raises(UsageError, match="'S' has no place: this tokenizer has no chat template"):
        calibrate(adapt(model), tokenizer, exits, find_source(asked), "agreement>=0.1", settings=settings)


def test_eval_frames_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, tokenizer = load(chat_folder())
    how = {"data_dir": ROWS, "limit": 2, "max_new_tokens": 4}
    (plain,), (task,) = load_tasks(["triviaqa"], **how), load_tasks(["triviaqa"], chat=Chat(tokenizer, "S"), **how)
    for doc, bare in zip(task.docs, plain.docs, strict=True):
        assert doc.prompt.startswith("system: S\nuser: ") and doc.prompt.endswith("\nassistant: ")
        assert doc.prompt.count("user: ") == 3  # two worked examples
        question = bare.prompt.split("Question:")[-1].split("?")[0]
        assert question in doc.prompt.split("user: ")[-1]
    assert task.identity["asked"] != plain.identity["asked"]
    options = ("--tasks", "triviaqa", "--data-dir", ROWS, "--limit", 1, "--shots", 0, "--max-new-tokens", 2)
    command = (
        "eval",
        chat_folder(),
        "--exits",
        exits_folder(),
        "--out",
        tmp_path / "o",
        "--timed",
        0,
        "--no-baselines",
    )
    assert run(*command, *options, "--chat", "--json") == 0, capsys.readouterr().err
    shown = json.loads(capsys.readouterr().out)["examples"][0]["prompt"]
    assert shown.startswith("user: ") and shown.endswith("assistant: ")
    assert run("eval", model_folder(), *command[2:], *options, "--chat") == 2
    assert "has no chat template: leave out --chat." in capsys.readouterr().err
