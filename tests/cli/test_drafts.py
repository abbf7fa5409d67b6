"""Drafts on the command line: trained beside blocks, calibrated for this machine, used without further options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynamax_llm import cli
from dynamax_llm.backbones.loading import load
from dynamax_llm.decoding.draft_choice import kept_choices
from dynamax_llm.exits.artifact import Exits
from dynamax_llm.traces import chain_choice
from tests.folders import corpus, exits_folder, model_folder

TRAIN = ("--tokens", "3k", "--seq-length", "64", "--tokens-per-step", "256", "--heldout", "0.2", "--exit-layers", "2,3")
SIZE = ("--head", "mlp", "--vocabulary", "0", "--block", "transformer")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = cli.run([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.run([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_blocks_and_a_draft_then_calibrate_then_generate(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_choice, "CHAINS", 20)
    monkeypatch.setattr(chain_choice, "REPEATS", 1)
    model = model_folder()
    command = ("train", model, "--data", corpus(), "--readout", "block,draft", *SIZE, "--out", tmp_path, *TRAIN)
    printed = run(capsys, *command)
    lines = printed.splitlines()
    assert lines[0].startswith("These exits")
    assert any(line.startswith("Draft: ") for line in lines) and "proposal accepted" in printed
    assert Exits.from_pretrained(tmp_path / "block").config.readout == "block"
    draft = tmp_path / "draft"
    before = kept_choices(Exits.from_pretrained(draft))
    assert [choice.batch_size for choice in before] == [1]
    assert run(capsys, *command) == printed  # finished: the same command changes nothing
    printed = run(capsys, "calibrate", model, "--exits", draft, "--batch-size", 2)
    assert printed.startswith("Draft: ") and "batch size 2" in printed
    assert [choice.batch_size for choice in kept_choices(Exits.from_pretrained(draft))] == [1, 2]

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The cat\nOne two\n", encoding="utf-8")
    printed = run(capsys, "calibrate", model, "--exits", draft, "--data", prompts, "--out", tmp_path / "again")
    again = Exits.from_pretrained(tmp_path / "again")
    assert [choice.batch_size for choice in kept_choices(again)] == [1]  # those of other chains are gone
    assert f"{again.provenance['chains']['windows']} chains" in printed

    lm, tokenizer = load(model)
    inputs = tokenizer("The cat", return_tensors="pt")
    expected = lm.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
    found = json.loads(
        run(capsys, "generate", model, "--exits", draft, "--prompt", "The cat", "--json", "--max-new-tokens", 12)
    )
    assert found["results"][0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert found["tokens"] == len(expected) and found["drafting"] and found["verification"]["rested"] >= 0
    threshold = ("--threshold", "0", "--no-adaptive")
    text = run(capsys, "generate", model, "--exits", draft, "--prompt", "The cat", "--max-new-tokens", 12, *threshold)
    assert "exact output (verify)" in text


def test_wrong_options_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    train = ("train", model_folder(), "--data", corpus(), "--out", tmp_path / "out")
    assert "Did you mean 'draft'" in refused(capsys, *train, "--readout", "block,draf")
    assert "each readout once" in refused(capsys, *train, "--readout", "draft,draft")
    assert "--vocabulary 9: the readout head has no such option" in refused(capsys, *train, "--vocabulary", "9")
    assert not (tmp_path / "out").exists()
    calibrate = ("calibrate", model_folder(), "--exits", exits_folder(), "--out", tmp_path / "out")
    assert "give --promise" in refused(capsys, *calibrate)
    assert "give --data" in refused(capsys, *calibrate, "--promise", "agreement>=0.9")
    assert not (tmp_path / "out").exists()
