"""``dynamax tune`` on the command line: a run, its table, and one clear error for each wrong input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dynamax_llm import cli
from tests.folders import corpus, model_folder


def tune(*options: object, out: object, model: object = None, data: object = None) -> list[str]:
    """A run that takes a moment; later options override earlier ones."""
    short = [
        "--tokens",
        "600",
        "--seq-length",
        48,
        "--tokens-per-step",
        192,
        "--exit-layers",
        "1/5,3",
        "--eval-tokens",
        100,
    ]
    command = [
        "tune",
        model or model_folder(),
        "--data",
        data or corpus(),
        "--out",
        out,
        *short,
        "--lr",
        0.01,
        *options,
    ]
    return [str(word) for word in (*command, *options)]


def test_a_run_shows_what_changed_and_the_result_goes_on(tmp_path: Path, capsys) -> None:
    out = tmp_path / "tuned"
    assert cli.run(tune("--exit-schedule", "rotating", "--distill", 0.5, "--checkpointing", out=out)) == 0
    printed = capsys.readouterr().out
    record = json.loads((out / "tuning.json").read_text())
    before, after = record["before"], record["after"]
    assert f"{before['loss']:.4f}" in printed and f"{after['loss']:.4f}" in printed
    assert f"changed by {after['loss'] - before['loss']:+.4f} nats" in printed
    assert "1*" in printed and "3*" in printed and f"dynamax train {out}" in printed
    assert record["layers"] == [1, 3] and record["settings"]["schedule"] == "rotating"
    assert cli.run(tune("--method", "full", "--exit-layers", "all", out=tmp_path / "again", model=out)) == 0
    assert json.loads((tmp_path / "again" / "tuning.json").read_text())["layers"] == [1, 2, 3, 4]


WRONG = {
    "method": (("--method", "qlora"), "--method 'qlora'", "lora, full"),
    "rank": (("--rank", 0), "--rank 0", "at least 1"),
    "schedule": (("--exit-schedule", "every"), "--exit-schedule 'every'", "weighted, rotating"),
    "distillation": (("--distill", 1.5), "--distill 1.5", "between 0 and 1"),
    "teacher": (("--teacher", "other"), "--teacher 'other'", "original, current"),
    "exits": (("--exit-layers", "2,5"), "'5'", "after layers 1 to 4"),
    "tokens": (("--tokens", "none"), "'none'", "300k, 1M"),
    "batch": (("--tokens-per-step", 32), "--tokens-per-step 32", "one chunk of 48"),
    "rate": (("--lr", 0), "--lr 0.0", "above 0"),
    "everything held out": (("--heldout", 1), "--heldout 1.0", "between 0 and 1"),
    "spread over devices": (("--device", "auto"), "'auto'", "give cpu, cuda"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_clear_error(name: str, tmp_path: Path, capsys) -> None:
    options, value, way_out = WRONG[name]
    refused(tune(*options, out=tmp_path / "o"), value, way_out, capsys)
    assert not list(tmp_path.iterdir())


def test_the_target_must_be_new(tmp_path: Path, capsys) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    refused(tune(out=tmp_path), "thesis.tex", "Give a new folder", capsys)
    refused(tune(out=tmp_path / "thesis.tex"), "is a file", "Give a new folder", capsys)
    refused(tune(out=tmp_path / "thesis.tex" / "o"), "Not a directory", "Give a folder", capsys)
    refused(tune(out=tmp_path / "o", data=tmp_path / "no.txt"), "no.txt", "Give a .jsonl", capsys)
    refused(tune(out=tmp_path / "o", model="./nowhere"), "'./nowhere'", "Give an existing model folder", capsys)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_missing_peft_is_named(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(tune(out=tmp_path / "o"), "peft", "pip install 'dynamax-llm[tune]', or use --method full", capsys)
    assert not list(tmp_path.iterdir())


def refused(command: list[str], value: str, way_out: str, capsys) -> None:
    corpus(), model_folder()
    capsys.readouterr()
    assert cli.run(command) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1, printed
    assert printed.err.startswith("error: ") and value in printed.err and way_out in printed.err, printed.err
